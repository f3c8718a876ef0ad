"""Which runs, where, in which order, and what is said of those that cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune import sweep
from finetune.errors import ConfigError


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_points_are_the_cross_product() -> None:
    runs = sweep.list_points(["method=lora,snell", "seed=0,1", "train.steps=3"])
    assert [(p.config.method.name, p.config.seed, p.config.train.steps) for p in runs] == [
        (m, s, 3) for m in ("lora", "snell") for s in (0, 1)
    ]
    assert [p.label for p in runs] == ["method=lora", "method=lora", "method=snell", "method=snell"]
    assert not list(Path().iterdir())


def test_folders_are_named_by_content() -> None:
    first, again, other = (
        sweep.list_points(o)
        for o in (["seed=0,1", "method=head"], ["method=head", "seed=0,1"], ["seed=0,1,2", "method=head"])
    )
    assert [p.folder for p in first] == [p.folder for p in again]
    assert first[0].folder.path.parent != other[0].folder.path.parent
    assert first[0].folder.path.name == other[0].folder.path.name
    for point in first:
        assert point.folder.path == Path("outputs", point.config.name or "", point.config.run or "")
        assert point.config.hash() in point.folder.path.name
    assert sweep.list_points(["seed=0,1", "name=mine"])[0].folder.path.parent == Path("outputs/mine")


def test_points_of_the_same_content_are_one() -> None:
    assert [p.config.seed for p in sweep.list_points(["seed=0,1,0"])] == [0, 1]


def test_on_top_of_a_frozen_config() -> None:
    (point,) = sweep.list_points(["seed=5", "name=a"])
    sweep.freeze([point])
    runs = sweep.list_points(["train.steps=3,4"], config_file=point.folder.config)
    assert [(p.config.seed, p.config.train.steps) for p in runs] == [(5, 3), (5, 4)]
    assert len({p.folder.path for p in [point, *runs]}) == 3


def test_all_faults_of_all_points_before_any_starts() -> None:
    with pytest.raises(ConfigError) as caught:
        sweep.list_points(["method=lora,snell", "sparsity=0.1", "seed=0,1", "train.stps=3"])
    everywhere, lora = sorted(caught.value.faults, key=lambda fault: "sparsity" in fault)
    assert "train.stps=3" in everywhere
    assert "(at " not in everywhere
    assert "method=lora" in lora
    assert lora.endswith("(at method=lora seed=0 and 1 more)")
    assert not list(Path().iterdir())


def test_a_fault_of_one_point_with_a_budget_says_which() -> None:
    with pytest.raises(ConfigError) as caught:
        sweep.list_points(["method=lora,spiel", "budget=30k,60k", "schedule=static"])
    *_, fault = caught.value.faults
    assert fault.endswith("(at method=spiel budget=30k and 1 more)")


def test_run_is_refused() -> None:
    with pytest.raises(ConfigError, match="run=x: a sweep names its runs by their content"):
        sweep.list_points(["run=x", "seed=0,1"])


def test_other_runs_in_the_way_are_all_named() -> None:
    runs = sweep.list_points(["seed=0,1,2"])
    for point in runs[1:]:
        point.folder.open_or_check(runs[0].config)
    with pytest.raises(ConfigError, match="holds another run") as caught:
        sweep.freeze(runs)
    assert len(caught.value.faults) == 2


def test_a_swept_setting_that_a_method_lacks_is_dropped_for_it() -> None:
    said = list[str]()
    runs = sweep.list_points(
        ["method=lora,snell,spiel", "sparsity=0.5,0.9,0.99", "seed=0,1,2"], say=said.append
    )
    wanted = {("lora", None, s) for s in range(3)} | {
        (m, p, s) for m in ("snell", "spiel") for p in (0.5, 0.9, 0.99) for s in range(3)
    }
    assert sorted(map(str, wanted)) == sorted(
        str((p.config.method.name, getattr(p.config.method, "sparsity", None), p.config.seed)) for p in runs
    )
    (line,) = said
    assert "method=lora has no sparsity" in line


def test_schedules_are_dropped_alike_and_what_no_method_has_is_not() -> None:
    said = list[str]()
    runs = sweep.list_points(["method=lora,lift", "schedule.every=10,20"], say=said.append)
    assert [p.label for p in runs] == [
        "method=lora",
        "method=lift method.schedule.every=10",
        "method=lift method.schedule.every=20",
    ]
    assert "method=lora has no schedule.every" in said[0]
    with pytest.raises(ConfigError, match=r"method.depth=1 .* is not a setting of method=lora"):
        sweep.list_points(["method=lora,snell", "method.depth=1,2"])
    with pytest.raises(ConfigError, match=r"method.sparsity=0.5 .* is not a setting of method=lora"):
        sweep.list_points(["method=lora", "sparsity=0.5,0.9"])


@pytest.mark.parametrize("words", ["seed=range(3,3)", "seed=glob(nothing*)", "seed=range(0,10,-1)"])
def test_an_empty_grid_is_refused(words: str) -> None:
    with pytest.raises(ConfigError):
        sweep.list_points(["method=head", words])


def test_a_large_grid_needs_consent() -> None:
    with pytest.raises(ConfigError, match=r"The grid has 501 runs, more than 500\. .*--max-runs 501"):
        sweep.list_points(["method=head", "seed=range(0,501)"])
    assert len(sweep.list_points(["method=head", "seed=range(0,12)"], max_runs=12)) == 12
    with pytest.raises(ConfigError, match="--max-runs 12"):
        sweep.list_points(["method=head", "seed=range(0,12)"], max_runs=11)
    with pytest.raises(ConfigError, match="more than 100,000 points"):
        sweep.list_points(["seed=range(0,1000000000)", "train.steps=range(1,1000)"], max_runs=10**9)


def preset(folder: Path, text: str, name: str = "small") -> Path:
    (folder / "sweep").mkdir(parents=True, exist_ok=True)
    (folder / "sweep" / f"{name}.yaml").write_text(text)
    return folder


def test_a_sweep_from_a_file(tmp_path: Path) -> None:
    user = preset(tmp_path / "user", "# two methods\n- method=head,bitfit\n- seed=0,1\n- train.steps=3\n")
    runs = sweep.list_points(["sweep=small"], user)
    assert [(p.config.method.name, p.config.seed, p.config.train.steps) for p in runs] == [
        (m, s, 3) for m in ("head", "bitfit") for s in (0, 1)
    ]
    assert runs[0].folder.path.parent == Path("outputs/small")
    changed = sweep.list_points(["sweep=small", "seed=7", "name=mine"], user)
    assert [(p.config.method.name, p.config.seed) for p in changed] == [("head", 7), ("bitfit", 7)]
    assert changed[0].folder.path.parent == Path("outputs/mine")
    assert sweep.list_points(["sweep=small", "seed=7"], user)[0].folder.path.parent.name.startswith("sweep-")


@pytest.mark.parametrize("text", ["method: head\n", "", "- method\n", "- {a: 1}\n", "- [\n"])
def test_a_file_that_is_no_sweep(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"sweep=small: .*small\.yaml"):
        sweep.list_points(["sweep=small"], preset(tmp_path / "user", text))


def test_an_unknown_sweep_names_the_near_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"sweep=smal is not a sweep\. Did you mean 'small'\?"):
        sweep.list_points(["sweep=smal"], preset(tmp_path / "user", "- seed=0\n"))
    with pytest.raises(ConfigError, match="set the same thing"):
        sweep.list_points(["sweep=a", "sweep=b"])


def test_the_folders_of_sweeps_are_no_settings_of_a_run(tmp_path: Path) -> None:
    from finetune.config.load import load

    with pytest.raises(ConfigError, match=r"sweep='small'.* is not a setting"):
        load(["sweep=small"], preset(tmp_path / "user", "- seed=0\n"))


def test_a_budget_leaves_out_methods_of_fixed_size() -> None:
    said = list[str]()
    runs = sweep.list_points(["method=lora,bitfit", "budget=24576", "seed=0,1"], say=said.append)
    assert [(p.config.method.name, p.config.seed) for p in runs] == [("lora", 0), ("lora", 1)]
    assert said[0].startswith("Left out: method=bitfit has no setting for its size")
    assert len(said) == 1
    with pytest.raises(ConfigError, match="method=bitfit has no setting for its size"):
        sweep.list_points(["method=bitfit", "budget=24576"])


def test_several_budgets_are_swept() -> None:
    runs = sweep.list_points(["method=lora", "budget=24576,49152"])
    assert [(p.config.method.rank, p.label) for p in runs] == [(2, "method.rank=2"), (4, "method.rank=4")]
