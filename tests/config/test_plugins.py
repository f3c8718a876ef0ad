"""Plug-ins: what a user adds from outside the package, what a run keeps of it, and what goes wrong."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from finetune import registry
from finetune.cli import app as cli
from finetune.config import plugin_records, plugins
from finetune.config.load import load, tree
from finetune.errors import ConfigError
from finetune.launch import resume
from finetune.launch.start import StartOptions
from finetune.storage.run_folder import RunFolder
from finetune.system.signals import Interrupted, Signals
from finetune.testing import contract
from finetune.training import run

from ..support.plugin import CLASSES, FROM_SKELETONS, SETTINGS, write_plugin, write_skeletons
from ..support.tiny_model import TINY

SMALL = [
    "train.steps=2",
    "train.batch_size=8",
    "train.eval_every=null",
    "train.device=cpu",
    "train.threads=1",
    *TINY,
]


@pytest.fixture(autouse=True)
def _no_plugins_stay() -> Iterator[None]:
    yield
    plugins.unload()


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """A folder with one class of every kind, loaded."""
    folder = write_plugin(tmp_path / "mine")
    plugins.load([folder])
    return folder


def faults(*folders: Path) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        plugins.load(folders)
    assert plugins.loaded() == ()
    return caught.value.faults


def trained(settings: list[str], folder: Path) -> RunFolder:
    config = load([*settings, *SMALL, "dataset.retention_images=0"])
    result = run.train(config, folder, lambda line: None, lambda done, total, words: None)
    assert result["status"] == "finished"
    return RunFolder(folder)


@pytest.mark.parametrize(("kind", "name"), [*CLASSES.items(), *FROM_SKELETONS.items()])
def test_a_class_of_every_kind_joins(mine: Path, tmp_path: Path, kind: str, name: str) -> None:
    if kind in FROM_SKELETONS:
        plugins.load([write_skeletons(tmp_path / "more")])
    assert name in registry.catalog(kind)
    assert registry.get(kind, name).name == name
    plugins.unload()
    assert name not in registry.catalog(kind)


def test_every_kind_with_classes_is_tried() -> None:
    assert {*CLASSES, *FROM_SKELETONS} == {kind.name for kind in registry.KINDS.values() if kind.folders}


def test_names_work_without_a_yaml_file_and_together(mine: Path, tmp_path: Path) -> None:
    config = load(SETTINGS)
    assert (config.method.score, config.method.schedule.name) == ("scratch_smallness", "scratch_once")
    assert (config.optimizer.name, config.optimizer.momentum) == ("scratch_sgd", 0.5)
    assert (config.selector.name, config.dataset.name) == ("scratch_all_parts", "scratch_few_digits")
    assert load(["method=scratch_rows"]).method.name == "scratch_rows"
    files = trained(SETTINGS, tmp_path / "run")
    assert load([], None, files.config).hash() == files.read_result()["config_hash"]


def test_a_method_of_a_plug_in_fulfils_the_contract(mine: Path) -> None:
    contract.check(registry.get("method", "scratch_rows"))


def test_a_setting_that_another_optimizer_has_is_refused(mine: Path) -> None:
    with pytest.raises(ConfigError, match=r"momentum=0.5 .* is not a setting of optimizer=adamw"):
        load(["optimizer.momentum=0.5"])
    with pytest.raises(ConfigError, match=r"betas=.* is not a setting of optimizer=scratch_sgd"):
        load(["optimizer=scratch_sgd", "optimizer.betas=[0.9,0.99]"])


def test_near_misses_name_classes_of_plug_ins(mine: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"method=scratch_row is not an option .*Did you mean 'scratch_rows'\?"
    ):
        load(["method=scratch_row"])
    with pytest.raises(
        ConfigError, match=r"method.score='scratch_smalness' .*Did you mean 'scratch_smallness'\?"
    ):
        load(["method=sparse", "method.score=scratch_smalness"])


def test_yaml_groups_of_a_plug_in(tmp_path: Path) -> None:
    folder = write_plugin(tmp_path / "mine")
    (folder / "conf/method").mkdir(parents=True)
    (folder / "conf/method/scratch_rows.yaml").write_text(
        "# @package _global_\nmethod:\n  name: scratch_rows\noptimizer:\n  lr: 0.125\n"
    )
    (folder / "conf/method/rows_of_queries.yaml").write_text("name: scratch_rows\ntargets: [q]\n")
    plugins.load([folder])
    leaves = tree(["method=scratch_rows"])
    assert leaves["optimizer.lr"] == (0.125, f"{folder}/conf/method/scratch_rows.yaml:5")
    assert load(["method=rows_of_queries"]).method.targets == ("q",)


def test_yaml_groups_of_a_plug_in_replace_nothing(tmp_path: Path) -> None:
    folder = write_plugin(tmp_path / "mine")
    (folder / "conf/method").mkdir(parents=True)
    for name in ("config.yaml", "method/lora.yaml"):
        (folder / "conf" / name).write_text("name: lora\n")
    plugins.load([folder])
    with pytest.raises(ConfigError) as caught:
        load(["method=lora"])
    assert [fault.split(":")[0] for fault in caught.value.faults] == [
        f"{folder}/conf/config.yaml",
        f"{folder}/conf/method/lora.yaml",
    ]
    assert all("Rename it: only --config-dir replaces built-in files." in f for f in caught.value.faults)


def test_an_option_of_the_users_own_wins_over_that_of_a_plug_in(mine: Path, tmp_path: Path) -> None:
    (tmp_path / "own/method").mkdir(parents=True)
    (tmp_path / "own/method/scratch_rows.yaml").write_text("name: scratch_rows\ntargets: [v]\n")
    assert load(["method=scratch_rows"], tmp_path / "own").method.targets == ("v",)
    assert load(["method=scratch_rows"]).method.targets == ("all",)


def test_loading_again_changes_nothing(mine: Path) -> None:
    before = registry.get("method", "scratch_rows")
    plugins.load([mine, mine])
    StartOptions((str(mine),)).apply()
    assert registry.get("method", "scratch_rows") is before
    assert [plugin.name for plugin in plugins.loaded()] == ["mine"]


BROKEN = {
    "a syntax error": ("def broken(:\n", r"{file} cannot be imported: SyntaxError: invalid syntax"),
    "a missing package": (
        "import not_there\n",
        r"cannot be imported: ModuleNotFoundError: "
        r"No module named 'not_there'",
    ),
    "an exit": ("raise SystemExit(3)\n", r"cannot be imported: SystemExit: 3"),
    "an error of its own": ("1 / 0\n", r"cannot be imported: ZeroDivisionError: division by zero"),
    "a taken name": (
        "from finetune.core.sparse.scores import Score\nfrom finetune.registry import register\n\n"
        '@register("snip")\nclass Mine(Score):\n    """Mine."""\n',
        r"the score 'snip' is there already, in finetune.scores.gradients. Change the class Mine",
    ),
    "no kind": (
        "from finetune.registry import register\n\n@register('x')\nclass Mine:\n    pass\n",
        r"'x' derives from no base class of a kind \(finetune.core.method.Method, .*\)",
    ),
    "no frozen dataclass": (
        "from finetune.core.method import Method\nfrom finetune.registry import register\n\n"
        '@register("mine")\nclass Mine(Method):\n    """Mine."""\n',
        "the method 'mine' is not a frozen dataclass",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_wrong_with_a_plug_in_is_one_message(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It names file, reason and cure; nothing of the plug-in stays."""
    text, words = BROKEN[case]
    folder = write_plugin(tmp_path / "mine")
    (folder / "broken.py").write_text(text)
    (fault,) = faults(folder)
    assert re.search(words.replace("{file}", re.escape(str(folder / "broken.py"))), fault), fault
    assert str(folder / "broken.py") in fault
    assert "\n" not in fault
    assert "scratch_rows" not in registry.catalog("method")
    assert not [name for name in sys.modules if name.startswith("finetune_plugins.mine")]
    monkeypatch.setattr(sys, "argv", ["finetune", "methods", "--plugins", str(folder)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"Error: {fault}\n"


def test_folders_that_hold_no_plug_in(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain/a.py").write_text("x = 1\n")
    file = tmp_path / "file.py"
    file.write_text("x = 1\n")
    found = faults(tmp_path / "no", tmp_path / "empty", tmp_path / "plain", file)
    assert len(found) == 4
    assert found[0] == f"--plugins {tmp_path / 'no'}: there is no such folder."
    assert all("no file there has a class with @register" in fault for fault in found[1:3])
    assert found[3] == f"--plugins {file} is a file. Give the folder that holds it: --plugins {tmp_path}."


def test_a_file_that_is_no_utf8(tmp_path: Path) -> None:
    folder = write_plugin(tmp_path / "mine")
    (folder / "__init__.py").write_bytes(b'__version__ = "1\xff"\n')
    (fault,) = faults(folder)
    assert f"{folder / '__init__.py'} cannot be imported: UnicodeDecodeError" in fault


def test_two_folders_of_one_name(tmp_path: Path) -> None:
    write_plugin(tmp_path / "a/mine")
    write_plugin(tmp_path / "b/mine")
    plugins.load([tmp_path / "a/mine"])
    with pytest.raises(ConfigError, match=r"a plug-in named mine is loaded already .*Rename the folder"):
        plugins.load([tmp_path / "b/mine"])


def test_folders_whose_modules_would_share_a_name(tmp_path: Path) -> None:
    write_plugin(tmp_path / "a.b")
    write_plugin(tmp_path / "a_b")
    plugins.load([tmp_path / "a.b"])
    with pytest.raises(ConfigError, match=r"--plugins .*a_b: a plug-in named a\.b is loaded already"):
        plugins.load([tmp_path / "a_b"])


def test_init_is_executed_before_the_other_files(tmp_path: Path) -> None:
    folder = write_plugin(tmp_path / "mine")
    (folder / "__init__.py").write_text("ROWS = 0\n")
    (folder / "Another.py").write_text("from . import ROWS\n\nassert ROWS == 0\n")
    plugins.load([folder])
    assert "scratch_rows" in registry.catalog("method")


def test_the_digest_covers_nested_files(tmp_path: Path) -> None:
    folder = write_plugin(tmp_path / "mine")
    (folder / "inner").mkdir()
    digests = set()
    for text in ("VALUE = 1\n", "VALUE = 2\n"):
        (folder / "inner" / "more.py").write_text(text)
        plugins.load([folder])
        digests.add(plugins.loaded()[0].sha256)
        plugins.unload()
    assert len(digests) == 2


def test_two_plug_ins_that_take_one_name(tmp_path: Path) -> None:
    plugins.load([write_plugin(tmp_path / "one")])
    with pytest.raises(
        ConfigError, match=r"'scratch_rows' is there already, in finetune_plugins.one.scratch_rows"
    ):
        plugins.load([write_plugin(tmp_path / "two")])


# What a run keeps.


def digest_of(folder: Path, *names: str) -> str:
    """The digest as docs/run-folder.md describes it, of files named relative to ``folder``."""
    digest = hashlib.sha256()
    for name in names:
        content = (folder / name).read_bytes()
        digest.update(f"{name}\n{len(content)}\n".encode() + content)
    return digest.hexdigest()


def sha256(folder: Path) -> str:
    return digest_of(folder, "__init__.py", "_size.py", "parts.py", "scratch_rows.py")


def test_a_run_records_name_version_and_digest_of_what_it_used(mine: Path, tmp_path: Path) -> None:
    record = {"name": "mine", "version": "1.2", "sha256": sha256(mine)}
    files = trained(["method=scratch_rows"], tmp_path / "run")
    assert files.read_result()["plugins"] == [record]
    assert json.loads((files.delta / "delta.json").read_text())["plugins"] == [record]
    lines = files.config.read_text().splitlines()
    assert lines[0].startswith("# format 1, finetune ")
    assert lines[1] == "# plug-in " + json.dumps(record)
    assert not any(str(mine) in file.read_text() for file in (files.config, files.result))
    other = trained(["method=head"], tmp_path / "other")
    assert "plugins" not in other.read_result()
    assert "plug-in" not in other.config.read_text()


@pytest.mark.parametrize(
    "word",
    [
        "method.score=scratch_smallness",
        "schedule=scratch_once",
        "optimizer=scratch_sgd",
        "dataset=scratch_few_digits",
    ],
)
def test_any_class_of_a_plug_in_counts_as_used(mine: Path, word: str) -> None:
    assert [record["name"] for record in plugin_records.used_by(load(["method=sparse", word]))] == ["mine"]
    assert plugin_records.used_by(load(["method=sparse"])) == []


def test_a_run_without_its_plug_in_says_what_is_missing(
    mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files, digest = trained(["method=scratch_rows"], tmp_path / "run"), sha256(mine)
    plugins.unload()
    said = (
        f"Error: {files.config} was made with the plug-in mine 1.2 (SHA-256 {digest[:10]}), "
        "which is not loaded. "
        "Name its folder by --plugins DIR, or install the package that brings it.\n"
    )
    for words in (
        ["eval", f"ckpt={files.path}"],
        ["merge", f"ckpt={files.path}", f"out={tmp_path / 'out'}"],
        ["train", "--resume", str(files.path)],
        ["train", "--config", str(files.config)],
        ["inspect", str(files.path)],
    ):
        monkeypatch.setattr(sys, "argv", ["finetune", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 2
        assert capsys.readouterr().err == said
    monkeypatch.setattr(
        sys, "argv", ["finetune", "eval", "--json", "--plugins", str(mine), f"ckpt={files.path}"]
    )
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    caught = capsys.readouterr()
    assert json.loads(caught.out)["metrics"]["test"] == files.read_result()["metrics"]["test"]
    assert caught.err == ""


def test_other_code_under_the_same_name_is_a_warning(
    mine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files, digest = trained(["method=scratch_rows"], tmp_path / "run"), sha256(mine)
    plugins.unload()
    (mine / "scratch_rows.py").write_text((mine / "scratch_rows.py").read_text() + "\n# a change\n")
    plugins.load([mine])
    for _ in range(2):
        load([], None, files.config)
    assert capsys.readouterr().err == (
        f"Warning: the plug-in mine 1.2 (SHA-256 {digest[:10]}) that "
        f"{files.config} was made with is loaded as "
        f"mine 1.2 (SHA-256 {sha256(mine)[:10]}): its code has changed. "
        "To train with the new code alone, choose another run= or name=.\n"
    )


def change_code(folder: Path) -> None:
    """Change a plug-in on disk and load it again, as the next process would."""
    plugins.unload()
    file = folder / "scratch_rows.py"
    file.write_text(file.read_text() + "\n# a change\n")
    plugins.load([folder])


def interrupt(folder: Path) -> None:
    """Train the method of the plug-in and send SIGTERM during the second step."""

    def progress(done: int, total: int, words: str) -> None:
        if done == 1:
            signal.raise_signal(signal.SIGTERM)

    config = load(["method=scratch_rows", "train.steps=3", *SMALL[1:], "dataset.retention_images=0"])
    with Signals() as signals, pytest.raises(Interrupted):
        run.train(config, folder, lambda line: None, progress, signals)


def test_a_run_resumed_with_other_code_keeps_a_warning(
    mine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both digests are in log.txt and result.json, and the user is told once."""
    files, first = RunFolder(tmp_path / "run"), sha256(mine)
    interrupt(files.path)
    change_code(mine)
    config = load([], None, files.config)
    result = run.train(config, files.path, lambda line: None, lambda done, total, words: None)
    warning = (
        f"steps up to 2 were made with the plug-in mine 1.2 (SHA-256 {first[:10]}) and later ones with "
        f"mine 1.2 (SHA-256 {sha256(mine)[:10]}): the code has changed, so neither version alone gives this "
        "result"
    )
    assert result["warnings"] == files.read_result()["warnings"] == [warning]
    assert files.log.read_text().count(f"Warning: {warning}.\n") == 1
    assert capsys.readouterr().err.count("Warning: ") == 1
    assert [record["sha256"] for record in plugin_records.read_records(files.config)] == [sha256(mine)]


def test_a_warning_of_other_code_survives_an_end_before_the_next_checkpoint(
    mine: Path, tmp_path: Path
) -> None:
    """The checkpoint, not config.yaml, says with which code its steps were made."""
    files, first = RunFolder(tmp_path / "run"), sha256(mine)
    interrupt(files.path)
    change_code(mine)
    files.open_or_check(load([], None, files.config))  # a second process begins, and is killed
    result = run.train(
        load([], None, files.config), files.path, lambda line: None, lambda done, total, words: None
    )
    assert len(result["warnings"]) == 1
    assert first[:10] in result["warnings"][0]


def test_a_run_resumed_with_the_same_code_has_no_warning(mine: Path, tmp_path: Path) -> None:
    files = RunFolder(tmp_path / "run")
    interrupt(files.path)
    plugins.unload()
    mine.rename(tmp_path / "renamed")
    plugins.load([tmp_path / "renamed"])
    config = load([], None, files.config)
    assert run.train(config, files.path, lambda line: None, lambda *_: None)["warnings"] == []
    assert "Warning" not in files.log.read_text()


def test_a_checkpoint_without_records_of_plug_ins_is_resumed(mine: Path, tmp_path: Path) -> None:
    """Such a checkpoint was written before they were recorded."""
    files = RunFolder(tmp_path / "run")
    interrupt(files.path)
    state = files.checkpoint(2) / "state.json"
    content = json.loads(state.read_text())
    del content["extra"]["plugins"]
    state.write_text(json.dumps(content))
    manifest = state.with_name("manifest.json")
    listed = json.loads(manifest.read_text())
    data = state.read_bytes()
    listed["files"]["state.json"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    manifest.write_text(json.dumps(listed))
    config = load([], None, files.config)
    assert run.train(config, files.path, lambda line: None, lambda *_: None)["warnings"] == []
    assert "Resuming from step 2" in files.log.read_text()


def test_a_finished_run_of_other_code_is_a_warning(
    mine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without it, a user who changed the method would take the old result for the new one."""
    files, digest = trained(["method=scratch_rows"], tmp_path / "run"), sha256(mine)
    before = files.config.read_bytes()
    change_code(mine)
    capsys.readouterr()
    files.open_or_check(load(["method=scratch_rows", *SMALL, "dataset.retention_images=0"]))
    assert f"the plug-in mine 1.2 (SHA-256 {digest[:10]}) that {files.config}" in capsys.readouterr().err
    assert files.config.read_bytes() == before


def test_the_same_code_in_another_folder_is_the_same(
    mine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = trained(["method=scratch_rows"], tmp_path / "run")
    plugins.unload()
    mine.rename(tmp_path / "renamed")
    plugins.load([tmp_path / "renamed"])
    assert load([], None, files.config).method.name == "scratch_rows"
    assert capsys.readouterr().err == ""


def test_the_command_that_goes_on_names_the_folder(mine: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").touch()
    assert resume.command(folder, 2) == f"finetune train --resume {folder} --processes 2 --plugins {mine}"
    plugins.unload()
    assert resume.command(folder) == f"finetune train --resume {folder}"


def test_what_a_run_folder_says_loads_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Code and groups beside a run, and records that name them, are never looked at."""
    folder = tmp_path / "run"
    trained(["method=head"], folder)
    mark = tmp_path / "mark"
    evil = f"from pathlib import Path\nPath({str(mark)!r}).touch()\n"
    for name in ("evil.py", "__init__.py", "conf/evil.py", "plugins/evil.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(evil)
    (folder / "conf/method").mkdir()
    (folder / "conf/method/head.yaml").write_text("name: [\n")
    monkeypatch.chdir(folder)
    text = (folder / "config.yaml").read_text()
    for name in (str(folder), "evil", "../run", "finetune_plugins.evil", "x" * 5000, "\x1b[31m"):
        record = json.dumps(
            {"name": name, "version": "", "sha256": "0" * 64, "path": str(folder), "module": "evil"}
        )
        head, _, rest = text.partition("\n")
        (folder / "config.yaml").write_text(f"{head}\n# plug-in {record}\n{rest}")
        with pytest.raises(ConfigError, match="which is not loaded") as caught:
            load([], None, folder / "config.yaml")
        assert "\x1b" not in str(caught.value)
    for line in ("# plug-in {", "# plug-in []", '# plug-in {"name": 3}', "# plug-in " + "[" * 9000):
        (folder / "config.yaml").write_text(f"{head}\n{line}\n{rest}")
        assert load([], None, folder / "config.yaml").method.name == "head"
    assert plugins.loaded() == ()
    assert not mark.exists()


# Installed packages.


def install(
    site: Path, monkeypatch: pytest.MonkeyPatch, module: str, value: str, files: Sequence[str] = ()
) -> None:
    """Make an installed package with an entry point, as an installer would; ``files``: those it lists."""
    about = site / "rowscale_lab-0.3.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: rowscale-lab\nVersion: 0.3\n")
    (about / "entry_points.txt").write_text(f"[finetune.plugins]\n{module} = {value}\n")
    if files:
        (about / "RECORD").write_text("".join(f"{file},,\n" for file in files))
    monkeypatch.syspath_prepend(site)
    plugins.unload()


@pytest.fixture(autouse=True)
def _modules_of_packages_go(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    for name in [name for name in sys.modules if name.split(".")[0] in ("rowscale", "rowscale_one")]:
        del sys.modules[name]


def test_an_installed_package_is_found_by_its_entry_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_plugin(tmp_path / "site/rowscale/finetune_parts")
    (tmp_path / "site/rowscale/__init__.py").touch()
    install(tmp_path / "site", monkeypatch, "rows", "rowscale.finetune_parts")
    config = load(["method=scratch_rows"])
    (record,) = plugin_records.used_by(config)
    assert (record["name"], record["version"]) == ("rows", "0.3")
    assert plugins.words() == ""  # every process finds it by itself


def test_an_entry_point_may_be_one_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_plugin(tmp_path / "parts")
    (tmp_path / "site").mkdir()
    (folder / "parts.py").rename(tmp_path / "site/rowscale_one.py")
    install(tmp_path / "site", monkeypatch, "rows", "rowscale_one")
    assert load(["optimizer=scratch_sgd"]).optimizer.name == "scratch_sgd"


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("rowscale.nothing", "there is no module rowscale.nothing"),
        ("rowscale.bad", "bad.py cannot be imported: ZeroDivisionError"),
        ("nowhere.at_all", "nowhere.at_all cannot be imported: ModuleNotFoundError"),
    ],
)
def test_an_installed_package_that_does_not_work(
    value: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "site/rowscale").mkdir(parents=True)
    (tmp_path / "site/rowscale/__init__.py").touch()
    (tmp_path / "site/rowscale/bad.py").write_text("1 / 0\n")
    install(tmp_path / "site", monkeypatch, "rows", value)
    with pytest.raises(ConfigError) as caught:
        load([])
    (fault,) = caught.value.faults
    assert fault.startswith("The plug-in rows of rowscale-lab 0.3: ")
    assert words in fault
    assert fault.endswith("Update the package, or remove it: pip uninstall rowscale-lab.")


def digest_of_installed() -> str:
    plugins.unload()
    plugins.load()
    (plugin,) = plugins.loaded()
    return plugin.sha256


def test_the_digest_of_an_installed_plug_in_covers_its_whole_distribution(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Modules outside the package that the entry point names count too; files not listed do not."""
    site = tmp_path / "site"
    write_plugin(site / "rowscale/finetune_parts")
    for name in ("rowscale/__init__.py", "rowscale/kernel.py", "rowscale_shared.py", "other.py"):
        (site / name).write_text(f"NAME = {name!r}\n")
    parts = [f"rowscale/finetune_parts/{name}.py" for name in ("__init__", "_size", "parts", "scratch_rows")]
    counted = ["rowscale/__init__.py", *parts, "rowscale/kernel.py", "rowscale_shared.py"]
    listed = [*counted, "../bin/tool.py", "rowscale/data.txt", "rowscale/test_a.py", "rowscale/gone.py"]
    listed.append(str(tmp_path / "bin/tool.py"))  # a record may hold absolute paths
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/tool.py").touch()
    (site / "rowscale/test_a.py").touch()
    install(site, monkeypatch, "rows", "rowscale.finetune_parts", listed)
    assert digest_of_installed() == digest_of(site, *counted)
    (site / "rowscale_shared.py").write_text("NAME = 'changed'\n")
    assert digest_of_installed() == digest_of(site, *counted)


def test_the_digest_of_an_editable_installation_is_that_of_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its distribution lists only the file that finds the package."""
    site, package = tmp_path / "site", tmp_path / "src/rowscale"
    write_plugin(package)
    site.mkdir()
    (site / "__editable___rowscale_finder.py").write_text("PLACE = 'src'\n")
    monkeypatch.syspath_prepend(tmp_path / "src")
    install(site, monkeypatch, "rows", "rowscale", ["__editable___rowscale_finder.py"])
    assert digest_of_installed() == sha256(package)


def test_nothing_is_installed_here() -> None:
    """Otherwise the tests would not see the package alone."""
    assert list(importlib.metadata.entry_points(group=plugins.GROUP)) == []
