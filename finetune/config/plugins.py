"""Load plug-ins: methods, scores, schedules, optimizers, selectors and data sets from outside this package.

A plug-in is a folder that the user names (``--plugins DIR``), or an installed package with an entry point in
the group ``finetune.plugins``. Its modules are imported; their classes with ``@register("name")`` join the
registry, and the YAML groups in its folder ``conf`` join those of this package. Nothing that is read from a
run or a model names a plug-in to load; ``plugin_records`` has what a run records of one.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import importlib.util
import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from .. import registry
from ..errors import ConfigError

GROUP = "finetune.plugins"
PACKAGE = "finetune_plugins"  # parent of the modules of folders; those of installed packages keep their names


@dataclass(frozen=True)
class Plugin:
    """A plug-in.

    ``version``: "" if it states none; ``sha256``: of its Python files, as they were when it was loaded;
    ``package``: the name that the names of its modules start with; ``folder``: where ``--plugins`` found it;
    ``conf``: its YAML groups.
    """

    name: str
    version: str
    sha256: str
    package: str
    folder: Path | None = None
    conf: Path | None = None

    def provides(self, module: str) -> bool:
        """Tell whether a module belongs to the plug-in."""
        return _is_inside(module, self.package)


_LOADED: list[Plugin] = []
_installed_are_loaded = False


def load(folders: Sequence[str | Path] = ()) -> None:
    """Load the plug-ins in ``folders`` and those that are installed, unless they are loaded already.

    Raises ``ConfigError`` with every fault, such as a file that cannot be imported or a name that is taken.
    """
    global _installed_are_loaded
    faults: list[str] = []
    if not _installed_are_loaded:
        _installed_are_loaded = True
        for point in importlib.metadata.entry_points(group=GROUP):
            faults += _load_installed(point)
    for folder in folders:
        try:
            faults += _load_folder(Path(folder))
        except OSError as error:
            faults.append(f"--plugins {folder}: {error.filename} cannot be read: {error.strerror}.")
    if faults:
        raise ConfigError(*faults)


def loaded() -> tuple[Plugin, ...]:
    """Return the plug-ins that are loaded, in the order in which they were."""
    return tuple(_LOADED)


def folders() -> tuple[str, ...]:
    """Return the folders that plug-ins were loaded from, as absolute paths."""
    return tuple(str(plugin.folder) for plugin in _LOADED if plugin.folder)


def words() -> str:
    """Return the options that load the same folders again, each with a space in front."""
    return "".join(f" --plugins {shlex.quote(folder)}" for folder in folders())


def names(kind: str) -> set[str]:
    """Return the names of the classes of a kind that plug-ins bring."""
    found = set()
    for name, entry in registry.catalog(kind).items():
        if any(plugin.provides(entry.module) for plugin in _LOADED):
            found.add(name)
    return found


def conf_dirs() -> tuple[Path, ...]:
    """Return the folders of YAML groups that plug-ins bring."""
    return tuple(plugin.conf for plugin in _LOADED if plugin.conf)


def unload() -> None:
    """Forget all plug-ins and their modules, as at the start of the process."""
    global _installed_are_loaded
    for plugin in _LOADED:
        _forget_modules(plugin.package)
        for kind in registry.KINDS:
            for name, entry in registry.catalog(kind).items():
                if plugin.provides(entry.module):
                    registry.remove(kind, name)
    _LOADED.clear()
    _installed_are_loaded = False


def _load_folder(folder: Path) -> list[str]:
    """Load the plug-in in ``folder``; return its faults."""
    path = folder.resolve()
    if any(plugin.folder == path for plugin in _LOADED):
        return []
    option = f"--plugins {folder}"
    if path.is_file():
        return [f"{option} is a file. Give the folder that holds it: --plugins {folder.parent}."]
    if not path.is_dir():
        return [f"{option}: there is no such folder."]
    name = f"{PACKAGE}.{path.name.replace('.', '_')}"
    for other in _LOADED:
        if path.name == other.name or name == other.package:
            return [f"{option}: a plug-in named {other.name} is loaded already ({name}). Rename the folder."]
    if PACKAGE not in sys.modules:
        parent = ModuleType(PACKAGE)
        parent.__path__ = []
        sys.modules[PACKAGE] = parent
    package = ModuleType(name)
    package.__path__ = [str(path)]
    sys.modules[name] = package
    files, digest = _python_files(path), _digest(path, path.rglob("*.py"))
    plugin = Plugin(path.name, _stated_version(path), digest, name, path, _conf_of(path))
    return _load_modules(plugin, files, option, f"Fix it, or leave out {option}.")


def _load_installed(point: importlib.metadata.EntryPoint) -> list[str]:
    """Load the plug-in that an installed package's entry point names; return its faults."""
    package, version = "an unknown package", ""
    if point.dist:
        package, version = point.dist.name, point.dist.version
    source = f"The plug-in {point.name} of {package} {version}".rstrip()
    cure = f"Update the package, or remove it: pip uninstall {package}."
    try:
        spec = importlib.util.find_spec(point.module)
    except Exception as error:
        return [f"{source}: {point.module} cannot be imported: {_in_one_line(error)}. {cure}"]
    if spec is None or spec.origin is None:
        return [f"{source}: there is no module {point.module}. {cure}"]
    origin = Path(spec.origin)
    files: tuple[Path, ...] = (origin,)
    conf, root, counted = None, origin.parent, [origin]
    if spec.submodule_search_locations:  # a package
        files, conf, counted = _python_files(root), _conf_of(root), list(root.rglob("*.py"))
    if point.dist and (listed := _listed_files(point.dist, origin)):
        root, counted = Path(str(point.dist.locate_file(""))), listed
    digest = _digest(root, counted)
    plugin = Plugin(point.name, version, digest, point.module, None, conf)
    return _load_modules(plugin, files, source, cure)


def _python_files(folder: Path) -> tuple[Path, ...]:
    """Return the Python files directly in ``folder`` except its tests, ``__init__.py`` first."""
    found = []
    for file in sorted(folder.glob("*.py"), key=lambda file: (file.name != "__init__.py", file.name)):
        if file.name != "conftest.py" and not file.name.startswith("test_"):
            found.append(file)
    return tuple(found)


def _listed_files(dist: importlib.metadata.Distribution, module: Path) -> list[Path]:
    """Return the Python files that an installed distribution lists; none if ``module`` is not among them.

    An editable installation does not list its modules.
    """
    listed = []
    for name in dist.files or ():
        file = Path(str(dist.locate_file(name)))
        if file.suffix == ".py" and file.is_file():
            listed.append(file)
    return listed if any(file.samefile(module) for file in listed) else []


def _digest(root: Path, files: Iterable[Path]) -> str:
    """Return the SHA-256 over the names of ``files``, relative to ``root``, and their contents.

    Tests, and files in hidden folders or outside ``root``, do not count.
    """
    digest = hashlib.sha256()
    for file in sorted(files):
        if not file.is_relative_to(root):
            continue
        name = file.relative_to(root).as_posix()
        if "/." in f"/{name}" or file.name == "conftest.py" or file.name.startswith("test_"):
            continue
        content = file.read_bytes()
        digest.update(f"{name}\n{len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()


def _conf_of(folder: Path) -> Path | None:
    return folder / "conf" if (folder / "conf").is_dir() else None


def _stated_version(folder: Path) -> str:
    """Return the ``__version__`` in the folder's ``__init__.py``, or ""."""
    file = folder / "__init__.py"
    if not file.is_file():
        return ""
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        name, sign, value = line.partition("=")
        if sign and name.strip() == "__version__":
            return value.strip().strip("\"'")
    return ""


def _load_modules(plugin: Plugin, files: Sequence[Path], source: str, cure: str) -> list[str]:
    """Import the files of a plug-in and register their classes; after a fault, undo everything."""
    classes: list[tuple[str, registry.Entry]] = []
    faults: list[str] = []
    is_one_module = plugin.folder is None and len(files) == 1
    for file in files:
        module = plugin.package
        if file.stem != "__init__" and not is_one_module:
            module = f"{plugin.package}.{file.stem}"
        try:
            text = file.read_text(encoding="utf-8")
            entries = [entry for _, entry in registry.registered_classes(text, module)]
            if file.stem == "__init__" and plugin.folder:  # its module exists already and is empty
                spec = importlib.util.spec_from_file_location(module, file)
                assert spec
                assert spec.loader
                spec.loader.exec_module(sys.modules[module])
            imported = importlib.import_module(module)
        except (Exception, SystemExit) as error:
            faults.append(f"{source}: {file} cannot be imported: {_in_one_line(error)}. {cure}")
            continue
        for entry in entries:
            kind, fault = _kind_of(getattr(imported, entry.facts["class"], None), entry)
            if not fault and entry.name in registry.catalog(kind):
                other = registry.catalog(kind)[entry.name].module
                fault = f"the {kind} {entry.name!r} is there already, in {other}"
            if fault:
                faults.append(f"{source}: {file}: {fault}. Change the class {entry.facts['class']}.")
                continue
            classes.append((kind, entry))
    if not classes and not faults:
        faults = [f'{source}: no file there has a class with @register("NAME"). See docs/adding-a-method.md.']
    if faults:
        _forget_modules(plugin.package)
        return faults
    for kind, entry in classes:
        registry.add(kind, entry)
    _LOADED.append(plugin)
    return []


def _kind_of(cls: Any, entry: registry.Entry) -> tuple[str, str]:
    """Return the kind of a registered class, and what is wrong with the class if anything is."""
    kind = registry.KINDS.get(getattr(cls, "KIND", ""))
    if kind is None:
        bases = [known.base for known in registry.KINDS.values() if known.folders]
        return "", f"{entry.name!r} derives from no base class of a kind ({', '.join(bases)})"
    is_frozen = getattr(vars(cls).get("__dataclass_params__"), "frozen", False)
    if not kind.is_value and not is_frozen:
        return "", f"the {kind.name} {entry.name!r} is not a frozen dataclass"
    return kind.name, ""


def _forget_modules(package: str) -> None:
    for name in list(sys.modules):
        if _is_inside(name, package):
            del sys.modules[name]


def _is_inside(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def _in_one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split()) or type(error).__name__
