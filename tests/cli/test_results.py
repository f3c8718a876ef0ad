"""``finetune compare`` and ``finetune reproduce``, called with the words that a user types."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from finetune.artifacts import reproduce as reproducing
from finetune.cli import app as cli

from ..support.run_folders import MakeRun

Output = tuple[int, str, str]


@pytest.fixture
def call(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., Output]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*words: object) -> Output:
        monkeypatch.setattr(sys, "argv", ["finetune", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return run


@pytest.fixture
def sweep(make_run: MakeRun) -> str:
    for seed in (0, 1, 2):
        make_run("lora", seed, [1] * 9 + [seed % 2])
        make_run("head", seed, [1, 0] * 5, result={"git_commit": "b" * 40})
    return "outputs/sweep"


def test_table_and_files(call: Callable[..., Output], sweep: str, tmp_path: Path) -> None:
    files = [tmp_path / "new" / f"t{end}" for end in (".csv", ".md", ".tex", ".json")]
    code, out, err = call("compare", sweep, *(word for file in files for word in ("--out", file)))
    assert (code, err.count("Written: ")) == (0, 4)
    assert "lora *" in out
    assert all(file.stat().st_size > 100 for file in files)
    again = call("compare", sweep, *(word for file in files for word in ("--out", file)))
    assert again[0] == 0  # its own files may be replaced
    assert not [file for file in (tmp_path / "new").iterdir() if file not in files]
    shown = json.loads(call("compare", sweep, "--json")[1])
    assert shown == json.loads(files[3].read_text())
    assert [row["curve"] for row in shown["rows"]] == [[], []]


def test_html_and_plots(call: Callable[..., Output], sweep: str, tmp_path: Path) -> None:
    code, _, err = call("compare", sweep, "--out", "r.html", "--plots", "figures")
    assert code == 0, err
    assert "lora" in (tmp_path / "r.html").read_text()
    assert {file.suffix for file in (tmp_path / "figures").iterdir()} == {".png", ".pdf"}
    assert "finetune sweep method=lora" in (tmp_path / "r.html").read_text()
    assert call("compare", sweep, "--out", "r.html")[0] == 0


def test_strict_exits_with_three_on_any_finding(
    call: Callable[..., Output], sweep: str, make_run: MakeRun
) -> None:
    code, out, _ = call("compare", sweep, "--strict", "--out", "t.csv")
    assert (code, "Runs used different commits" in out, Path("t.csv").is_file()) == (3, True, True)
    assert call("compare", sweep)[0] == 0
    assert call("compare", *Path(sweep).glob("lora-*"), "--strict")[0] == 0


def test_files_of_a_user_are_not_overwritten(call: Callable[..., Output], sweep: str, tmp_path: Path) -> None:
    mine = [tmp_path / name for name in ("notes.md", "data.csv", "x.tex", "y.json", "z.html")]
    for file in mine:
        file.write_text("mine\n")
    (tmp_path / "d.csv").mkdir()
    result = next((tmp_path / sweep).glob("*/result.json"))
    files = [*mine, tmp_path / "d.csv", result, tmp_path / "t.pdf"]
    code, out, err = call("compare", sweep, *(word for file in files for word in ("--out", file)))
    assert (code, out, err.count("Error: --out ")) == (2, "", 8)
    assert {file.read_text() for file in mine} == {"mine\n"}


def test_mistakes_exit_with_two(call: Callable[..., Output], sweep: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for words, said in (
        (["empty"], "holds no run"),
        (["nowhere"], "no such folder"),
        ([sweep, "--by", "methd"], "Did you mean 'method'"),
        ([sweep, "--metric", "test.acc"], "no run has it"),
        ([sweep, "--baseline", "x"], "is not a row"),
        ([sweep, "--out", "/proc/nothing/t.csv"], "cannot be written"),
    ):
        code, _, err = call("compare", *words)
        assert (code, said in err, "Traceback" in err) == (2, True, False), (words, err)


def test_by_and_metric_and_baseline(call: Callable[..., Output], sweep: str) -> None:
    found = json.loads(
        call(
            "compare",
            sweep,
            "--by",
            "method,optimizer.lr",
            "--metric",
            "loss",
            "--baseline",
            "head",
            "--json",
        )[1]
    )
    assert (found["by"], found["metric"]["name"], found["baseline"]) == (
        ["method", "optimizer.lr"],
        "test.loss",
        "head optimizer.lr=0.001",
    )


@pytest.mark.processes
def test_a_table_imports_neither_torch_nor_pandas_nor_slow_parts_of_scipy(sweep: str, tmp_path: Path) -> None:
    code = """
import sys
from finetune.cli.app import main
sys.argv = ["finetune", "compare", sys.argv[1]]
try:
    main()
except SystemExit:
    pass
print(*sys.modules, file=sys.stderr)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / sweep)],
        env={**os.environ, "COLUMNS": "100"},
        capture_output=True,
        text=True,
        check=True,
    )
    loaded = set(done.stderr.split())
    assert not loaded & {"torch", "pandas", "scipy.stats", "statsmodels", "hydra"}
    assert not loaded & {"plotly", "matplotlib", "wandb"}
    assert "lora" in done.stdout


def test_reproduce_reports_and_exits(call: Callable[..., Output], monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"verdict": "identical", "words": "Identical.", "differs": {"torch": ["1", "2"]}, "kept": None}
    monkeypatch.setattr(reproducing, "reproduce", lambda run, keep, plugins: found | {"run": str(run)})
    assert call("reproduce", "outputs/a/b")[:2] == (0, "Identical.\n  torch: 1 before, 2 now\n")
    found["verdict"] = "different"
    code, out, _ = call("reproduce", "outputs/a/b", "--json")
    assert (code, json.loads(out)["run"]) == (1, "outputs/a/b")
