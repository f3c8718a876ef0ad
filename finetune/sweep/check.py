"""Find data, models, methods and optimizers that do not fit, before any run of a sweep starts.

Such faults would end runs before their first step. Imports no torch.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

from .. import registry
from ..config import strict
from ..config.settings import Config
from ..errors import ConfigError
from ..launch.forkserver import server_context
from ..launch.start import NO_OPTIONS, StartOptions
from ..system.environment import child_environment
from .grid import Point, labels_of_some


def check(runs: Sequence[Point], retry: bool = False, options: StartOptions = NO_OPTIONS) -> None:
    """Raise ``ConfigError`` with every such fault of the ``runs`` that will start.

    Runs that failed before are checked only with ``retry``. Each data set and model is read once, in another
    process.
    """
    alike: dict[str, list[Point]] = {}  # points whose checks are the same
    for point in runs:
        kept = point.folder.result.is_file() and (point.folder.finished or not retry)
        if not kept:
            config = point.config
            parts = [config.section(kind.name) for kind in registry.top_level()]
            parts.append(config.streams)
            machine = (config.train.device, config.train.precision)
            alike.setdefault(repr((parts, machine)), []).append(point)
    if not alike:
        return
    # Neighbours share their data set and model, so that these are read once.
    groups = sorted(alike.values(), key=lambda group: repr((group[0].config.dataset, group[0].config.model)))
    found = _faults_in_child([group[0].config for group in groups], options)
    points_with: dict[str, list[Point]] = {}
    for group, faults in zip(groups, found, strict=True):
        for fault in faults:
            points_with.setdefault(fault, []).extend(group)
    lines = []
    for fault, points in points_with.items():
        labels = [point.label for point in points]
        lines.append(f"{fault}{labels_of_some(labels, len(runs))}")
    if lines:
        raise ConfigError(*lines)


def _faults_in_child(configs: list[Config], options: StartOptions) -> list[tuple[str, ...]]:
    """Call ``faults_of`` in a process of its own.

    If that process is killed, no faults are returned: a run will fail for the same reason.
    """
    server = server_context(child_environment(1, None))
    receiver, sender = server.Pipe(duplex=False)
    settings = [config.as_dict() for config in configs]
    process = server.Process(target=_send_faults, args=(settings, options, sender), daemon=True)
    process.start()
    sender.close()
    try:
        result: list[tuple[str, ...]] = receiver.recv()
        return result
    except EOFError:
        return [()] * len(configs)
    finally:
        process.kill()  # it ignores SIGTERM, as the fork server does
        process.join()


def _send_faults(settings: list[dict[str, Any]], options: StartOptions, sender: Connection) -> None:
    """Apply ``options``, build the configurations and send their faults, in the child process."""
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 1)
    os.dup2(null, 2)
    options.apply()
    configs = [strict.build(strict.Composed(values, {})) for values in settings]
    sender.send(faults_of(configs))


def faults_of(configs: Sequence[Config]) -> list[tuple[str, ...]]:
    """Return the faults of each configuration; an error other than a ``ConfigError`` is not reported."""
    known: dict[str, Any] = {}
    faults: list[tuple[str, ...]] = []
    for config in configs:
        try:
            _build(config, known)
            faults.append(())
        except ConfigError as error:
            faults.append(error.faults)
            known.pop("base", None)  # parts of the failed method may be attached to it
        except Exception:
            faults.append(())  # the run will fail with the same error; the other runs are still checked
            known.pop("base", None)
    return faults


def _build(config: Config, known: dict[str, Any]) -> None:
    """Read data and model, and build the method and the optimizer as a run does.

    ``known`` keeps the last data set and model.
    """
    from ..core.attach import detach
    from ..data.encode import encode
    from ..models.load import load
    from ..training.build import build_states, take_base
    from ..training.optimizer import make_optimizer
    from ..training.prepare import check_machine
    from ..training.streams import read_streams

    check_machine(config)
    what = repr((config.dataset, config.streams, config.train.batch_size, config.model))
    if known.get("what") != what or "base" not in known:
        known.clear()
        raw = config.dataset.read()
        base = load(config.model, raw.task, raw.labels, config.seed)
        encode(raw, base.processor)
        read_streams(config, raw, base.processor)
        known.update(what=what, base=base)
    base = known["base"]
    pretrained = take_base(base, config.method)
    for phase in config.method.phases():
        states = build_states(pretrained, phase.method, config.selector)
        make_optimizer(states, config.optimizer)
        detach(base.model, states)
