"""Train a finished run again from its frozen configuration, and compare the results.

The repetition is a process of its own in a scratch folder. The folder of the run is only read. Imports no
torch.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import tempfile
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..config import plugin_records
from ..config.load import load
from ..config.settings import LoggerConfig
from ..errors import ConfigError, RunFailed
from ..launch.start import NO_OPTIONS, StartOptions, child_command, child_main
from ..storage.run_folder import RunFolder
from ..system import safe
from ..system.exit_code import print_line

MAIN = ("accuracy", "bits_per_byte")
LEVEL = 0.95


def reproduce(path: Path, keep: Path | None = None, options: StartOptions = NO_OPTIONS) -> dict[str, Any]:
    """Train the run at ``path`` again and compare the results. Returns plain data.

    ``verdict`` is identical, inside (the interval of its seeds) or different. ``keep``: where the repeated
    run stays; by default it is removed. Raises ``ConfigError`` if the run has not finished, ``RunFailed`` if
    the repetition fails.
    """
    before = _read_finished(path)
    plugin_records.check_file(RunFolder(path).config)
    if keep is not None and keep.exists() and (not keep.is_dir() or any(keep.iterdir())):
        raise ConfigError(f"--keep {keep} exists and is not empty. Give a folder that does not exist yet.")
    with _target_folder(keep) as folder:
        after = _train_again(path, folder, options)
        return _judge(path, before, RunFolder(folder), after) | {"kept": str(keep) if keep else None}


def _read_finished(path: Path) -> dict[str, Any]:
    """Return the result of a finished run."""
    if not path.is_dir():
        raise ConfigError(f"{path}: there is no such folder. Give a run folder, outputs/NAME/RUN.")
    safe.check_links(path)
    result = RunFolder(path).read_result()
    if result.get("status") != "finished":
        raise ConfigError(
            f"{path} has not finished ({result.get('status')}: {result.get('error')}), "
            "so there is nothing to reproduce."
        )
    return result


@contextmanager
def _target_folder(keep: Path | None) -> Any:
    """Give the folder to train in; without ``keep`` it is removed afterwards."""
    if keep is not None:
        yield keep
        return
    with tempfile.TemporaryDirectory(prefix="finetune-reproduce-") as folder:
        yield Path(folder) / "run"


def _train_again(path: Path, folder: Path, options: StartOptions) -> dict[str, Any]:
    """Train in ``folder``, in a process of its own, and return the result.

    The process starts where the run was started, since the settings may hold relative paths. It gets the same
    number of threads, because another number would change the order of sums.
    """
    outputs = path.resolve().parent.parent
    started_in = outputs.parent if outputs.name == "outputs" else Path.cwd()
    command = child_command(__name__, options, str(RunFolder(path.resolve()).config), str(folder.resolve()))
    environment = dict(os.environ)
    threads = RunFolder(path).read_result().get("threads")
    if isinstance(threads, int):
        environment["OMP_NUM_THREADS"] = str(threads)
    done = subprocess.run(command, cwd=started_in, stdout=subprocess.DEVNULL, env=environment)
    if done.returncode:
        code = done.returncode
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        raise RunFailed(f"{path} could not be run again ({how}); the lines above say why.")
    return RunFolder(folder).read_result()


def _judge(
    path: Path, before: Mapping[str, Any], repeated: RunFolder, after: Mapping[str, Any]
) -> dict[str, Any]:
    """Compare the results of a run and of its repetition."""
    test_before, test_after = _test_metrics(before), _test_metrics(after)
    metrics = {}
    for key in dict.fromkeys([*test_before, *test_after]):
        metrics[key] = {"before": test_before.get(key), "after": test_after.get(key)}
    changed = _changed_tensors(path / "delta" / "delta.safetensors", repeated.delta / "delta.safetensors")
    key = next((name for name in MAIN if name in metrics), "loss")
    values, interval = _seed_interval(path, before, key)
    value = test_after.get(key)
    same_metrics = all(pair["before"] == pair["after"] for pair in metrics.values())
    if changed == [] and same_metrics:
        verdict = "identical"
    elif interval is not None and value is not None and interval[0] <= value <= interval[1]:
        verdict = "inside"
    else:
        verdict = "different"
    found = {
        "run": str(path),
        "verdict": verdict,
        "metric": key,
        "test": metrics,
        "changed_tensors": changed,
        "seeds": len(values),
        "interval": interval,
        "differs": _environment_differences(before, after),
    }
    return found | {"words": describe_verdict(found)}


def _test_metrics(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return the test metrics of a result; empty if it has none."""
    return (result.get("metrics") or {}).get("test") or {}


def _seed_interval(path: Path, result: Mapping[str, Any], key: str) -> tuple[list[float], list[float] | None]:
    """Return a metric of all runs beside this one that differ only in seed, and the interval for a new seed.

    The run itself is included. The interval is the 95 % prediction interval of Student's t; None for fewer
    than two runs.
    """
    values = []
    for file in sorted(path.resolve().parent.glob("*/result.json")):
        try:
            other = RunFolder(file.parent).read_result()
        except ConfigError:
            continue
        metrics = other.get("metrics")
        test = metrics.get("test") if isinstance(metrics, dict) else None
        value = test.get(key) if isinstance(test, dict) else None
        same_setting = other.get("group_hash") == result.get("group_hash")
        if other.get("status") == "finished" and same_setting and value is not None:
            values.append(float(value))
    count = len(values)
    if count < 2:
        return values, None
    from scipy.special import stdtrit

    t = float(stdtrit(count - 1, (1 + LEVEL) / 2))
    reach = t * statistics.stdev(values) * math.sqrt(1 + 1 / count)
    mean = statistics.fmean(values)
    return values, [mean - reach, mean + reach]


def _environment_differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return the versions, commit and device that have changed, each as [before, after]."""
    versions_before, versions_after = before.get("versions") or {}, after.get("versions") or {}
    pairs = {}
    for name in [*versions_before, *versions_after]:
        pairs[name] = [versions_before.get(name), versions_after.get(name)]
    for name in ("git_commit", "device"):
        pairs[name] = [before.get(name), after.get(name)]
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _changed_tensors(before: Path, after: Path) -> list[str] | None:
    """List the stored tensors that are not the same to the bit; None if a file is missing or damaged."""
    try:
        first, second = _read_tensors(before), _read_tensors(after)
    except (OSError, ValueError, KeyError):
        return None
    return [name for name in dict.fromkeys([*first, *second]) if first.get(name) != second.get(name)]


def _read_tensors(file: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """Return dtype, shape and bytes of each tensor of a safetensors file, without torch."""
    safe.read_tensor_header(file)
    data = file.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    found = {}
    for name, about in json.loads(data[8:start]).items():
        if name != "__metadata__":
            first, last = about["data_offsets"]
            found[name] = about["dtype"], about["shape"], data[start + first : start + last]
    return found


def describe_verdict(found: Mapping[str, Any]) -> str:
    """Say the verdict in a sentence or two."""
    key, tensors = found["metric"], found["changed_tensors"]
    pair = found["test"].get(key, {"before": None, "after": None})
    if None in pair.values():
        metric = f"{key} is missing"
    else:
        metric = f"{key} {pair['before']:.6g} before, {pair['after']:.6g} now"
    if found["verdict"] == "identical":
        return f"Identical: test metrics and stored change agree to the bit ({metric})."
    if tensors is None:
        change = "the change cannot be compared"
    elif tensors:
        change = f"{len(tensors)} stored tensors differ"
    else:
        change = "the change is the same"
    if found["interval"] is None:
        return (
            f"Not identical ({metric}; {change}), and there are no other seeds of this setting beside it "
            "to judge by."
        )
    low, high = found["interval"]
    place = "but inside" if found["verdict"] == "inside" else "and outside"
    return (
        f"Not identical ({metric}; {change}), {place} the interval of its {found['seeds']} seeds, "
        f"[{low:.6g}, {high:.6g}]."
    )


def repeat(config_file: str, target: str, options: StartOptions) -> int:
    """Train the run again in the folder ``target``, in the process that ``reproduce`` starts.

    Nothing is sent to W&B a second time. Returns the exit code.
    """
    from ..training import run

    folder, say = Path(target), print_line
    frozen = load([], config_file=Path(config_file))
    config = replace(frozen, name="reproduce", run=folder.name, logger=LoggerConfig())
    steps = max(1, config.train.steps // 10)

    def progress(done: int, total: int, what: str) -> None:
        if done % steps == 0 or done == total:
            say(f"step {done:,} of {total:,}{what and ': ' + what}")

    run.train(config, folder, say, progress)
    return 0


if __name__ == "__main__":
    child_main(repeat)
