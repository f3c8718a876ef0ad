"""Compare the settings that budgets are solved for with counts by hand and with what real runs report."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from finetune import registry
from finetune.config.load import load
from finetune.data import digits
from finetune.errors import ConfigError
from finetune.storage.run_folder import run_folder
from finetune.sweep import budget, size
from finetune.sweep.solve import solve
from finetune.testing.cases import Case, find_cases
from finetune.training import run

ENTRIES = "49k"  # near what low ranks reach, so that every method can meet it
SHORT = [
    "train.steps=4",
    "train.eval_every=null",
    "train.batch_size=8",
    "train.eval_batch_size=500",
    "train.threads=1",
    "dataset.retention_images=0",
]
QUICK = ("lora", "snell", "shira", "s2ft")  # one of each kind of size


def first_cases() -> dict[str, Case]:
    """Return the first case of each method by the method's name."""
    found: dict[str, Case] = {}
    for case in find_cases(Path(__file__).parents[1] / "methods"):
        found.setdefault(case.method, case)
    return found


CASES = first_cases()
SOLVED = [name for name, case in CASES.items() if case.budget is None]


@pytest.fixture(scope="module")
def shapes() -> list[tuple[int, int]]:
    """Return the shapes of the linear layers of the built-in model, read from its weights."""
    from finetune.models.load import load as load_model

    config = load([])
    raw = config.dataset.read()
    model = load_model(config.model, raw.task, raw.labels, 0).model
    return [
        tuple(m.weight.shape)
        for n, m in model.named_modules()
        if type(m).__name__ == "Linear" and "classifier" not in n
    ]


def value(words: list[str]) -> float:
    """Return the value that was solved for, the last of ``words``."""
    return float(words[-1].partition("=")[2])


@pytest.mark.parametrize(
    ("text", "kind", "target"),
    [
        ("0.5%", "share", 5_000.0),
        ("100%", "share", 1e6),
        (".25%", "share", 2_500.0),
        ("400k", "trained", 4e5),
        ("1.5M", "trained", 1.5e6),
        ("49152", "trained", 49_152.0),
        ("4e5", "trained", 4e5),
        ("2G", "trained", 2e9),
        ("1MB", "stored", 1e6),
        ("1MiB", "stored", 2.0**20),
        ("512KiB", "stored", 2.0**19),
        ("1.5kB", "stored", 1_500.0),
        ("800B", "stored", 800.0),
    ],
)
def test_what_a_budget_means(text: str, kind: str, target: float) -> None:
    found = budget.parse(text)
    assert (found.kind, found.target(1_000_000)) == (kind, pytest.approx(target))


@pytest.mark.parametrize(
    "text", ["", "%", "0%", "101%", "0k", "-5k", "1TB", "5 apples", "1,5M", "nan", "inf"]
)
def test_what_is_no_budget(text: str) -> None:
    with pytest.raises(ConfigError, match=f"budget={text}"):
        budget.parse(text)


@pytest.mark.parametrize(
    "method", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in SOLVED]
)
def test_real_runs_report_what_was_asked_for(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(digits, "SIZES", {"train": 64, "val": 16, "test": 16})
    words = solve(ENTRIES, [f"method={method}", *CASES[method].settings, "name=n", "seed=1", *SHORT])
    config = load(words)
    config = replace(config, run=run_folder(config).name)  # as in a sweep
    result = run.train(config, run_folder(config), lambda line: None, lambda done, total, words: None)
    counted = size.measure(config)
    assert result["params"]["trained"] == counted.trained
    assert counted.head == 1290
    assert abs(counted.trained - counted.head - 49_000) <= 0.02 * 49_000
    assert (counted.stored == 0) == (method in ("lift", "spt"))
    if method in ("lora", "snell", "snella", "peft"):
        assert abs(result["stored_bytes"] - counted.stored) <= 1  # the best step may have another digit
    elif counted.stored:
        assert result["stored_bytes"] == pytest.approx(counted.stored, rel=0.02)


@pytest.mark.parametrize("method", sorted(CASES.keys() - set(SOLVED)))
def test_a_method_that_meets_no_budget_says_why(method: str) -> None:
    expected, fixed = CASES[method].budget, isinstance(CASES[method].budget, int)
    assert bool(registry.get("method", method).size) == (not fixed)
    words = f"no setting for its size.*{expected:,} trained" if fixed else expected
    with pytest.raises(budget.FixedSize if fixed else ConfigError, match=words):
        solve(ENTRIES, [f"method={method}"])


def test_every_other_method_names_its_setting() -> None:
    for method in SOLVED:
        assert registry.get("method", method).size, method


@pytest.mark.parametrize(("method", "knob"), [("lora", "rank"), ("peft", "config.r"), ("snell", "rank")])
def test_ranks_by_brute_force(method: str, knob: str, shapes: list[tuple[int, int]]) -> None:
    ranks = range(1, 65) if method != "snell" else range(2, 65, 2)
    token = 128 if method == "snell" else 0  # its class token
    counts = {rank: sum(rank * (out + in_) for out, in_ in shapes) + token for rank in ranks}
    for target in (12_300, 49_000, 200_000, 491_000):
        nearest = min(counts, key=lambda rank: abs(counts[rank] - target))
        if abs(counts[nearest] - target) <= 0.02 * target:
            words = solve(str(target), [f"method={method}"])
            assert words == [f"method={method}", f"method.{knob}={nearest}"]
            continue
        below = max((rank for rank in counts if counts[rank] < target), default=None)
        above = min(rank for rank in counts if counts[rank] >= target)
        with pytest.raises(ConfigError) as caught:
            solve(str(target), [f"method={method}"])
        for rank in (below, above):
            assert rank is None or f"method.{knob}={rank} with {counts[rank]:,} trained" in str(caught.value)


@pytest.mark.parametrize("target", [720, 5_043, 40_000, 333_333, 780_000])
def test_sparsity_by_counting(target: int, shapes: list[tuple[int, int]]) -> None:
    found = value(solve(str(target), ["method=shira"]))
    trained = sum(max(1, out * in_ - round(found * out * in_)) for out, in_ in shapes)
    assert abs(trained - target) <= 0.02 * target


def test_units_by_brute_force(shapes: list[tuple[int, int]]) -> None:
    """Of all columns of the down projections, int(d * all) are trained, each as long as the model is wide."""
    width = min(min(shape) for shape in shapes)
    columns = sum(in_ for out, in_ in shapes if in_ > out)
    for target in (width, 5 * width, 7 * width + 2, 100 * width):
        found = value(solve(str(target), ["method=s2ft"]))
        assert int(found * columns) * width == target // width * width
    with pytest.raises(ConfigError) as caught:
        solve(str(3 * width + width // 2), ["method=s2ft"])
    assert f"{3 * width:,} trained" in str(caught.value)
    assert f"{4 * width:,} trained" in str(caught.value)
    with pytest.raises(ConfigError, match=f"{width:,} trained"):
        solve("10", ["method=s2ft"])


def test_a_share_is_of_all_parameters() -> None:
    total = size.frame(load([])).total
    assert total > 1_000_000
    words = solve("5%", ["method=shira"])
    found = size.measure(load(words))
    assert found.trained - found.head == pytest.approx(0.05 * total, rel=0.001)
    with pytest.raises(ConfigError, match=r"\(100%\), within 2 %.*\(97\.5%\)"):
        solve("100%", ["method=shira"])


def test_other_settings_count_too() -> None:
    """A branch beside the entries, fewer targets, and no class token."""
    for words in (
        ["method=super_tuning", "method.branch=1"],
        ["method=lora", "method.targets=[q,v]"],
        ["method=spt", "method.class_token=false"],
    ):
        solved = solve("24.6k", words)
        found = size.measure(load(solved))
        assert abs(found.trained - found.head - 24_600) <= 0.02 * 24_600
        assert solved[:-1] == words


def test_all_seeds_get_the_same() -> None:
    assert len({solve("30k", ["method=lift", f"seed={seed}"])[-1] for seed in (0, 1, 7)}) == 1


def test_bytes_of_ranks_are_exact() -> None:
    for rank in (2, 5, 8):
        config = load(["method=lora", f"method.rank={rank}", "name=n"])
        stored = size.measure(config).stored
        assert solve(f"{stored}B", ["method=lora", "name=n"])[-1] == f"method.rank={rank}"


def test_what_training_decides_has_no_bytes() -> None:
    for words in (["method=lift"], ["method=spt"]):
        with pytest.raises(ConfigError, match="decided while it trains"):
            solve("1MB", words)
    assert solve(
        "1MB", ["method=lift", "schedule.every=200", "train.steps=201", "method.schedule.dropped=base"]
    )


def test_settings_that_contradict_the_budget() -> None:
    for words in (
        ["method=lora", "method.rank=4"],
        ["method=shira", "sparsity=0.9"],
        ["method=peft", "method.config.r=3"],
    ):
        with pytest.raises(ConfigError, match=f"{words[1]} and budget=50k both say"):
            solve("50k", words)
    assert solve("49k", ["method=snell", "sparsity=0.5"])[-1] == "method.rank=4"
    with pytest.raises(ConfigError, match=r"2:4.*sparsity"):
        solve("50k", ["method=shira", "method.grain='2:4'"])


def test_a_setting_that_changes_nothing() -> None:
    with (
        pytest.warns(UserWarning, match="init_r"),
        pytest.raises(budget.FixedSize, match=r"method\.config\.r does not change the size"),
    ):
        solve("50k", ["method=peft", "method.type=ADALORA", "method.config={total_step:10}"])


def test_weights_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[Any] = []
    real = size.load_model
    monkeypatch.setattr(size, "load_model", lambda *given: reads.append(given) or real(*given))
    monkeypatch.setattr(size, "_frames", {})
    for method in ("lora", "snell", "shira"):
        solve("49.1k", [f"method={method}"])
    assert len(reads) == 1
    assert all(p.is_meta for p in size.frame(load([])).model.parameters())
