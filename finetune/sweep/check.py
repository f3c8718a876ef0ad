"""What would end runs of a sweep before their first step: data, models and methods that do not fit. Found before any run starts. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

from ..config import strict
from ..config.settings import Config
from ..errors import ConfigError
from ..launch.forkserver import context
from ..launch.start import NO_OPTIONS, StartOptions
from .grid import Point, where
from .process import environment


def check(runs: Sequence[Point], retry: bool = False, options: StartOptions = NO_OPTIONS) -> None:
    """Raise ``ConfigError`` with every such fault of the ``runs`` that are to be made, those that failed before only with ``retry``.

    Each data set and model is read once, in another process.
    """
    kinds: dict[str, list[Point]] = {}
    for point in runs:
        if not (point.folder.result.is_file() and (point.folder.finished or not retry)):
            config = point.config
            what = (
                config.model,
                config.dataset,
                config.method,
                config.selector,
                config.train.device,
                config.train.precision,
            )
            kinds.setdefault(repr(what), []).append(point)
    together = sorted(
        kinds.values(), key=lambda points: repr((points[0].config.dataset, points[0].config.model))
    )
    found = _elsewhere([points[0].config for points in together], options) if together else []
    told: dict[str, list[Point]] = {}
    for points, faults in zip(together, found, strict=True):
        for fault in faults:
            told.setdefault(fault, []).extend(points)
    if told:
        raise ConfigError(
            *(
                f"{fault}{where([point.label for point in points], len(runs))}"
                for fault, points in told.items()
            )
        )


def _elsewhere(configs: list[Config], options: StartOptions) -> list[tuple[str, ...]]:
    """``faults_of``, in a process of its own; no faults where that was ended: a run will meet what ended it."""
    server = context(environment(1, None))
    receiver, sender = server.Pipe(duplex=False)
    process = server.Process(
        target=_send, args=([config.as_dict() for config in configs], options, sender), daemon=True
    )
    process.start()
    sender.close()
    try:
        result: list[tuple[str, ...]] = receiver.recv()
        return result
    except EOFError:
        return [()] * len(configs)
    finally:
        process.terminate()
        process.join()


def _send(settings: list[dict[str, Any]], options: StartOptions, sender: Connection) -> None:
    nowhere = os.open(os.devnull, os.O_RDWR)
    for standard in (1, 2):
        os.dup2(nowhere, standard)
    options.apply()
    sender.send(faults_of([strict.build(strict.Composed(values, {})) for values in settings]))


def faults_of(configs: Sequence[Config]) -> list[tuple[str, ...]]:
    """The faults of each configuration."""
    known: dict[str, Any] = {}
    faults: list[tuple[str, ...]] = []
    for config in configs:
        try:
            _try(config, known)
            faults.append(())
        except ConfigError as error:
            faults.append(error.faults)
            known.pop("base", None)  # it may be patched in part
    return faults


def _try(config: Config, known: dict[str, Any]) -> None:
    """Read and build as a run does; ``known`` keeps the last data set and model."""
    from ..core.part import detach
    from ..data.encode import encode
    from ..models.load import load, original_parameters
    from ..training.build import Pretrained, build_states
    from ..training.prepare import check_machine

    check_machine(config)
    what = repr((config.dataset, config.model))
    if known.get("what") != what or "base" not in known:
        known.clear()
        raw = config.dataset.read()
        base = load(config.model, raw.task, raw.labels, config.seed)
        encode(raw, base.processor)
        known.update(what=what, base=base)
    base = known["base"]
    pretrained = Pretrained(base.model, base.head, partial(original_parameters, base))
    for phase in config.method.phases():
        detach(base.model, build_states(pretrained, phase.method, config.selector))
