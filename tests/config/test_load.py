"""Overrides, YAML groups and dataclasses against each other."""

import json
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pytest
import yaml
from annotated_types import Ge

from finetune import registry, sweep
from finetune.config import load as config
from finetune.config.settings import Config
from finetune.core.method import Phase
from finetune.core.sparse.schedule import Schedule
from finetune.errors import ConfigError
from finetune.schedules.drop_grow import DropGrow

VARIANTS = {
    "schedule=cubic": "ramp",
    "schedule=linear": "ramp",
    "selector=rst": "ist",
    **dict.fromkeys(["method=houlsby", "method=pfeiffer", "method=adaptformer"], "adapter"),
    "optimizer=sparse_mezo": "mezo",
}
OPEN = {}  # the setting that a file leaves to the user
for _file in sorted(config.conf_dir().glob("*/*.yaml")):
    for _line in _file.read_text().splitlines():
        if _line.endswith(": ???"):
            OPEN[f"{_file.parent.name}={_file.stem}"] = f"{_file.parent.name}.{_line.partition(':')[0]}"
FITS = {"redraw": ["schedule.every=100"]}  # where the default period is no less than the default run
FILES = sorted(
    f"{file.parent.name}={file.stem}"
    for file in config.conf_dir().glob("*/*.yaml")
    if file.parent.name not in registry.outside_runs()
)


def faults(*overrides: str, **where: Path) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        config.load(list(overrides), **where)
    return caught.value.faults


def fault(*overrides: str, **where: Path) -> str:
    found = faults(*overrides, **where)
    assert len(found) == 1, found
    return found[0]


@dataclass(frozen=True)
class Odd(Schedule):
    """A schedule with a field of every kind."""

    name: ClassVar[str] = "odd"
    every: Annotated[int, Ge(1)] = 7
    word: str = "w"
    kind: Literal["a", "b"] = "a"
    range: tuple[float, float] = (0.0, 1.0)
    most: float | None = None

    def __post_init__(self) -> None:
        if self.range[0] > self.range[1]:
            raise ValueError("method.schedule.range runs backwards.")


@dataclass(frozen=True)
class Crossed:
    """A method with a schedule of its own and one of no default."""

    name: ClassVar[str] = "crossed"
    rank: int = 1
    schedule: Schedule = field(default=DropGrow(every=20, rate=0.5))
    head: bool = True  # every method has it

    def faults(self, steps: int) -> list[str]:
        return self.schedule.faults(steps)

    def phases(self) -> tuple[Phase, ...]:
        return (Phase(self, 1.0),)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Bare(Crossed):
    name: ClassVar[str] = "bare"
    schedule: Schedule = field(kw_only=True)


@pytest.fixture
def crossed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of groups with methods that have a schedule, registered for as long as the test lasts."""
    real = registry.catalog
    more: dict[str, list[Any]] = {"method": [Crossed, Bare], "schedule": [Odd]}

    def catalog(kind: str) -> dict[str, registry.Entry]:
        return {
            **real(kind),
            **{
                c.name: registry.Entry(c.name, __name__, "", {"class": c.__name__})
                for c in more.get(kind, [])
            },
        }

    monkeypatch.setattr(registry, "catalog", catalog)
    files = {
        "method/crossed.yaml": "name: crossed\n",
        "method/bare.yaml": "name: bare\n",
        "method/preset.yaml": "name: crossed\nschedule:\n  rate: 0.25\n",
        "method/named.yaml": "name: crossed\nschedule:\n  name: odd\n  word: x\n",
        "schedule/odd.yaml": "name: odd\n",
        "schedule/drop_grow.yaml": "name: drop_grow\nevery: 11\n",
        "schedule/child.yaml": "defaults:\n  - odd\n  - _self_\nevery: ${seed}\n",
        "schedule/strange.yaml": "name: strange\n",
        "schedule/nameless.yaml": "every: 12\n",
        "experiment/slow.yaml": "# @package _global_\nschedule:\n  every: 50\n",
        "experiment/whole.yaml": "# @package _global_\ndefaults:\n  - /schedule: odd\n  - _self_\n"
        "schedule:\n  word: y\n",
    }
    for name, text in files.items():
        (tmp_path / "own" / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / "own" / name).write_text(text)
    return tmp_path / "own"


@pytest.fixture
def groups(tmp_path: Path) -> Path:
    """A folder of the user's own groups."""
    files = {
        "method/mine.yaml": "# @package _global_\nmethod:\n  name: lora\n  rank: 3\noptimizer:\n  lr: 5e-4\n",
        "method/lora.yaml": "name: lora\nrank: 5\n",
        "method/nameless.yaml": "rank: 5\n",
        "method/strange.yaml": "name: strange\n",
        "method/broken.yaml": "name: [lora\n",
        "method/child.yaml": "defaults:\n  - lora\n  - _self_\nalpha: ${seed}\n",
        "experiment/big.yaml": "# @package _global_\ndefaults:\n  - override /method: bitfit\nseed: 7\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_default_run() -> None:
    made = config.load([])
    assert (made.method.name, made.model.name, made.dataset.name, made.seed) == (
        "snell",
        "tiny_vit",
        "digits",
        0,
    )


def given(choice: str) -> list[str]:
    group, _, option = choice.partition("=")
    if group in ("objective", "selector") and option in registry.catalog(group):
        return [choice, *(f"streams.{name}=digits" for name in registry.get(group, option)().streams())]
    return [choice, f"{OPEN[choice]}=somewhere"] if choice in OPEN else [choice]


@pytest.mark.parametrize("choice", FILES)
def test_every_file(choice: str, crossed: Path) -> None:
    """It composes, says which option it is, and repeats nothing that its dataclass says anyway.

    A variant says of which class it is a variant. The file of an optimizer may repeat its values, so that
    they win over those in the file of a method.
    """
    group, _, option = choice.partition("=")
    if group == "schedule":
        held = config.load(["method=crossed", choice, *FITS.get(option, [])], crossed).method.schedule
    else:
        held = getattr(config.load(given(choice)), group)
    stated = yaml.safe_load((config.conf_dir() / group / f"{option}.yaml").read_text())
    stated = stated.get(group, stated)  # a file of the global package names its group
    assert group == "train" or held.name == stated.pop("name") == VARIANTS.get(choice, option)
    assert all(getattr(held, key) == value for key, value in stated.items() if value != "???")
    repeated = [f.name for f in fields(held) if f.name in stated and f.default == stated[f.name]]
    assert group == "optimizer" or not repeated


@pytest.mark.parametrize("choice", OPEN)
def test_open_values_are_asked_for(choice: str) -> None:
    key, file = OPEN[choice], choice.replace("=", "/")
    assert re.fullmatch(
        rf"{key} is not set \(conf/{file}.yaml:\d leaves it open\). Add {key}=VALUE.", fault(choice)
    )


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("seed=0", "seed", 0),
        ("optimizer.lr=1", "optimizer.lr", 1.0),
        ("optimizer.betas=[0,0.5]", "optimizer.betas", [0.0, 0.5]),
        ("sparsity=0.25", "method.sparsity", 0.25),
        ("method.targets=[q,v]", "method.targets", ["q", "v"]),
        ("train.clip=null", "train.clip", None),
        ("name=2026", "name", "2026"),
        ("run=1e-3", "run", "1e-3"),
        ("run=${seed}-x", "run", "0-x"),
        ("logger.tags=[a,'b c']", "logger.tags", ["a", "b c"]),
        ("name=ünï", "name", "ünï"),
    ],
)
def test_values(override: str, key: str, value: object) -> None:
    shown, origin = config.tree([override])[key]
    assert shown == value
    assert type(shown) is type(value)
    assert origin == "command line"


@pytest.mark.parametrize(
    "path", ["/a/epoch=3.pt", "hf://x?y=1", "a#b", "x{y", "[a", 'say "x=1"', "~/x", "", "C:\\d=1\\"]
)
def test_unparsable_paths_are_text(path: str) -> None:
    assert config.load(["model=hf", f"model.path={path}"]).model.path == path


def test_peft_config_is_free() -> None:
    made = config.load(
        ["method=peft", "method.type=LORA", "method.config.r=8", "method.config.target_modules=[q,v]"]
    )
    assert made.method.config == {"r": 8, "target_modules": ["q", "v"]}


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["method.sparsty=0.1"],
            r"method.sparsty=0.1 \(command line\) is not a setting of method=snell. "
            r"Did you mean 'method.sparsity'\?",
        ),
        (["lr=1"], r"Did you mean 'optimizer.lr'\?"),
        (["trian.steps=3"], r"trian.steps=3 .*Did you mean 'train.steps'\?"),
        (["metod=lora"], r"Did you mean 'method'\?"),
        (["sed=1"], r"Did you mean 'seed'\?"),
        (["hydra.run.dir=x"], "hydra.run.dir='x' .*is not a setting"),
        (["method=snel"], r"method=snel .*Did you mean 'snell'\? Options: .*lora"),
        (["logger=wadb"], r"Did you mean 'wandb'\?"),
        (["train.steps=abc"], r"train.steps='abc' \(command line\) should be a valid integer"),
        (["train.steps=1.0"], "should be a valid integer"),
        (["train.steps=true"], "should be a valid integer"),
        (["train.steps.x=1"], r"train.steps=\{\"x\": 1\} \(command line\) should be a valid integer"),
        (["seed=null"], r"seed=null \(command line\) should be a valid integer"),
        (["seed=-1"], "greater than or equal to 0"),
        (["model.download=yes"], "should be true or false"),
        (["optimizer.lr=nan"], "finite"),
        (["optimizer.lr=0"], "greater than 0"),
        (["optimizer.betas=[0.9]"], "too few entries"),
        (["optimizer.betas=[0.9,1]"], r"optimizer.betas.1=1 \(command line\) should be less than 1"),
        (["train.precision=fp8"], "'fp32', 'bf16' or 'fp16'"),
        (["method.targets=q"], r"should be a list, written \[a,b\]"),
        (
            ["method=sparse", "method.score=snp"],
            r"method.score='snp' \(command line\) is not a score. Did you mean 'snip'\? There is: change, d3",
        ),
        (["optimizer=sm4"], r"Did you mean 'sm3'\?"),
        (["optimizer.bets=[0,0]"], r"is not a setting of optimizer=adamw. Did you mean 'optimizer.betas'\?"),
        (["sparsity=1.2"], r"method.sparsity=1.2 \(command line\) should be less than 1"),
        (
            ["method=lora", "sparsity=0.1"],
            "method.sparsity=0.1 .* is not a setting of method=lora. There is: .*method.rank",
        ),
        (["method=[lora,snell]"], "exactly one option"),
        (["method={name: lora}"], "exactly one option"),
        (["method=null"], "exactly one option"),
        (["method=lora,snell"], "finetune sweep method=lora,snell"),
        (["seed=range(0,3)"], "names several values"),
        (["method=lora", "method=snell"], "method=lora and method=snell set the same thing"),
        (["sparsity=0.1", "method.sparsity=0.1"], "set the same thing"),
        (["method.name=lora"], "write method=OPTION"),
        (["+method.extra=1"], r"\+method.extra=1: settings are neither added nor removed"),
        (["++seed=1"], "neither added nor removed"),
        (["~method"], "neither added nor removed"),
        (["--multirun"], "--multirun is not an option here"),
        (["train.steps"], "not of the form key=value"),
        (["=3"], "not of the form key=value"),
        (["method@x=lora"], "not of the form key=value"),
        (["run=${nope}"], "'nope' not found"),
    ],
)
def test_one_fault(overrides: list[str], words: str) -> None:
    said = fault(*overrides)
    assert re.search(words, said), said
    assert "append" not in said
    assert "\n" not in said


def test_all_faults_at_once() -> None:
    found = faults(
        "train.steps=abc",
        "trian.steps=3",
        "--x",
        "optimizer.lr=-1",
        "method.rnk=4",
        "logger=wadb",
        "logger.tgs=1",
    )
    assert [said.split(" ")[0] for said in found] == [
        "--x",
        "logger=wadb",
        "trian.steps=3",
        "method.rnk=4",
        "optimizer.lr=-1",
        "train.steps='abc'",
    ]


def test_wrong_choice_silences_its_section() -> None:
    """What is set for a method that does not exist cannot be judged."""
    assert "method=lorra" in fault("method=lorra", "method.alpha=3", "sparsity=9")


def test_own_groups_win(groups: Path) -> None:
    leaves = config.tree(["method=lora"], groups)
    assert leaves["method.rank"] == (5, f"{groups}/method/lora.yaml:2")
    assert config.load(["method=lora"]).method.rank != 5


def test_an_edited_file_is_read_again(groups: Path) -> None:
    assert config.load(["method=lora"], groups).method.rank == 5
    (groups / "method/lora.yaml").write_text("name: lora\nrank: 66\n")
    assert config.load(["method=lora"], groups).method.rank == 66


def test_method_file_comes_last(groups: Path) -> None:
    """It may set its paper's optimizer values, and the command line still wins."""
    leaves = config.tree(["method=mine", "optimizer.eps=1e-6"], groups)
    assert leaves["optimizer.lr"] == (5e-4, f"{groups}/method/mine.yaml:6")
    assert leaves["optimizer.eps"] == (1e-6, "command line")
    assert config.load(["method=mine", "optimizer.lr=0.5"], groups).optimizer.lr == 0.5


def test_inheritance_and_interpolation(groups: Path) -> None:
    made = config.load(["method=child", "seed=3"], groups).method
    assert (made.rank, made.alpha) == (5, 3.0)


def test_a_group_of_the_users_own(groups: Path) -> None:
    made = config.load(["experiment=big"], groups)
    assert (made.method.name, made.seed) == ("bitfit", 7)
    assert config.load(["experiment=big", "method=lora", "seed=1"], groups).seed == 1


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["method=nameless"], r"method.name is not set.*one of: .*snell"),
        (["method=strange"], r"method=strange is not known.*strange.yaml:1\)"),
        (["method=broken"], r"do not fit together: .*broken.yaml"),
        (["method=lora", "method.rnk=1"], "Did you mean 'method.rank'"),
    ],
)
def test_faults_of_own_groups(groups: Path, overrides: list[str], words: str) -> None:
    said = fault(*overrides, config_dir=groups)
    assert re.search(words, said), said


def test_config_dir_must_exist(tmp_path: Path) -> None:
    assert "there is no such folder" in fault(config_dir=tmp_path / "no")


@pytest.fixture
def frozen(tmp_path: Path) -> Path:
    file = tmp_path / "config.yaml"
    file.write_text(
        yaml.safe_dump(config.load(["method=lora", "seed=4", "name=n"]).as_dict(), sort_keys=False)
    )
    return file


def test_frozen_config_is_the_same_run(frozen: Path) -> None:
    again = config.load([], config_file=frozen)
    assert again == config.load(["method=lora", "seed=4", "name=n"])
    assert isinstance(again, Config)
    changed = config.load(["seed=5", "method.rank=3"], config_file=frozen)
    assert (changed.seed, changed.method.rank, changed.name) == (5, 3, "n")


def test_frozen_config_says_its_lines(frozen: Path) -> None:
    line = frozen.read_text().splitlines().index("seed: 4") + 1
    assert config.tree(["method.rank=3"], config_file=frozen)["seed"] == (4, f"{frozen}:{line}")
    frozen.write_text(frozen.read_text().replace("seed: 4", "seed: x"))
    assert fault(config_file=frozen) == f"seed='x' ({frozen}:{line}) should be a valid integer."


def test_faults_of_a_frozen_config(frozen: Path, tmp_path: Path) -> None:
    assert "cannot be combined with --config" in fault("method=snell", config_file=frozen)
    assert "--config-dir do not go together" in fault(config_file=frozen, config_dir=tmp_path)
    assert "is a folder" in fault(config_file=tmp_path)
    assert "no such file" in fault(config_file=tmp_path / "no.yaml")
    for text, words in (
        ("[1", "cannot be read as YAML"),
        ("- 1", "not a mapping"),
        ("\x00", "cannot be read as YAML"),
    ):
        frozen.write_text(text)
        assert words in fault(config_file=frozen)
    frozen.write_text("seed: 1")
    assert "model should be a mapping of settings, not None" in "\n".join(faults(config_file=frozen))


def test_tree_is_complete_and_honest() -> None:
    """Every value is there once, and every origin leads to a line that names it."""
    leaves = config.tree(["method=lora", "method.rank=3"])
    made = config.load(["method=lora", "method.rank=3"])
    assert {key for key in leaves if "." not in key} == {"name", "run", "seed", "streams"}
    assert json.dumps({key: value for key, (value, _) in leaves.items()}) == json.dumps(
        dict(_flat(made.as_dict()))
    )
    root = config.conf_dir().parent
    for key, (_, origin) in leaves.items():
        if origin != "command line":
            file, _, line = origin.removeprefix("default in ").rpartition(":")
            assert key.rpartition(".")[2] in (root / file).read_text().splitlines()[int(line) - 1], (
                key,
                origin,
            )


def _flat(tree: dict[str, object], prefix: str = "") -> list[tuple[str, object]]:
    return [
        leaf
        for k, v in tree.items()
        for leaf in (_flat(v, f"{prefix}{k}.") if isinstance(v, dict) and v else [(prefix + k, v)])
    ]


def schedule(groups: Path, *overrides: str) -> Schedule:
    found: Schedule = config.load(["method=crossed", *overrides], groups).method.schedule
    return found


def test_a_chosen_schedule_has_the_defaults_of_its_class(crossed: Path) -> None:
    assert schedule(crossed) == DropGrow(every=20, rate=0.5)
    assert schedule(crossed, "schedule=odd") == Odd()
    assert schedule(crossed, "schedule=odd", "schedule.every=3", "method.schedule.word=z") == Odd(
        every=3, word="z"
    )
    assert schedule(crossed, "schedule=drop_grow") == DropGrow(
        every=11
    )  # the file's value; nothing of the method's own


def test_without_a_choice_the_methods_own_schedule_changes(crossed: Path) -> None:
    assert schedule(crossed, "schedule.every=10") == DropGrow(every=10, rate=0.5)
    assert config.load(["method=preset"], crossed).method.schedule == DropGrow(every=20, rate=0.25)
    assert config.load(["method=preset", "schedule.decay=cosine"], crossed).method.schedule == DropGrow(
        20, 0.25, "cosine"
    )
    assert schedule(crossed, "schedule=nameless") == DropGrow(every=12, rate=0.5)


def test_a_chosen_schedule_replaces_that_of_the_methods_file(crossed: Path) -> None:
    assert config.load(["method=named", "schedule.every=3"], crossed).method.schedule == Odd(
        every=3, word="x"
    )
    assert config.load(["method=named", "schedule=odd"], crossed).method.schedule == Odd()
    assert config.load(["method=named", "schedule=static"], crossed).method.schedule.name == "static"


def test_schedules_of_the_users_own(crossed: Path) -> None:
    assert schedule(crossed, "schedule=child", "seed=4") == Odd(every=4)
    assert schedule(crossed, "experiment=slow") == DropGrow(every=50, rate=0.5)
    assert schedule(crossed, "experiment=whole") == Odd(word="y")


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("schedule.word=7", "7"),
        ("schedule.word=1e-3", "1e-3"),
        ("schedule.kind=b", "b"),
        ("schedule.range=[0,2]", [0.0, 2.0]),
        ("schedule.most=3", 3.0),
        ("schedule.most=null", None),
        ("schedule.every=${seed}", 4),
    ],
)
def test_values_of_a_schedule(crossed: Path, override: str, value: object) -> None:
    shown, origin = config.tree(["method=crossed", "schedule=odd", "seed=4", override], crossed)[
        "method." + override.partition("=")[0]
    ]
    assert shown == value
    assert type(shown) is type(value)
    assert origin == "command line"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["method=lora", "schedule=drop_grow"],
            r"schedule=drop_grow is not a setting of method=lora, which has no schedule. "
            r"Leave it out, or .* method",
        ),
        (
            ["method=lora", "schedule=drop_grow", "schedule.every=3"],
            "schedule=drop_grow is not a setting of method=lora, which has no schedule",
        ),
        (
            ["method=lora", "schedule.every=3"],
            r"method.schedule.every=3 \(command line\) is not a setting of method=lora, "
            r"which has no schedule",
        ),
        (["method=lora", "method.schedule=x"], "method.schedule='x' .* method=lora, which has no schedule"),
        (
            ["method=lora", "method.score=snip"],
            r"method.score='snip' \(command line\) is not a setting of method=lora, which has no score. "
            "Leave it out, or choose a method that has one",
        ),
        (
            ["method=crossed", "schedule=drop_gow"],
            r"schedule=drop_gow is not an option .*Did you mean 'drop_grow'\? Options: .*static",
        ),
        (["method=crossed", "schedule=drop_gow", "schedule.nope=3"], "schedule=drop_gow is not an option"),
        (
            ["method=crossed", "schedule.evry=3"],
            r"method.schedule.evry=3 \(command line\) is not a setting of schedule=drop_grow. "
            r".* 'method.schedule.every'",
        ),
        (
            ["method=crossed", "schedule=static", "schedule.every=3"],
            r"every=3 \(command line\) is not a setting of schedule=static. It has none.",
        ),
        (
            ["method=crossed", "schedule=odd", "schedule.rate=3"],
            "is not a setting of schedule=odd. .*method.schedule.range",
        ),
        (
            ["method=crossed", "schedule.every=0"],
            r"method.schedule.every=0 \(command line\) should be greater than or equal to 1",
        ),
        (
            ["method=crossed", "schedule.every=1.5"],
            r"method.schedule.every=1.5 \(command line\) should be a valid integer",
        ),
        (["method=crossed", "schedule.decay=cosin"], "'linear', 'cosine' or 'constant'"),
        (["method=crossed", "schedule=odd", "schedule.range=[1]"], "too few entries"),
        (
            ["method=crossed", "schedule=odd", "schedule.range=[0,x]"],
            r"method.schedule.range.1='x' \(command line\) should be a valid number",
        ),
        (
            ["method=crossed", "schedule=odd", "schedule.range=[2,1]"],
            "schedule=odd: method.schedule.range runs backwards",
        ),
        (
            ["method=crossed", "method.schedule=odd"],
            r"method.schedule should be a mapping of settings, not 'odd' \(command line\). .*schedule=OPTION",
        ),
        (["method=crossed", "schedule=null"], "exactly one option"),
        (["method=crossed", "schedule=static,odd"], "finetune sweep schedule=static,odd"),
        (
            ["method=crossed", "schedule.name=odd"],
            "schedule.name=odd: the name follows from the choice; write schedule=OPTION",
        ),
        (["method=crossed", "method.schedule.name=odd"], "write schedule=OPTION"),
        (["method=crossed", "schedule.every=1", "method.schedule.every=1"], "set the same thing"),
        (["method=crossed", "schedule=strange"], r"schedule=strange is not known.*schedule/strange.yaml:1\)"),
        (["method=bare"], "method.schedule is not set. Add schedule=OPTION"),
        (["method=bare", "schedule.every=3"], "method.schedule.name is not set"),
        (
            ["method=crossed", "schedule.every=200"],
            "schedule.every=200 is not below the run's 200 steps",
        ),
        (["method=crossed", "schedul.every=2"], r"schedul.every=2 .*is not a setting"),
        (["method=crossed", "scheduler=static"], "is not a setting"),
        (["method=crossed", "train.every=3"], r"Did you mean 'train.\w*_every'\?"),
        (["selector=its"], r"Did you mean 'ist'\?"),
        (
            ["selector=ist", "selector.probs=3"],
            r"selector.probs=3 \(command line\) is not a setting of selector=ist. "
            r"Did you mean 'selector.probes'\?",
        ),
        (["selector=ist", "train.steps=10"], "selector.every=10"),
        (["selector.trained=0.5"], "selector.trained=0.5 .* is not a setting of selector=none. It has none."),
        (["selector.name=ist"], "write selector=OPTION"),
    ],
)
def test_one_fault_of_a_nested_choice(crossed: Path, overrides: list[str], words: str) -> None:
    said = fault(*overrides, config_dir=crossed)
    assert re.search(words, said), said


def test_nested_faults_come_with_all_others(crossed: Path) -> None:
    found = faults(
        "method=crossed", "schedule.every=0", "schedule.x=1", "method.rnk=1", "seed=-1", config_dir=crossed
    )
    assert [said.split(" ")[0] for said in found] == [
        "seed=-1",
        "method.rnk=1",
        "method.schedule.every=0",
        "method.schedule.x=1",
    ]


def test_what_cannot_mean_anything_is_asked_last(crossed: Path) -> None:
    """A period above the run's length shows only where nothing else is wrong."""
    assert "train.steps=0" in fault("method=crossed", "train.steps=0", config_dir=crossed)


def test_a_schedules_values_say_where_they_came_from(crossed: Path) -> None:
    def origins(*overrides: str) -> dict[str, str]:
        leaves = config.tree(list(overrides), crossed)
        return {
            key.removeprefix("method.schedule."): origin
            for key, (_, origin) in leaves.items()
            if key.startswith("method.schedule.")
        }

    here = next(
        n
        for n, line in enumerate(Path(__file__).read_text().splitlines(), 1)
        if "DropGrow(every=20, rate=0.5)" in line
    )
    own = origins("method=crossed", "schedule.decay=cosine")
    assert own["name"] == own["every"] == own["rate"] == f"default in {__file__}:{here}"
    assert own["decay"] == "command line"
    assert own["dropped"].startswith("default in finetune/schedules/drop_grow.py:")
    chosen = origins("method=crossed", "schedule=drop_grow")
    assert (chosen["name"], chosen["every"]) == (
        f"{crossed}/schedule/drop_grow.yaml:1",
        f"{crossed}/schedule/drop_grow.yaml:2",
    )
    assert chosen["rate"].startswith("default in finetune/schedules/drop_grow.py:")
    preset = origins("method=preset")
    assert preset["rate"] == f"{crossed}/method/preset.yaml:3"
    assert preset["every"] == own["every"]
    replaced = origins("method=named", "schedule=static")
    assert set(replaced) == {"name"}
    assert replaced["name"] == "conf/schedule/static.yaml:1"


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["schedule.every=3"],
        ["schedule=odd", "schedule.range=[0,3]", "schedule.word=7"],
        ["schedule=static"],
        ["schedule=cubic"],
        ["selector=ist"],
        ["selector=rst"],
    ],
)
def test_frozen_nested_choices_come_back(
    crossed: Path, tmp_path: Path, overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The defaults of classes and files may have changed since."""
    made = config.load(["method=crossed", "name=n", *overrides], crossed)
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(made.as_dict(), sort_keys=False))
    assert config.load([], config_file=file) == made
    assert made.as_dict()["method"]["schedule"]["name"] == made.method.schedule.name
    monkeypatch.setattr(Crossed.__dataclass_fields__["schedule"], "default", Odd(word="later"))
    again = config.load([], config_file=file)
    assert again == made
    assert again.hash() == made.hash()


def test_a_frozen_configuration_takes_values_but_no_schedule(crossed: Path, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(
        yaml.safe_dump(config.load(["method=crossed", "schedule=odd"], crossed).as_dict(), sort_keys=False)
    )
    assert config.load(["schedule.every=4"], config_file=file).method.schedule == Odd(every=4)
    assert "cannot be combined with --config" in fault("schedule=static", config_file=file)
    assert re.search(
        rf"method.schedule.every='x' \({file}:\d+\)", broken := fault_after(file, "every: 7", "every: x")
    ), broken


def fault_after(file: Path, old: str, new: str) -> str:
    file.write_text(file.read_text().replace(old, new))
    return fault(config_file=file)


def test_a_frozen_configuration_of_before_selectors_has_none(frozen: Path) -> None:
    tree = yaml.safe_load(frozen.read_text())
    del tree["selector"]
    frozen.write_text(yaml.safe_dump(tree))
    assert config.load([], config_file=frozen).selector.name == "none"


def test_schedules_have_different_hashes(crossed: Path) -> None:
    made = [["schedule=static"], ["schedule=odd"], ["schedule=odd", "schedule.every=8"], []]
    assert len({config.load(["method=crossed", *o], crossed).hash() for o in made}) == len(made)


def test_sweeps_over_schedules(crossed: Path) -> None:
    points = sweep.list_points(["method=crossed", "schedule.every=10,20"], crossed)
    assert [point.config.method.schedule.every for point in points] == [10, 20]
    assert [point.label for point in points] == ["method.schedule.every=10", "method.schedule.every=20"]
    points = sweep.list_points(["method=crossed", "schedule=static,odd"], crossed)
    assert [point.config.method.schedule.name for point in points] == ["static", "odd"]
    with pytest.raises(
        ConfigError,
        match=r"every=1 .* of schedule=static. It has none. \(at schedule=static method.schedule.every=1\)",
    ):
        sweep.list_points(["method=crossed", "schedule=static,odd", "schedule.every=1,2"], crossed)


def test_expand() -> None:
    points = config.expand(["method=lora,snell", "seed=range(0,2)", "model.path=/a/x=1", "train.steps=3"])
    rest = ["model.path=/a/x=1", "train.steps=3"]
    assert points == [[f"method={m}", f"seed={s}", *rest] for m in ("lora", "snell") for s in (0, 1)]
    assert config.expand([]) == [[]]


def test_expand_knows_options_and_lists() -> None:
    assert ["method=snell"] in config.expand(["method=glob(*)"])
    assert config.expand(["method.targets=[q,v],[k]"]) == [["method.targets=[q,v]"], ["method.targets=[k]"]]
    assert config.expand(["name='a,b'"]) == [["name='a,b'"]]


def test_expand_refuses_what_it_cannot_enumerate() -> None:
    with pytest.raises(ConfigError, match="only a search chooses from an interval"):
        config.expand(["seed=interval(0,1)"])
    with pytest.raises(ConfigError, match="--x"):
        config.expand(["--x"])


def test_a_sweep_of_a_sweep_is_refused() -> None:
    with pytest.raises(ConfigError, match="weights=choice"):
        config.expand(["weights=choice(a,b),1e-3"])
