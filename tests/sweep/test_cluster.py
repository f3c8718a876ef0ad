"""Clusters: what is asked of them, what is said when they are not there, and jobs on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from finetune.errors import ConfigError
from finetune.launch.start import NO_OPTIONS
from finetune.sweep import cluster
from finetune.sweep.cluster import Launcher, choose_launcher
from finetune.sweep.grid import Point

Make = Callable[..., list[Point]]


def tool(folder: Path, name: str, text: str) -> None:
    file = folder / name
    file.write_text(f"#!/bin/sh\n{text}\n")
    file.chmod(0o755)


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all of PATH, with tools that answer."""
    for name in ("sbatch", "squeue", "sinfo"):
        tool(tmp_path, name, "exit 0")
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


@pytest.mark.processes
def test_what_is_asked_for(slurm: Path) -> None:
    assert choose_launcher("local", []) is None
    found = choose_launcher(
        "slurm", ["launcher.timeout_min=5", "launcher.partition=gpu", "launcher.setup=[a, b]"]
    )
    assert found
    assert {key: found.settings[key] for key in ("timeout_min", "partition", "setup", "nodes")} == {
        "timeout_min": 5,
        "partition": "gpu",
        "setup": ["a", "b"],
        "nodes": 1,
    }


@pytest.mark.processes
def test_mistakes(slurm: Path) -> None:
    with pytest.raises(ConfigError, match=r"--launcher slrm is not a launcher\. Did you mean 'slurm'\?"):
        choose_launcher("slrm", [])
    with pytest.raises(
        ConfigError,
        match=r"launcher.timeout is not a setting of --launcher slurm\. Did you mean 'timeout_min'\?",
    ):
        choose_launcher("slurm", ["launcher.timeout=5"])
    with pytest.raises(ConfigError, match="local has --jobs"):
        choose_launcher("local", ["launcher.timeout_min=5"])


@pytest.mark.parametrize("name", ["ray", "slurm", "joblib"])
def test_an_extra_that_is_not_installed_is_named_with_the_cure(
    slurm: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    find = cluster.importlib.util.find_spec
    package = cluster.PLUGINS[name][0]
    monkeypatch.setattr(
        cluster.importlib.util, "find_spec", lambda module: None if module.endswith(package) else find(module)
    )
    with pytest.raises(ConfigError, match=rf"--launcher {name} .*pip install 'finetune-bench\[{name}\]'"):
        choose_launcher(name, [])


def test_no_slurm(slurm: Path) -> None:
    (slurm / "sbatch").unlink()
    with pytest.raises(ConfigError, match="needs Slurm's sbatch, not found here"):
        choose_launcher("slurm", [])


@pytest.mark.processes
def test_a_slurm_that_fails_or_does_not_answer(slurm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool(slurm, "sinfo", "echo 'Unable to contact slurm controller' >&2; exit 1")
    with pytest.raises(ConfigError, match="`sinfo` fails: Unable to contact slurm controller"):
        choose_launcher("slurm", [])
    monkeypatch.setattr(cluster, "ANSWER", 0.2)
    tool(slurm, "sinfo", "exec /bin/sleep 60")
    with pytest.raises(ConfigError, match="did not answer"):
        choose_launcher("slurm", [])


@pytest.mark.processes
def test_a_users_file_wins(slurm: Path, tmp_path: Path) -> None:
    (tmp_path / "mine" / "launcher").mkdir(parents=True)
    file = tmp_path / "mine" / "launcher" / "slurm.yaml"
    file.write_text("timeout_min: 7\n")
    found = choose_launcher("slurm", [], tmp_path / "mine")
    assert found
    assert found.settings == {"timeout_min": 7}
    file.write_text("- 7\n")
    with pytest.raises(ConfigError, match="should be a mapping"):
        choose_launcher("slurm", [], tmp_path / "mine")


def test_values_are_to_grammar_in_hydras_grammar() -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    from finetune.sweep.jobs import _to_grammar

    for value in ("a,b=c d", 'say "so"', 5, 0.5, True, None, ["a", 1], {"a": {"b": None}, "c": [1]}):
        assert OverridesParser.create().parse_override(f"x={_to_grammar(value)}").value() == value


@pytest.mark.slow
def test_joblib_runs_each_config_in_a_process(
    stub: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The launcher is Hydra's own; a ``sitecustomize`` module replaces what the jobs run."""
    points = stub(1, 101, 2)
    bad, before = points[1:]
    before.folder.result.write_text(json.dumps({"format": 1, "status": "finished", "seed": 2}))
    (tmp_path / "sitecustomize.py").write_text(
        f"import sys\nsys.path.insert(0, {str(Path(__file__).parents[2])!r})\n"
        "import finetune.sweep.cluster as cluster, finetune.sweep.process as process\n"
        "from tests.sweep.conftest import point, stubbed\nprocess.run_command = stubbed\n"
        "def load(words, config_file):\n"
        "    return point(int(config_file.parent.name.split('-s')[1].split('-')[0])).config\n"
        "cluster.load = load\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    said = list[str]()
    where = choose_launcher("joblib", [])
    assert where
    found = cluster.run_all(points, where, 2, False, said.append, NO_OPTIONS)
    log = next(Path("outputs/s/.launcher").glob("*/log.txt")).read_text()
    assert {path.name.split("-")[1]: result["status"] for path, result in found.items()} == {
        "s1": "finished",
        "s101": "failed",
        "s2": "finished",
    }, log
    assert bad.folder.read_result()["error"] == "no data here"
    assert said[0].startswith("1 of 3 runs are there already; 2 go to joblib.")
    assert not (before.folder.path / "started").exists()


@pytest.mark.slow
def test_ray_runs_each_config_in_a_process(tmp_path: Path) -> None:
    """The command line, and a Ray that is started on this machine."""
    pytest.importorskip("ray")
    pytest.importorskip("hydra_plugins.hydra_ray_launcher")
    words = [
        "method=bitfit",
        "train.steps=2",
        "train.batch_size=8",
        "train.threads=1",
        "train.device=cpu",
        "dataset.retention_images=0",
    ]
    command = [
        sys.executable,
        "-m",
        "finetune",
        "sweep",
        *words,
        "seed=0,1",
        "name=q",
        "--launcher",
        "ray",
        "--json",
    ]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    logs = [file.read_text() for file in tmp_path.glob("outputs/q/.launcher/*/log.txt")]
    assert done.returncode == 0, (done.stderr, logs)
    assert [(row["status"], row["steps"]) for row in json.loads(done.stdout)] == [("finished", 2)] * 2, logs


@pytest.mark.processes
def test_a_launcher_that_fails_leaves_runs_that_can_be_resumed(
    stub: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    points = stub(1)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    said = list[str]()
    assert cluster.run_all(points, Launcher("joblib", {}), 1, False, said.append, NO_OPTIONS) == {}
    assert "not all jobs of joblib ended with a result" in said[-1]


@pytest.mark.processes
def test_what_slurm_has_is_asked_of_it(slurm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("12", "13_0", "%j"):
        (tmp_path / ".submitit" / name).mkdir(parents=True)
    assert cluster._slurm_jobs(tmp_path) == ["12", "13"]
    tool(slurm, "squeue", 'test "$5" = "12,13" && echo 12')
    assert cluster._is_queued(["12", "13"])
    tool(slurm, "squeue", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    assert not cluster._is_queued(["12"])
    tool(slurm, "squeue", "echo 'Unable to contact slurm controller' >&2; exit 1")
    assert cluster._is_queued(["12"])


@pytest.mark.processes
def test_the_wait_ends_when_slurm_has_lost_the_jobs(
    stub: Make, slurm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    points = stub(1)
    home = Path("outputs/s/.launcher/x")
    (home / ".submitit" / "12").mkdir(parents=True)
    monkeypatch.setattr(cluster, "SETTLE", 0.3)
    monkeypatch.setattr(cluster, "INTERVAL", 0.05)
    waiting = subprocess.Popen(["/bin/sleep", "60"])
    try:
        cluster._wait(waiting, points, home)  # squeue says nothing
        assert waiting.poll() is None
    finally:
        waiting.kill()
        waiting.wait()
