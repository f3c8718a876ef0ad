"""Write the generated pages of the documentation as Markdown: one for each method, the settings, the
interfaces.

``doc_hook.py`` hands these pages to MkDocs. ``python scripts/doc_pages.py NAME`` prints the page of one
method, and lists on standard error what its file does not say yet.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import re
import sys
from dataclasses import dataclass, field

import yaml
from doc_source import (
    LABELS,
    OPTIONS,
    ROOT,
    Definition,
    Option,
    class_chain,
    find_definition,
    group_options,
    module_file,
    parse_module,
    public_definitions,
    read_options,
    split_docstring,
)

from finetune.registry import KINDS, Entry, Kind, catalog

HEADINGS = {
    "Formula": "Formula",
    "Paper": "Paper",
    "Reading": "Reading taken",
    "Rate": "Learning rate",
    "Differs": "Where the released code differs",
    "Cost": "Cost",
}
SECTIONS = {"train": "TrainConfig", "logger": "LoggerConfig"}
API: dict[str, tuple[str, list[str]]] = {
    "python": ("The Python front door", ["api"]),
    "methods": (
        "What a method is",
        ["core.method", "core.run", "core.site", "core.roles", "core.anatomy", "registry"],
    ),
    "parts": (
        "What a method attaches",
        [
            "core.part_base",
            "core.part",
            "core.edit",
            "core.layer",
            "core.attach",
            "core.changes",
            "core.state",
            "core.inplace",
            "core.lowrank",
        ],
    ),
    "sparse": (
        "The sparse engine",
        [
            "core.sparse.settings",
            "core.sparse.engine",
            "core.sparse.bank",
            "core.sparse.scores",
            "core.sparse.schedule",
        ],
    ),
    "kinds": ("Base classes of the other kinds", []),  # filled below
    "distillation": ("What an objective with a teacher is", ["core.distillation"]),
    "training": ("The training loop", ["training.session", "training.phases", "training.run"]),
    "testing": (
        "Checks for methods and other kinds",
        [
            "testing.contract",
            "testing.objectives",
            "testing.optimizers",
            "testing.sessions",
            "testing.cases",
            "testing.ranks",
            "testing.analyses",
            "testing.passes",
            "testing.structures",
        ],
    ),
    "errors": ("Errors", ["errors"]),
}
_listed = {module for _, modules in API.values() for module in modules}
for _kind in KINDS.values():
    _module = _kind.base.rpartition(".")[0].removeprefix("finetune.")
    if _kind.folders and _module not in _listed:
        API["kinds"][1].append(_module)


@dataclass
class MethodFile:
    """What the file of one method says, read from its source."""

    entry: Entry
    found: Definition
    facts: dict[str, object]
    options: list[Option]
    missing: list[str] = field(default_factory=list)


def read_method(entry: Entry) -> MethodFile:
    """Read a method's class, its facts and its options, and note what its file does not say."""
    found = find_class(entry.module, str(entry.facts["class"]))
    facts: dict[str, object] = {}
    for definition in reversed(class_chain(found)):
        facts |= read_class_variables(definition.node)
    method = MethodFile(entry, found, facts, read_options(found))
    sections = split_docstring(read_module_doc(entry.module), LABELS)
    required = {"title": sections.title, "family": facts.get("family"), "trains": facts.get("trains")}
    required |= {label: sections.labelled.get(label) for label in LABELS}
    required |= {f"option {option.name}": option.meaning for option in method.options}
    method.missing = [name for name, text in required.items() if not text]
    return method


def read_class_variables(node: ast.AST) -> dict[str, object]:
    """Return the values of the ``ClassVar`` lines of a class, where they are literals."""
    values: dict[str, object] = {}
    for line in ast.iter_child_nodes(node):
        if isinstance(line, ast.AnnAssign) and line.value and "ClassVar" in ast.unparse(line.annotation):
            try:
                values[ast.unparse(line.target)] = ast.literal_eval(line.value)
            except ValueError:
                continue
    return values


def read_module_doc(module: str) -> str:
    """Return the docstring of a module, or an empty text."""
    return ast.get_docstring(parse_module(module)) or ""


def write_method_page(entry: Entry) -> str:
    """Write the page of one method."""
    method = read_method(entry)
    sections = split_docstring(read_module_doc(entry.module), LABELS)
    name, _, about = sections.title.partition(": ")
    first = about or sections.title
    lines = [f"# {name if about else entry.name}", "", to_markdown(first[:1].upper() + first[1:]), ""]
    lines += [f"| method | `{entry.name}` |", "|---|---|"]
    lines += [f"| {key} | {value} |" for key, value in list_method_facts(method)]
    lines += ["", to_markdown(sections.text), ""]
    for label in LABELS:
        if label == "Paper":
            lines += [
                "## Options",
                "",
                *write_options_table(method.options, "method."),
                *show_defaults_files(entry.name),
            ]
        text = to_markdown(sections.labelled.get(label, "Not described yet."))
        text = re.sub(r"^none\b", "None", text)
        lines += [f"## {HEADINGS[label]}", "", link_papers(text), ""]
        if label == "Rate":
            lines += list_own_rates(entry.name)
    return "\n".join(lines)


def list_own_rates(name: str) -> list[str]:
    """Return, for each YAML file that selects a method, a line with the learning rate that it sets."""
    lines: list[str] = []
    for option in group_options("method", name):
        settings = yaml.safe_load((ROOT / "conf" / "method" / f"{option}.yaml").read_text(encoding="utf-8"))
        rate = settings.get("optimizer", {}).get("lr")
        said = "leaves it at the optimizer's default" if rate is None else f"sets {rate:g}"
        lines.append(f"- Here: `method={option}` {said}.")
    return [*lines, ""]


def list_method_facts(method: MethodFile) -> list[tuple[str, str]]:
    """Return the rows of the table at the top of a method's page."""
    facts = method.facts
    rows = [
        ("use", f"`finetune train method={method.entry.name}`"),
        ("trains", to_markdown(str(facts.get("trains", "")))),
        ("family", str(facts.get("family", ""))),
    ]
    if facts.get("paper"):
        rows.append(("paper", link_papers(str(facts["paper"]))))
    size = facts.get("size")
    rows.append(("size", f"set by `method.{size}`, and by `budget=` in a sweep" if size else "fixed"))
    if facts.get("neutral_start") is False:
        rows.append(("at step 0", "the output differs from that of the base model"))
    else:
        rows.append(("at step 0", "the output is that of the base model"))
    if facts.get("mergeable") is False:
        rows.append(("merge", "refused: no plain weight can hold the change"))
    else:
        rows.append(("merge", "`finetune merge` writes a plain Hugging Face folder"))
    rows.append(("source", f"`{module_file(method.entry.module).relative_to(ROOT)}`"))
    return rows


def show_defaults_files(name: str) -> list[str]:
    """Show each YAML file that selects a method, if it sets more than the name."""
    lines: list[str] = []
    for option in group_options("method", name):
        file = ROOT / "conf" / "method" / f"{option}.yaml"
        text = file.read_text(encoding="utf-8").strip()
        if text == f"name: {name}":
            continue
        lines += [
            f"`method={option}` reads `conf/method/{option}.yaml`, which also sets:",
            "",
            "```yaml",
            text,
            "```",
            "",
        ]
    return lines


def write_options_table(options: list[Option], prefix: str) -> list[str]:
    """Write options as the lines of a table; ``prefix`` stands before each name."""
    if not options:
        return ["There are no options.", ""]
    columns = ["option", "default", "values", "meaning"]
    if not any(option.meaning for option in options):
        columns.pop()
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for option in options:
        default = f"`{option.default}`" if option.default else "required"
        cells = [f"`{prefix}{option.name}`", default, option.values, to_markdown(option.meaning)]
        cells = cells[: len(columns)]
        lines.append("| " + " | ".join(re.sub(r"(?<!\\)\|", r"\|", cell) for cell in cells) + " |")
    return [*lines, ""]


def group_methods_by_family() -> dict[str, list[str]]:
    """Return the names of the methods of each family; families and names in alphabetical order."""
    families: dict[str, list[str]] = {}
    for name, entry in catalog("method").items():
        family = str(read_method(entry).facts.get("family", "other"))
        families.setdefault(family.capitalize(), []).append(name)
    return dict(sorted(families.items()))


def write_methods_page() -> str:
    """Write the list of all methods, by family."""
    lines = [
        "# Methods",
        "",
        "`finetune methods` prints this list. Each page is made from the file of its method.",
        "",
    ]
    for family, names in group_methods_by_family().items():
        lines += [f"## {family}", "", "| method | trains | paper |", "|---|---|---|"]
        for name in names:
            facts = read_method(catalog("method")[name]).facts
            trains = to_markdown(str(facts.get("trains", "")))
            lines.append(f"| [{name}]({name}.md) | {trains} | {link_papers(str(facts.get('paper', '')))} |")
        lines.append("")
    return "\n".join(lines)


def write_settings_page() -> str:
    """Write every setting that does not belong to a method, with its default and its values."""
    kinds = [kind for kind in KINDS.values() if kind.place and kind.name != "method"]
    groups = ["method", "train", "logger", *(kind.name for kind in kinds if not kind.is_value)]
    choosing = ", ".join(f"`{name}=`" for name in groups)
    lines = [
        "# Settings",
        "",
        "Every setting is written `key=value`. `finetune show` prints all of them, each with the file or the",
        f"word on the command line that set it. {choosing} choose a file of `conf/`, which can set several",
        "values at once. The settings of a method are on [its page](../methods/index.md).",
        "",
    ]
    for section, name in SECTIONS.items():
        found = find_class("finetune.config.settings", name)
        lines += [f"## `{section}`", "", *write_settings_section(found, f"{section}.")]
    for kind in kinds:
        lines += write_kind_settings(kind)
    return "\n".join(lines)


def write_kind_settings(kind: Kind) -> list[str]:
    """Write what can be chosen of one kind, and the settings of each choice."""
    lines = [f"## `{kind.place if kind.is_value else kind.name}`", ""]
    if kind.is_value:
        lines += [f"`{kind.place}=NAME` takes one of these names.", "", "| name | meaning |", "|---|---|"]
        for entry in catalog(kind.name).values():
            lines.append(f"| `{entry.name}` | {to_markdown(entry.doc)} |")
        return [*lines, ""]
    if not kind.folders:
        module, _, name = kind.base.rpartition(".")
        return [*lines, *write_settings_section(find_class(module, name), f"{kind.name}.")]
    for entry in catalog(kind.name).values():
        title = ", ".join(f"`{kind.name}={option}`" for option in group_options(kind.name, entry.name))
        lines += [f"### {title}", ""]
        lines += write_settings_section(find_class(entry.module, str(entry.facts["class"])), f"{kind.name}.")
    return lines


def find_class(module: str, name: str) -> Definition:
    """Return the class ``name`` of ``module``. Raise ``LookupError`` if there is none."""
    target = find_definition(module, name)
    if target is None or not isinstance(target[1], ast.ClassDef):
        raise LookupError(f"{module} has no class {name}")
    return Definition(target[0], target[1])


def write_settings_section(found: Definition, prefix: str) -> list[str]:
    """Write what a settings class says of itself, and its options."""
    sections = split_docstring(found.doc, (OPTIONS,))
    text = "\n".join([sections.title, sections.text])
    options = [option for option in read_options(found) if option.name != "name"]  # `model=hf` sets the name
    return [to_markdown(text), "", *write_options_table(options, prefix)]


def write_api_page(title: str, modules: list[str]) -> str:
    """Write the public classes and functions of some modules, each with its signature and docstring."""
    lines = [f"# {title}", ""]
    for name in modules:
        module = f"finetune.{name}"
        lines += [f"## `{module}`", "", to_markdown(read_module_doc(module)), ""]
        for found in public_definitions(module):
            lines += describe_definition(found, "###")
            if isinstance(found.node, ast.ClassDef):
                for node in found.node.body:
                    if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                        lines += describe_definition(Definition(module, node), "####")
    return "\n".join(lines)


def describe_definition(found: Definition, level: str) -> list[str]:
    """Write the heading, the signature and the docstring of a class or a function."""
    node = found.node
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        signature = f"class {node.name}({bases})" if bases else f"class {node.name}"
        fields = [ast.unparse(line) for line in node.body if isinstance(line, ast.AnnAssign)]
        body = "\n".join([signature, *(f"    {line}" for line in fields)])
    else:
        returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
        body = f"def {node.name}({ast.unparse(node.args)}){returns}"
    return [f"{level} {node.name}", "", "```python", body, "```", "", to_markdown(found.doc), ""]


def to_markdown(text: str) -> str:
    """Turn a docstring into Markdown: names in double backticks become code, indented lines a code block."""
    lines: list[str] = []
    block: list[str] = []
    for line in [*text.splitlines(), ""]:
        if line.startswith("    ") or (block and not line):
            block.append(line)
            continue
        if block:
            lines += [
                "",
                "```text",
                *inspect.cleandoc("\n" + "\n".join(block)).replace("``", "").splitlines(),
                "```",
                "",
            ]
            block = []
        in_list = bool(lines) and lines[-1].startswith(("- ", "  "))
        starts_or_ends_list = line.startswith("- ") != in_list and not line.startswith("  ")
        if line and lines and lines[-1] and starts_or_ends_list:
            lines.append("")
        lines.append(escape_prose(line))
    if block:
        lines += [
            "",
            "```text",
            *inspect.cleandoc("\n" + "\n".join(block)).replace("``", "").splitlines(),
            "```",
        ]
    return "\n".join(lines).strip("\n")


def escape_prose(line: str) -> str:
    """Escape what Markdown would read as markup, outside of ``code``."""
    parts = re.split(r"``(.+?)``", line)
    for place, part in enumerate(parts):
        if place % 2:
            parts[place] = f"`{part}`"
        else:
            parts[place] = re.sub(r"([*_\[\]#|])", r"\\\1", part).replace("<", "&lt;")
            parts[place] = re.sub(r"(?<!\w)\\\*(\w+)\\\*(?!\w)", r"*\1*", parts[place])  # *emphasis* stays
    return "".join(parts)


def link_papers(text: str) -> str:
    """Turn ``arXiv 2106.09685`` into a link to the paper."""
    return re.sub(r"arXiv (\d{4}\.\d{4,5})", r"[arXiv \1](https://arxiv.org/abs/\1)", text)


def generate_pages() -> dict[str, str]:
    """Return all generated pages: the path below docs/, and the Markdown."""
    pages = {"methods/index.md": write_methods_page(), "reference/settings.md": write_settings_page()}
    for entry in catalog("method").values():
        pages[f"methods/{entry.name}.md"] = write_method_page(entry)
    for name, (title, modules) in API.items():
        pages[f"api/{name}.md"] = write_api_page(title, modules)
    return pages


def main() -> None:
    """Print the pages of the methods named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="+", metavar="NAME", choices=sorted(catalog("method")))
    for name in parser.parse_args().names:
        entry = catalog("method")[name]
        print(write_method_page(entry))
        missing = read_method(entry).missing
        if missing:
            print(f"{name}: not said: {', '.join(missing)}", file=sys.stderr)


if __name__ == "__main__":
    main()
