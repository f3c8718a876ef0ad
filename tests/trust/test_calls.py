"""What the package's source may not do: decode pickles, run what a file says, fetch code."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2] / "finetune"
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "jsonpickle"}
CALLS = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "torch.load",
    "torch.jit.load",
    "torch.package.PackageImporter",
    "np.load",
    "numpy.load",
    "yaml.unsafe_load",
    "yaml.full_load",
    "yaml.load_all",
    "yaml.unsafe_load_all",
    "os.system",
    "os.popen",
    "pd.read_pickle",
    "pandas.read_pickle",
    "hydra.utils.instantiate",
    "instantiate",
    "OmegaConf.register_new_resolver",
    "shutil.unpack_archive",
    "tarfile.open",
    "zipfile.ZipFile",
}
# By names in this package's own source, and of files in folders that the user named or of packages that
# are installed.
IMPORTERS = {"finetune/registry.py", "finetune/config/plugins.py"}


def calls() -> list[tuple[Path, ast.Call, str]]:
    found = []
    for file in sorted(ROOT.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call):
                found.append((file, node, ast.unparse(node.func)))
    return found


def test_nothing_decodes_a_pickle_or_runs_what_a_file_says() -> None:
    wrong = [f"{file}:{node.lineno} {name}" for file, node, name in calls() if name in CALLS]
    wrong += [
        f"{file}:{node.lineno} {name}"
        for file, node, name in calls()
        if name.endswith("import_module") and file.relative_to(ROOT.parent).as_posix() not in IMPORTERS
    ]
    assert not wrong


def test_plug_ins_come_from_the_command_line_and_from_nothing_else() -> None:
    """Only the command line and the caller of ``finetune.train`` name folders; every other call loads what is
    installed."""
    named = []
    for file, node, name in calls():
        if name == "plugins.load" and (node.args or node.keywords):
            named.append(f"{file.relative_to(ROOT)}: {ast.unparse(node)}")
    assert named == ["launch/start.py: plugins.load(self.plugins)"]
    made = []
    for file, node, name in calls():
        names_it = name == "StartOptions" or (name == "cls" and file.name == "start.py")
        if names_it and (node.args or node.keywords):
            made.append(f"{file.relative_to(ROOT)}: {ast.unparse(node)}")
    assert made == [
        "api.py: StartOptions(tuple((str(Path(folder).absolute()) for folder in plugins)))",
        "cli/options.py: StartOptions(tuple((str(folder.absolute()) for folder in plugins or ())))",
        "launch/start.py: cls(tuple(stated['plugins']))",
    ]


def test_no_module_that_decodes_pickles_is_imported() -> None:
    wrong = []
    for file in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = (
                [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
            wrong += [f"{file} imports {name}" for name in names if name.split(".")[0] in MODULES]
    assert not wrong


def test_yaml_is_read_by_the_safe_loader() -> None:
    loads = [
        (file, node) for file, node, name in calls() if name in ("yaml.load", "yaml.compose", "yaml.parse")
    ]
    assert loads
    for file, node in loads:
        loader = next(ast.unparse(k.value) for k in node.keywords if k.arg == "Loader")
        assert loader in ("yaml.SafeLoader", "getattr(yaml, 'CSafeLoader', yaml.SafeLoader)"), (file, loader)


def test_what_transformers_reads_may_bring_no_code() -> None:
    """Left open, its default asks at the terminal whether the code should run."""
    loads = [
        (file, node, name)
        for file, node, name in calls()
        if name.endswith((".from_pretrained", ".from_config"))
    ]
    assert len(loads) >= 4
    for file, node, name in loads:
        if "PeftModel" in name:
            continue
        given = {k.arg: ast.unparse(k.value) for k in node.keywords}
        assert given.get("trust_remote_code") == "False", (file, ast.unparse(node))


def test_no_command_goes_through_a_shell() -> None:
    shells = [
        (file, node.lineno)
        for file, node, _ in calls()
        for k in node.keywords
        if k.arg == "shell" and ast.unparse(k.value) != "False"
    ]
    assert not shells
