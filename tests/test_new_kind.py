"""A new kind is one row of ``KINDS``, its base class, its classes, their YAML files and skeletons."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from finetune.config.load import load

from .support.checkout import Checkout

pytestmark = pytest.mark.slow
FROZEN = Path(__file__).parent / "frozen" / "runs"
ROW = 'Kind("goal", "finetune.core.goal.Goal", ("goals",), "goal", absent="task"),'
SURVEY_ROW = 'Kind("survey", "finetune.core.survey.Survey", ("surveys",)),'
BASE = '''"""What a goal is: a frozen dataclass of the settings of the loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Goal:
    """Base of all goals."""

    KIND: ClassVar[str] = "goal"
    name: ClassVar[str]

    def faults(self, steps: int) -> list[str]:
        """Return why the settings make no sense in a run of ``steps`` steps, one sentence for each fault."""
        return []
'''
CLASS = '''"""A goal."""

from __future__ import annotations

from dataclasses import dataclass

from {package}core.goal import Goal
from {package}registry import register


@register("{name}")
@dataclass(frozen=True)
class {cls}(Goal):
    """The goal {name}.{options}"""
'''
OPTIONS = """

    Options:
        every: Steps from one use to the next.
    """
DISTILL = '''
    every: int = 1

    def faults(self, steps: int) -> list[str]:
        """Return a fault for a goal that is never used."""
        return [f"goal.every={self.every} is more than train.steps={steps}."] if self.every > steps else []
'''
TEST = '''"""The goals."""

from finetune.config.load import load


def test_goals() -> None:
    assert load(["goal=task"]).section("goal").name == "task"
    assert load(["goal=distill", "goal.every=3"]).section("goal").every == 3
'''
SKELETON_TEST = '''"""Try the goal $name."""

from __future__ import annotations

${first_imports}${import_plugins}${import_cls}
${define_cls}
def test_name() -> None:
    assert $cls.name == "$name"
'''
SURVEY_TEST = '''"""The surveys."""

from finetune.surveys.count import Count


def test_surveys() -> None:
    assert Count.name == "count"
'''
SMALL = ["method=bitfit", "train.steps=2", "train.eval_every=null", "train.device=cpu", "train.threads=1"]
SCRIPT = """
import json, sys
from pathlib import Path
from finetune.config.load import load
from finetune.sweep import list_points
small = sys.argv[2:]
hashes = []
for words in (["method=lora"], ["method=lora", "goal=task"], ["method=lora", "goal=distill"]):
    hashes.append(load(words).hash())
hashes.append(load([], None, Path(sys.argv[1])).hash())
choices = [point.label for point in list_points([*small, "goal=task,distill"])]
values = [point.label for point in list_points([*small, "goal=distill", "goal.every=1,2"])]
print(json.dumps([hashes, choices, values]))
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """A copy of this checkout with two more kinds; no file but the table is edited.

    ``goal`` has a section of its own, and ``survey`` is not part of a run's configuration.
    """
    made = Checkout(tmp_path_factory.mktemp("kind"))
    table = made.folder / "finetune/registry.py"
    before = table.read_text(encoding="utf-8")
    last = '        Kind("sweep"),\n'
    assert last in before
    table.write_text(before.replace(last, f"        {ROW}\n        {SURVEY_ROW}\n{last}"), encoding="utf-8")
    made.write("finetune/core/goal.py", BASE)
    made.write("finetune/goals/__init__.py", "")
    made.write("finetune/goals/task.py", CLASS.format(package="..", name="task", cls="Task", options=""))
    distill = CLASS.format(package="..", name="distill", cls="Distill", options=OPTIONS) + DISTILL
    made.write("finetune/goals/distill.py", distill)
    for name in ("task", "distill"):
        made.write(f"conf/goal/{name}.yaml", f"name: {name}\n")
    skeletons = "finetune/testing/skeletons"
    skeleton = CLASS.format(package="finetune.", name="$name", cls="$cls", options="")
    made.write(f"{skeletons}/goal.py.txt", skeleton)
    made.write(f"{skeletons}/goal.yaml.txt", "name: $name\n")
    made.write(f"{skeletons}/goal.test.txt", SKELETON_TEST)
    made.write("tests/goals/test_goals.py", TEST)
    count = CLASS.format(package="..", name="count", cls="Count", options="")
    made.write("finetune/core/survey.py", make_survey(BASE))
    made.write("finetune/surveys/__init__.py", "")
    made.write("finetune/surveys/count.py", make_survey(count))
    made.write(f"{skeletons}/survey.py.txt", make_survey(skeleton))
    made.write("conf/survey/count.yaml", "name: count\n")
    made.write(f"{skeletons}/survey.yaml.txt", "name: $name\n")
    made.write(f"{skeletons}/survey.test.txt", make_survey(SKELETON_TEST))
    made.write("tests/surveys/test_surveys.py", SURVEY_TEST)
    return made


def make_survey(text: str) -> str:
    """Return a text about goals as one about surveys."""
    return text.replace("goal", "survey").replace("Goal", "Survey")


def test_a_configuration_has_the_section(checkout: Checkout) -> None:
    """An absent section changes no hash; a choice does. A sweep reads the section as any other."""
    assert 'goal.name: "task"' in checkout.python("-m", "finetune", "show")
    frozen = FROZEN / "spiel/config.yaml"
    hashes, choices, values = json.loads(checkout.python("-c", SCRIPT, str(frozen), *SMALL))
    expected = load(["method=lora"]).hash()
    assert hashes[:2] == [expected, expected]
    assert hashes[2] != expected
    assert hashes[3] == load([], None, frozen).hash()
    assert choices == ["goal=task", "goal=distill"]
    assert values == ["goal.every=1", "goal.every=2"]


def test_faults_name_the_section(checkout: Checkout) -> None:
    for words, message in {
        ("goal=distil",): "goal=distil is not an option (command line). Did you mean 'distill'? "
        "Options: distill, task.",
        ("goal=distill", "goal.evry=2"): "goal.evry=2 (command line) is not a setting of goal=distill. "
        "Did you mean 'goal.every'?",
        ("goal.every=2",): "goal.every=2 (command line) is not a setting of goal=task. It has none.",
        ("goal=distill", "goal.every=3", "train.steps=2"): "goal.every=3 is more than train.steps=2.",
        ("goal.name=distill",): "goal.name=distill: the name follows from the choice; write goal=OPTION.",
    }.items():
        assert checkout.refuse("show", *words) == f"Error: {message}\n"


def test_a_run_keeps_the_section_and_the_comparison_repeats_it(checkout: Checkout) -> None:
    words = [*SMALL, "goal=distill", "goal.every=2", "name=n", "run=r"]
    checkout.python("-m", "finetune", "train", "--json", *words)
    text = (checkout.folder / "outputs/n/r/config.yaml").read_text()
    assert "goal:\n  name: distill\n  every: 2\n" in text
    (row,) = json.loads(checkout.python("-m", "finetune", "compare", "outputs/n", "--json"))["rows"]
    assert " goal=distill " in row["command"]
    assert " goal.every=2" in row["command"]
    assert "goal.name" not in row["command"]


def test_the_skeleton_of_the_kind(checkout: Checkout, tmp_path: Path) -> None:
    assert "one of: method, schedule, score, " in checkout.python("scripts/new.py", "--help")
    checkout.python("scripts/new.py", "goal", "mine")
    assert 'goal.name: "mine"' in checkout.python("-m", "finetune", "show", "goal=mine")
    plugin = ["--plugins", str(tmp_path / "plug")]
    checkout.python("scripts/new.py", "goal", "theirs", *plugin)
    assert 'goal.name: "theirs"' in checkout.python("-m", "finetune", "show", *plugin, "goal=theirs")
    checkout.python("scripts/new.py", "survey", "ours")
    assert (checkout.folder / "conf/survey/ours.yaml").is_file()
    own = ["tests/goals/test_mine.py", "tests/surveys/test_ours.py", str(tmp_path / "plug")]
    checkout.python("-m", "pytest", "-q", "-p", "no:cacheprovider", *own)


def test_the_tests_of_every_kind_take_it_in(checkout: Checkout) -> None:
    about_all = [
        "tests/goals/test_goals.py",
        "tests/surveys/test_surveys.py",
        "tests/test_registry.py",
        "tests/test_imports.py",
        "tests/test_new.py",
        "tests/test_pages.py",
        "tests/config/test_plugins.py::test_a_class_of_every_kind_joins[goal-scratch_goal]",
        "tests/config/test_plugins.py::test_a_class_of_every_kind_joins[survey-scratch_survey]",
        "tests/config/test_plugins.py::test_every_kind_with_classes_is_tried",
        "tests/config/test_groups.py::test_every_group_is_read_by_some_test",
        "tests/config/test_groups.py::test_one_file_of_each_group_makes_a_run[goal]",
    ]
    checkout.python("-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", *about_all)
    checkout.python("-m", "ruff", "check", "finetune")
    checkout.python("-m", "mypy", "finetune")
