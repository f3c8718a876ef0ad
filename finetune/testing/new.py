"""Write the skeleton of a new class, or of a new YAML file, of one kind.

    python -m finetune.testing.new KIND NAME                  into this checkout
    python -m finetune.testing.new KIND NAME --plugins DIR    into a folder of plug-ins

The code works and passes its test as it stands; what has to be replaced is marked TODO. No other file
changes.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from string import Template

from ..errors import ConfigError, suggest_nearest
from ..registry import KINDS, ROOT, Kind, catalog
from ..system.exit_code import exit_code_of

SKELETONS = Path(__file__).parent / "skeletons"
DEFAULT_FAMILY = "reparam"


def kinds_with_skeletons() -> list[str]:
    """Return the kinds that have at least one file in ``skeletons``, in the order of the table."""
    return [kind for kind in KINDS if list(SKELETONS.glob(f"{kind}.*"))]


def families(kind: Kind) -> list[str]:
    """Return the folders inside the folder of a kind; none if its modules lie directly in that folder."""
    if not kind.folders:
        return []
    found = []
    for file in sorted((ROOT / kind.folders[0]).glob("*/__init__.py")):
        found.append(file.parent.name)
    return found


def files_of(kind: Kind, name: str, family: str, folder: Path | None) -> dict[Path, str]:
    """Return the text of each file of the skeleton by path: in ``folder``, or else in this checkout."""
    if folder is None:
        places, texts = _places_in_checkout(kind, name, family), _texts_in_checkout(kind, name, family)
    else:
        places, texts = _places_in_plugin(kind, name, folder), _texts_in_plugin(kind, name)
    found = {}
    for part, place in places.items():
        skeleton = SKELETONS / f"{kind.name}.{part}.txt"
        if not skeleton.exists():
            continue  # some kinds have no YAML file, and others only a YAML file
        text = Template(skeleton.read_text(encoding="utf-8")).substitute(
            name=name, cls=_class_name(name), **texts
        )
        depth = len(place.relative_to(ROOT.parent).parts) - 1 if folder is None and part == "py" else 0
        found[place] = text.replace("from finetune.", f"from {'.' * depth}") if depth else text
    return found


def _class_name(name: str) -> str:
    return "".join(word.capitalize() for word in name.split("_"))


def _module(kind: Kind, name: str, family: str) -> str:
    """Return the module of a new class of this package, below ``finetune``."""
    folder = kind.folders[0] if kind.folders else kind.name
    return ".".join([folder, family, name] if families(kind) else [folder, name])


def _places_in_checkout(kind: Kind, name: str, family: str) -> dict[str, Path]:
    steps = _module(kind, name, family).split(".")
    return {
        "py": ROOT.joinpath(*steps).with_suffix(".py"),
        "yaml": ROOT.parent / "conf" / kind.name / f"{name}.yaml",
        "test": ROOT.parent.joinpath("tests", *steps[:-1], f"test_{name}.py"),
    }


def _texts_in_checkout(kind: Kind, name: str, family: str) -> dict[str, str]:
    line = f"from finetune.{_module(kind, name, family)} import {_class_name(name)}\n"
    return {"first_imports": "", "import_plugins": "", "import_cls": line, "define_cls": ""}


def _places_in_plugin(kind: Kind, name: str, folder: Path) -> dict[str, Path]:
    return {
        "py": folder / f"{name}.py",
        "yaml": folder / "conf" / kind.name / f"{name}.yaml",
        "test": folder / f"test_{name}.py",
    }


def _texts_in_plugin(kind: Kind, name: str) -> dict[str, str]:
    """Return the lines by which a plug-in's test gets the class: it loads its own folder."""
    find = f'{_class_name(name)} = registry.get("{kind.name}", "{name}")'
    return {
        "first_imports": "from pathlib import Path\n\n",
        "import_plugins": "from finetune import registry\nfrom finetune.config import plugins\n",
        "import_cls": "",
        "define_cls": f"plugins.load([Path(__file__).parent])\n{find}\n\n",
    }


def write(kind_name: str, name: str, family: str, folder: Path | None) -> list[Path]:
    """Write the skeleton and return its files. Raises ``ConfigError`` and writes nothing if it cannot."""
    kinds = kinds_with_skeletons()
    if kind_name not in kinds:
        raise ConfigError(
            f"{kind_name} has no skeleton.{suggest_nearest(kind_name, kinds)} There is: {', '.join(kinds)}."
        )
    if not name.isidentifier() or name != name.lower():
        raise ConfigError(f"{name!r} is not a name: use lower-case letters, digits and _, first a letter.")
    if folder is None and not (ROOT.parent / "conf").is_dir():
        raise ConfigError(
            f"{ROOT.parent} is not a checkout of this project. Name a folder of your own: --plugins DIR."
        )
    if name in catalog(kind_name):
        raise ConfigError(
            f"{kind_name}={name} is there already, in {catalog(kind_name)[name].module}. Take another name."
        )
    files = files_of(KINDS[kind_name], name, family, folder)
    if there := [file for file in files if file.exists()]:
        raise ConfigError(*(f"{file} exists. Take another name, or remove it." for file in there))
    for file, text in files.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    return list(files)


def main() -> int:
    """Read the command line, write the files and print their names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", help=f"one of: {', '.join(kinds_with_skeletons())}")
    parser.add_argument("name", help="its name in lower-case letters, such as row_scale")
    parser.add_argument(
        "--family",
        choices=families(KINDS["method"]),
        default=DEFAULT_FAMILY,
        help="the folder of a new method",
    )
    parser.add_argument("--plugins", type=Path, metavar="DIR", help="write into this folder of plug-ins")
    given = parser.parse_args()
    print(*write(given.kind, given.name, given.family, given.plugins), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
