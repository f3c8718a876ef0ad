"""The documentation.

Every method has a page, every command line on a page parses, the pictures agree with the code.
"""

from __future__ import annotations

import dataclasses
import importlib
import re
import runpy
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from finetune import registry
from finetune.cli.app import app
from finetune.config.load import expand, load
from finetune.config.passes import read_words
from finetune.sweep import budget, tune
from finetune.sweep.grid import preset
from finetune.sweep.space import space

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
GUIDE = ROOT / "docs" / "adding-a-method.md"  # its example is run by tests/test_docs.py
METHODS = sorted(registry.catalog("method"))

# What the commands that read a finished run accept: keys, and whether a word without a key names a run.
KEYS = {
    "eval": (("ckpt=", "dataset=", "dataset."), False),
    "merge": (("ckpt=", "out="), False),
    "export": (("ckpt=", "format=peft", "out="), False),
    "inspect": (("ckpt=",), True),
    "analyze": (("what=", "what."), True),
    "verify": (("ckpt=",), True),
    "compose": (("out=", "weights=", "head="), True),
}


@pytest.fixture(scope="module")
def pages() -> Iterator[Any]:
    """The module that writes the generated pages."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "scripts"))
        yield importlib.import_module("doc_pages")


@pytest.fixture(scope="module")
def generated(pages: Any) -> dict[str, str]:
    """Every generated page by its path."""
    return pages.generate_pages()


def commands() -> Iterator[tuple[str, str]]:
    """Every command line of the program on the pages, with the name of its page."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        for line in re.findall(r"^ *(finetune [a-z].*)$", text, re.MULTILINE):
            yield page.name, line
        for line in re.findall(r"`(finetune [a-z][^`]*)`", text):
            yield page.name, " ".join(line.split())


def is_template(line: str) -> bool:
    """Tell whether a command line has a gap that a reader fills, or names a method that a page invents."""
    invented = re.findall(r'@register\("(\w+)"\)', GUIDE.read_text(encoding="utf-8"))
    gaps = ["...", "--config ", "--config-dir ", "--plugins ", *(f"method={name}" for name in invented)]
    return any(gap in line for gap in gaps)


def check_command(line: str) -> None:
    """Raise an exception unless the command, its options and its settings exist."""
    words = shlex.split(line, comments=True)[1:]
    group: Any = typer.main.get_command(app)
    if len(words) == 1:  # a sentence speaks of the command
        assert words[0] in group.commands
        return
    context = group.commands[words[0]].make_context(words[0], list(words[1:]))
    given = context.params.get("overrides", context.params.get("words")) or []
    unknown = [word for word in given if word.startswith("-")]
    assert not unknown, f"{words[0]} has no option {unknown}"
    if words[0] in KEYS:
        keys, runs = KEYS[words[0]]
        for word in given:
            assert word.startswith(keys) or (runs and "=" not in word), f"{words[0]} does not take {word}"
    elif words[0] in ("prune", "fold", "compress"):
        faults = read_words(words[0], given).faults
        assert not faults, faults
    elif words[0] in ("train", "show"):
        load(given)
    elif words[0] == "sweep":
        check_sweep(given, context.params)


def check_sweep(given: list[str], options: dict[str, Any]) -> None:
    """Raise an exception unless the settings of a sweep exist."""
    settings: list[str] = []
    launcher: set[str] = set()
    for word in given:
        key, _, value = word.partition("=")
        if key == "sweep":
            preset(value)
        elif key == "budget":
            budget.parse(value)
        elif key == "tune":
            tune.parse(value)
        elif key.startswith("launcher."):
            launcher.add(key.removeprefix("launcher."))
        else:
            settings.append(word)
    if options["launcher"] != "local":
        file = ROOT / "conf" / "launcher" / f"{options['launcher']}.yaml"
        assert launcher <= yaml.safe_load(file.read_text(encoding="utf-8")).keys()
    if options["search"]:
        space(settings, None, None)
        return
    for point in expand(settings):
        load(point)


def test_every_command_line_parses() -> None:
    found = list(dict.fromkeys(commands()))
    assert len(found) > 60
    faults = []
    for page, line in found:
        if is_template(line):
            continue
        try:
            check_command(line)
        except Exception as error:
            faults.append(f"{page}: {line}: {error!r}")
    assert not faults, "\n".join(faults)


def test_a_wrong_command_line_is_found() -> None:
    wrong = [
        "finetune trian",
        "finetune train --dry",
        "finetune train method=loar",
        "finetune train method.rnk=2",
    ]
    wrong += ["finetune merge ckpt=RUN to=DIR", "finetune sweep budget=lots", "finetune compare --by method"]
    for line in wrong:
        with pytest.raises(Exception, match=r".*"):
            check_command(line)


def test_pages_name_targets_and_scripts_that_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for target in re.findall(r"`make ([a-z]+)`|^ *make ([a-z]+) ", text, re.MULTILINE):
            assert f"\n{target[0] or target[1]}:" in makefile, f"{page.name}: make {target}"
        for script in re.findall(r"scripts/\w+\.py", text):
            assert (ROOT / script).is_file(), f"{page.name}: {script}"


def test_links_of_the_readme_lead_somewhere() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#]+)", text)
    assert len(links) > 15
    for link in links:
        assert (ROOT / link).is_file(), link


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_complete_page(pages: Any, generated: dict[str, str], name: str) -> None:
    entry = registry.catalog("method")[name]
    missing = pages.read_method(entry).missing
    assert not missing, f"{entry.module} does not say: {', '.join(missing)}"
    text = generated[f"methods/{name}.md"]
    for heading in (
        "Formula",
        "Options",
        "Paper",
        "Reading taken",
        "Learning rate",
        "Where the released code differs",
        "Cost",
    ):
        assert f"\n## {heading}\n" in text


@pytest.mark.parametrize("name", ["full", "lofit"])
def test_a_page_states_the_published_rate_and_that_of_this_project(
    generated: dict[str, str], name: str
) -> None:
    own = load([f"method={name}"]).optimizer.lr
    rate = generated[f"methods/{name}.md"].partition("\n## Learning rate\n")[2].partition("\n## ")[0]
    published = {"full": "None published", "lofit": "5e-3"}
    assert published[name] in rate
    assert f"Here: `method={name}` sets {own:g}." in rate


@pytest.mark.parametrize("name", METHODS)
def test_the_options_of_a_page_are_those_of_the_class(pages: Any, name: str) -> None:
    cls = registry.get("method", name)
    method = pages.read_method(registry.catalog("method")[name])
    shown = {option.name: option.default for option in method.options}
    assert list(shown) == [field.name for field in dataclasses.fields(cls)]
    for option, value in shown.items():
        default = getattr(cls(), option)
        if dataclasses.is_dataclass(default):
            assert value.split()[0] == type(default).name
        elif isinstance(default, float):
            assert float(value) == pytest.approx(default)
        elif default is None or isinstance(default, bool):
            assert value == {None: "null", True: "true", False: "false"}[default]
        elif isinstance(default, int | str):
            assert value == str(default)


def test_a_page_says_what_its_file_leaves_out(
    pages: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "finetune" / "methods"
    folder.mkdir(parents=True)
    source = [
        '"""Row: scale rows.',
        "",
        "Formula:",
        "    y = (1 + s) x",
        "",
        "Paper: none.",
        '"""',
        "",
        "@dataclass(frozen=True)",
        "class Row:",
        '    """Row: scale rows.',
        "",
        "    Options:",
        "        rate: How fast.",
        '    """',
        "",
        "    rate: Annotated[float, Gt(0)] = 1e-3",
        "    every: int = 5",
        "    family: ClassVar[str] = 'a family'",
    ]
    (folder / "row.py").write_text("\n".join(source) + "\n")
    source_module = importlib.import_module("doc_source")
    monkeypatch.setattr(source_module, "ROOT", tmp_path)
    source_module.parse_module.cache_clear()
    try:
        method = pages.read_method(registry.Entry("row", "finetune.methods.row", "", {"class": "Row"}))
    finally:
        source_module.parse_module.cache_clear()
    assert method.missing == ["trains", "Reading", "Rate", "Differs", "Cost", "option every"]
    (rate, every) = method.options
    assert (rate.default, rate.values, rate.meaning) == ("0.001", "number, above 0", "How fast.")
    assert (every.default, every.values) == ("5", "whole number")


def test_the_settings_page_has_every_setting(generated: dict[str, str]) -> None:
    text = generated["reference/settings.md"]
    for section in ("model", "optimizer", "train", "logger"):
        for field in dataclasses.fields(type(getattr(load([]), section))):
            assert field.name == "name" or f"| `{section}.{field.name}` |" in text
    for kind in registry.KINDS.values():
        if kind.place and kind.name != "method":
            for name in registry.catalog(kind.name):
                option = "cubic" if name == "ramp" else name  # conf/schedule/cubic.yaml chooses the class
                assert f"| `{name}` |" in text or f"`{kind.name}={option}`" in text


def test_every_setting_says_what_it_means(generated: dict[str, str]) -> None:
    text = generated["reference/settings.md"]
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert len(rows) > 60
    silent = [row for row in rows if not re.split(r"(?<!\\)\|", row)[-2].strip()]
    silent += re.findall(r"### (.*)\n(?:.*\n)+?\| option \| default \| values \|\n", text)
    assert not silent


def test_prose_of_a_docstring_is_not_read_as_markup(pages: Any) -> None:
    doc = "A *part* of a * b, x_i [out, in]\n    K = a * b\n- one\n  more\n- ``a * b``\nEnd."
    shown = [r"A *part* of a \* b, x\_i \[out, in\]", "", "```text", "K = a * b", "```", ""]
    shown += ["- one", "  more", "- `a * b`", "", "End."]
    assert pages.to_markdown(doc).splitlines() == shown


def test_a_cell_of_a_table_keeps_its_bars(pages: Any) -> None:
    option = pages.Option("t", "0.5", "number", "Keeps |K| > ``t``.")
    assert (
        pages.write_options_table([option], "method.")[2]
        == r"| `method.t` | `0.5` | number | Keeps \|K\| > `t`. |"
    )


def test_interfaces_are_described(pages: Any, generated: dict[str, str]) -> None:
    for name, (title, _) in pages.API.items():
        text = generated[f"api/{name}.md"]
        assert text.startswith(f"# {title}\n")
        assert "```python\n" in text


def test_the_picture_of_the_architecture_agrees_with_the_import_rule() -> None:
    """A new kind's folder, which has no row in the rule, need not be drawn."""
    imports = runpy.run_path(str(ROOT / "tests" / "test_imports.py"))
    rule = imports["ALLOWED"]
    layers = runpy.run_path(str(ROOT / "scripts" / "pictures.py"))["LAYERS"]
    order = [name for _, boxes in layers for name in boxes]
    drawn = {name for name in rule if not name.startswith("__") and name != "api"}
    assert {*order, *imports["WITHOUT_A_ROW"]} == drawn
    for name in order:
        for target in rule[name] & set(order) - {name}:
            assert order.index(name) < order.index(target), (
                f"{name} imports {target}, which is drawn above it"
            )


def test_pictures_are_up_to_date_and_small() -> None:
    pictures = runpy.run_path(str(ROOT / "scripts" / "pictures.py"))
    images = ROOT / "docs" / "images"
    assert (images / "architecture.svg").read_text(encoding="utf-8") == pictures["draw_architecture"]()
    for file in images.iterdir():
        assert file.stat().st_size < 200_000, file
