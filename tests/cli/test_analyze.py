"""``finetune analyze``: what it prints, what it writes, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from finetune import registry
from finetune.artifacts.analyze import _name_run, analyze
from finetune.artifacts.verify import verify
from finetune.cli import artifacts as cli
from finetune.core.analysis import Subject
from finetune.errors import ConfigError
from finetune.report.runs import find_runs
from finetune.testing.analyses import check_analysis, train_small

from ..support.tiny_model import TINY


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_small(
        tmp_path_factory.mktemp("outputs") / "t" / "r",
        "method=shira",
        "train.save_every=2",
        "name=t",
        "run=r",
        *TINY,
    )


def test_the_result_is_printed_and_stored_with_its_plots(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.analyze(["what=geometry", str(run), "what.rank=4"])
    said = capsys.readouterr().out
    assert "effective_rank" in said
    assert "vit.layers.0" in said
    assert "density:" in said
    folder = run / "analysis"
    stored = json.loads((folder / "geometry.json").read_text())
    assert (stored["format"], stored["analysis"], stored["options"]["rank"]) == (1, "geometry", 4)
    assert stored["subjects"] == [{"run": str(run), "step": 4}]
    for name in ("density", "relative_norm"):
        with Image.open(folder / "geometry" / f"{name}.png") as image:
            assert image.format == "PNG"
        assert str(folder / "geometry" / f"{name}.png") in said
    cli.analyze(["what=geometry", f"ckpt={run}", "what.rank=4"], as_json=True)
    printed = json.loads(capsys.readouterr().out)
    del printed["files"], stored["format"], stored["finetune"]
    assert printed == stored


def test_a_checkpoint_keeps_a_result_of_its_own(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.analyze(["what=geometry", str(run / "checkpoints" / "step-2")], as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert found["subjects"][0]["step"] == 2
    assert found["files"][0] == str(run / "analysis" / "step-2" / "geometry.json")


def test_geometry_passes_the_checks_of_every_analysis(run: Path) -> None:
    check_analysis(registry.get("analysis", "geometry")(rank=4), [run])


@pytest.mark.slow
def test_a_run_with_results_still_verifies_and_is_one_run(run: Path) -> None:
    cli.analyze(["what=geometry", str(run)])
    shown = {point["point"]: (point["verdict"], point["words"]) for point in verify(run, print)["points"]}
    assert {verdict for verdict, _ in shown.values()} == {"pass"}, shown
    assert find_runs([run.parents[1]]) == [run]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], r"Name one analysis by what=NAME\. There is: .*geometry"),
        (["what=geometri", "RUN"], r"what=geometri is no analysis\. Did you mean 'geometry'\?"),
        (["what=geometry", "what=geometry", "RUN"], r"what=NAME, not 2"),
        (["what=geometry"], r"what=geometry takes one run, and none is given\. Write: .*what=geometry RUN"),
        (["what=geometry", "RUN", "RUN"], r"what=geometry takes one run, not 2"),
        (["what=geometry", "nowhere"], r"nowhere is not the folder of a run"),
        (
            ["what=geometry", "what.rang=3", "RUN"],
            r"what.rang=3 is not an option of what=geometry\. Did you mean 'rank'",
        ),
        (["what=geometry", "rang=3", "RUN"], r"rang=3 is not an option of what=geometry\. Did you mean"),
        (["what=geometry", "RUN", "no/rank=3"], r"what=geometry takes one run, not 2"),
        (["what=geometry", "what.rank=0", "RUN"], r"what.rank=0 .* should be greater than or equal to 1"),
        (["what=geometry", "what.rank=a", "RUN"], r"what.rank='a' .* should be a valid integer"),
        (["what=geometry", "what.rank=2", "what.rank=3", "RUN"], r"rank is given twice"),
        (["what=geometry", "what.rank=2,3", "RUN"], r"rank takes one value here"),
        (["what=geometry", "--fast", "RUN"], r"--fast is not an option here"),
    ],
)
def test_what_is_refused(run: Path, words: list[str], message: str) -> None:
    before = sorted(run.rglob("*"))
    with pytest.raises(ConfigError, match=message) as refused:
        cli.analyze([str(run) if word == "RUN" else word for word in words])
    assert len(refused.value.faults) == 1
    assert sorted(run.rglob("*")) == before


def test_all_wrong_options_are_named_at_once(run: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        cli.analyze(["what=geometry", "what.rank=0", "what.alpha=2", "what.rang=1", str(run)])
    assert len(refused.value.faults) == 3


def test_each_second_run_has_a_result_of_its_own(run: Path, tmp_path: Path) -> None:
    """The names of the other run and of its folder are in the file's name, and a long one is cut."""
    at_step = run / "checkpoints" / "step-2"
    names = set()
    for other in (run, at_step):
        lmc = registry.get("analysis", "lmc")(points=3)
        names.add(analyze(lmc, [run, other]).store().name)
    assert names == {"lmc.t.r.json", "lmc.t.r.step-2.json"}
    assert not (run / "analysis" / "lmc.json").exists()
    long = tmp_path / ("n" * 200) / ("r" * 200)
    long.mkdir(parents=True)
    (long / "config.yaml").write_text("")
    subject = Subject(long, long, 4, open=lambda: None)
    assert _name_run(subject) == _name_run(subject)
    assert len(_name_run(subject)) < 150
