"""A finished run once more, from its frozen configuration: is the result the same?

The repetition is a process of its own in a scratch folder; the run's own folder is only read. Imports no torch.
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

from ..config import plugins
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
    """Run ``path`` again and say what came of it, as plain data; ``verdict`` is identical, inside (the seeds' interval) or different.

    ``keep``: where the repetition stays; by default it is removed. Raises ``ConfigError`` for no finished run, ``RunFailed`` if it fails.
    """
    before = _finished(path)
    plugins.check_file(RunFolder(path).config)
    if keep is not None and keep.exists() and (not keep.is_dir() or any(keep.iterdir())):
        raise ConfigError(f"--keep {keep} exists and is not empty. Give a folder that does not exist yet.")
    with _scratch(keep) as folder:
        after = _again(path, folder, options)
        return _judge(path, before, RunFolder(folder), after) | {"kept": str(keep) if keep else None}


def _finished(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise ConfigError(f"{path}: there is no such folder. Give a run folder, outputs/NAME/RUN.")
    safe.check_links(path)
    result = RunFolder(path).read_result()
    if result.get("status") != "finished":
        raise ConfigError(
            f"{path} has not finished ({result.get('status')}: {result.get('error')}), so there is nothing to reproduce."
        )
    return result


@contextmanager
def _scratch(keep: Path | None) -> Any:
    if keep is not None:
        yield keep
        return
    with tempfile.TemporaryDirectory(prefix="finetune-reproduce-") as folder:
        yield Path(folder) / "run"


def _again(path: Path, folder: Path, options: StartOptions) -> dict[str, Any]:
    """Train in ``folder``, from where the run was started, since its settings may hold relative paths."""
    outputs = path.resolve().parent.parent
    started = outputs.parent if outputs.name == "outputs" else Path.cwd()
    command = child_command(__name__, options, str(RunFolder(path.resolve()).config), str(folder.resolve()))
    threads = RunFolder(path).read_result().get("threads")
    same = (
        {"OMP_NUM_THREADS": str(threads)} if isinstance(threads, int) else {}
    )  # another number adds up in another order
    done = subprocess.run(command, cwd=started, stdout=subprocess.DEVNULL, env={**os.environ, **same})
    if done.returncode:
        how = f"signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
        raise RunFailed(f"{path} could not be run again ({how}); what is above says why.")
    return RunFolder(folder).read_result()


def _judge(
    path: Path, before: Mapping[str, Any], again: RunFolder, after: Mapping[str, Any]
) -> dict[str, Any]:
    tests = [(result.get("metrics") or {}).get("test") or {} for result in (before, after)]
    metrics = {
        key: {"before": tests[0].get(key), "after": tests[1].get(key)}
        for key in dict.fromkeys([*tests[0], *tests[1]])
    }
    change = _changed(path / "delta" / "delta.safetensors", again.delta / "delta.safetensors")
    same = change == [] and all(pair["before"] == pair["after"] for pair in metrics.values())
    key = next((name for name in MAIN if name in metrics), "loss")
    values, interval = _seeds(path, before, key)
    told = tests[1].get(key)
    inside = interval is not None and told is not None and interval[0] <= told <= interval[1]
    verdict = "identical" if same else "inside" if inside else "different"
    found = {
        "run": str(path),
        "verdict": verdict,
        "metric": key,
        "test": metrics,
        "changed_tensors": change,
        "seeds": len(values),
        "interval": interval,
        "differs": _differences(before, after),
    }
    return found | {"words": words(found)}


def _seeds(path: Path, result: Mapping[str, Any], key: str) -> tuple[list[float], list[float] | None]:
    """The values of the seeds of this setting that lie beside the run, itself included, and where 95 % of further ones would lie."""
    values = []
    for file in sorted(path.resolve().parent.glob("*/result.json")):
        try:
            other = RunFolder(file.parent).read_result()
        except ConfigError:
            continue
        metrics = other.get("metrics")
        test = metrics.get("test") if isinstance(metrics, dict) else None
        value = test.get(key) if isinstance(test, dict) else None
        if (
            other.get("status") == "finished"
            and other.get("group_hash") == result.get("group_hash")
            and value is not None
        ):
            values.append(float(value))
    if len(values) < 2:
        return values, None
    from scipy.special import stdtrit

    reach = (
        float(stdtrit(len(values) - 1, (1 + LEVEL) / 2))
        * statistics.stdev(values)
        * math.sqrt(1 + 1 / len(values))
    )
    return values, [statistics.fmean(values) - reach, statistics.fmean(values) + reach]


def _differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Versions, commit and device that are not as they were: before and now."""
    pairs = {
        name: [(result.get("versions") or {}).get(name) for result in (before, after)]
        for name in _names(before, after)
    }
    pairs |= {key: [before.get(key), after.get(key)] for key in ("git_commit", "device")}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _names(*results: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(name for result in results for name in result.get("versions") or {}))


def _changed(before: Path, after: Path) -> list[str] | None:
    """The names of stored tensors that are not the same to the bit; ``None`` where there is nothing to compare with."""
    try:
        first, second = _tensors(before), _tensors(after)
    except (OSError, ValueError, KeyError):
        return None
    return [name for name in dict.fromkeys([*first, *second]) if first.get(name) != second.get(name)]


def _tensors(file: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """Type, shape and bytes of each tensor of a safetensors file."""
    safe.tensors_of(file)
    data = file.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    return {
        name: (
            about["dtype"],
            about["shape"],
            data[start + about["data_offsets"][0] : start + about["data_offsets"][1]],
        )
        for name, about in header.items()
        if name != "__metadata__"
    }


def words(found: Mapping[str, Any]) -> str:
    """The verdict in a sentence or two."""
    key, pair = found["metric"], found["test"].get(found["metric"], {"before": None, "after": None})
    was = (
        f"{key} {pair['before']:.6g} before, {pair['after']:.6g} now"
        if None not in pair.values()
        else f"{key} is missing"
    )
    if found["verdict"] == "identical":
        return f"Identical: test metrics and stored change agree to the bit ({was})."
    tensors = found["changed_tensors"]
    change = (
        f"{len(tensors)} stored tensors differ"
        if tensors
        else "the change cannot be compared"
        if tensors is None
        else "the change is the same"
    )
    if found["interval"] is None:
        return f"Not identical ({was}; {change}), and there are no other seeds of this setting beside it to judge by."
    low, high = found["interval"]
    place = "but inside" if found["verdict"] == "inside" else "and outside"
    return f"Not identical ({was}; {change}), {place} the interval of its {found['seeds']} seeds, [{low:.6g}, {high:.6g}]."


def repeat(config_file: str, target: str, options: StartOptions) -> int:
    """Train the run again in the folder ``target``; what the process for ``reproduce`` runs. Nothing is sent to W&B a second time."""
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
