"""Add the stored sparse changes of several runs on one base, as LT-SFT composes them (Ansell et al., 2022, arXiv 2110.07560).

The result is the folder of a run that nobody trained: ``eval``, ``merge`` and ``inspect`` take it. Its method is a static sparse one on the changed
layers. A new head is trained in place and cannot be added: it is that of one run, whose data set and other settings the folder has, too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config import plugins
from ..core.changes import SparseChange
from ..core.part import parts, patched
from ..core.site import all_sites
from ..core.sparse.switch import add, pack
from ..errors import ConfigError
from ..registry import get
from ..storage.atomic import STAMP, replacing, write_json_atomic, write_yaml_atomic
from ..storage.delta import read_description, save_delta
from ..storage.run_folder import RunFolder
from ..training.prepare import Setup, prepare
from .reopen import rebuild, run_of


@torch.no_grad()
def sparse_changes(setup: Setup) -> dict[str, SparseChange]:
    """The change of each layer of a rebuilt run, by the layer's name, without the entries that came back to 0.

    Raises ``ConfigError`` where it changes anything in another way; the head is not looked at.
    """
    layers = patched(setup.session.model)
    other = set()  # the parts that are no sparse change
    on_layers = set()
    found: dict[str, SparseChange] = {}
    for name, layer in layers.items():
        changes = []
        for delta in layer.deltas:
            on_layers.add(delta)
            entries = delta.changes().entries
            if entries is None:
                other.add(delta.describe())
            else:
                changes.append(SparseChange(entries.index.cpu(), entries.values.cpu()))
        if changes:
            found[name] = _without_zeros(add(changes))
    for part in parts(setup.session.states["method"]):
        if part not in on_layers:
            other.add(part.describe())
    if other or not layers:
        what = f"it stores {' and '.join(sorted(other))}" if other else "it trains the head only"
        raise ConfigError(
            f"method={setup.config.method.name} has no sparse change that could be added: {what}. "
            "Compose runs of sparse methods, for example method=shira."
        )
    return found


def _without_zeros(change: SparseChange) -> SparseChange:
    here = change.values != 0
    return SparseChange(change.index[here], change.values[here])


def conflicts(changes: Sequence[SparseChange]) -> tuple[int, int]:
    """How many entries more than one of ``changes`` moves, and how many of those in opposite directions."""
    index = torch.cat([c.index for c in changes]).unique()
    count, up, down = (torch.zeros(len(index), dtype=torch.int16) for _ in range(3))
    for change in changes:
        place = torch.searchsorted(index, change.index)
        for total, hit in ((count, change.values != 0), (up, change.values > 0), (down, change.values < 0)):
            total[place] += hit.to(total.dtype)
    return int((count > 1).sum()), int(((up > 0) & (down > 0)).sum())


def compose(
    runs: Sequence[Path], out: Path, weights: Sequence[float] | None = None, head: Path | None = None
) -> dict[str, Any]:
    """Write the sum of the runs' changes, each times its weight (1 by default), with the head of ``head`` (by default the last run named) to ``out``.

    Returns what was added and where the runs disagree. Raises ``ConfigError``, with nothing written, for runs that do not fit each other.
    """
    weights = [1.0] * len(runs) if weights is None else weights
    _check(runs, out, weights, head)
    chosen = _same(runs, head) if head else len(runs) - 1
    per_run: list[dict[str, SparseChange]] = []
    setup, values, methods = None, dict[str, Tensor](), []
    for i, run in enumerate(runs):
        rebuilt = rebuild(run)
        methods.append(rebuilt.config.method.name)
        try:
            per_run.append(
                {
                    n: _without_zeros(SparseChange(c.index, weights[i] * c.values))
                    for n, c in sparse_changes(rebuilt).items()
                }
            )
        except ConfigError as error:
            raise ConfigError(*(f"{run}: {fault}" for fault in error.faults)) from None
        if i == chosen:
            setup, values = rebuilt, {k: v.clone() for k, v in _head(rebuilt).state_dict().items()}
    assert setup is not None
    rows, total = _added(setup, per_run)
    composed = _as_run(setup, rows, total, values)
    entries = sum(len(c.index) for c in total.values())
    told = {
        "runs": [
            {
                "run": str(run),
                "method": method,
                "weight": weight,
                "entries": sum(len(c.index) for c in part.values()),
            }
            for run, method, weight, part in zip(runs, methods, weights, per_run, strict=True)
        ],
        "head": str(runs[chosen]) if values else None,
        "entries": entries,
        "density": entries / sum(row["size"] for row in rows),
        "conflicts": sum(row["conflicts"] for row in rows),
        "opposite_signs": sum(row["opposite_signs"] for row in rows),
    }
    with replacing(out) as temporary:
        files = RunFolder(temporary)
        temporary.mkdir()
        write_yaml_atomic(files.config, composed.config.as_dict(), plugins.comments(composed.config))
        about = {
            "method": composed.config.method.name, "config": composed.config.as_dict(), "task": composed.base.task, "labels": list(composed.labels),
            "head": list(composed.base.head), "step": 0, "phase": 0, "base_fingerprint": composed.fingerprint, "composed": told,
        }  # fmt: skip
        save_delta(files.delta, composed.session.states, about)
        write_json_atomic(temporary / "compose.json", {**STAMP, **told, "layers": rows})
    return {"out": str(out), **told, "notes": _notes(runs, chosen, bool(values)), "layers": rows}


def _check(runs: Sequence[Path], out: Path, weights: Sequence[float], head: Path | None) -> None:
    """Raise ``ConfigError`` with all that shows before a model is read."""
    faults = []
    if len(runs) < 2:
        faults.append(
            f"compose adds two runs or more, and {len(runs)} is named: finetune compose RUN1 RUN2 out=DIR."
        )
    if len(weights) != len(runs):
        faults.append(
            f"weights={','.join(f'{w:g}' for w in weights)} has {len(weights)} numbers for {len(runs)} runs; give one for each."
        )
    faults += [f"weights: {w} is not a finite number." for w in weights if not math.isfinite(w)]
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        faults.append(f"out={out} exists and is not empty. Choose a new folder.")
    bases: dict[str, list[Path]] = {}
    for run in runs:
        try:
            bases.setdefault(read_description(run_of(run)[0].delta)["base_fingerprint"], []).append(run)
        except ConfigError as error:
            faults += [fault.replace("ckpt=", "", 1) for fault in error.faults]
    if len(bases) > 1:
        named = "; ".join(f"{', '.join(map(str, members))} on {mark[:8]}" for mark, members in bases.items())
        faults.append(f"The runs were trained on different bases, so their changes cannot be added: {named}.")
    if head and _same(runs, head) < 0:
        faults.append(f"head={head} is not one of the runs named; take one of {', '.join(map(str, runs))}.")
    if faults:
        raise ConfigError(*faults)


def _same(runs: Sequence[Path], head: Path) -> int:
    """The place of ``head`` among ``runs``, or -1."""
    return next((i for i, run in enumerate(runs) if run.resolve() == head.resolve()), -1)


def _head(setup: Setup) -> nn.Module:
    """The state of the head; empty for a language model."""
    states: nn.ModuleDict = setup.session.states
    return states["head"] if "head" in states else nn.Module()


def _added(
    setup: Setup, per_run: Sequence[Mapping[str, SparseChange]]
) -> tuple[list[dict[str, Any]], dict[str, SparseChange]]:
    """A row for each layer that any run changes, in the model's order, and the sum of its changes."""
    rows, total = [], {}
    nothing = SparseChange(torch.zeros(0, dtype=torch.int64), torch.zeros(0))
    for site in all_sites(setup.session.model):
        if any(site.name in part for part in per_run):
            mine = [part.get(site.name, nothing) for part in per_run]
            total[site.name] = _without_zeros(add(mine))
            twice, opposite = conflicts(mine)
            entries = len(total[site.name].index)
            rows.append(
                {
                    "layer": site.name,
                    "size": site.size,
                    "entries": entries,
                    "conflicts": twice,
                    "opposite_signs": opposite,
                }
            )
    return rows, total


def _as_run(
    setup: Setup,
    rows: Sequence[Mapping[str, Any]],
    total: Mapping[str, SparseChange],
    head: Mapping[str, Tensor],
) -> Setup:
    """The sum as the state of a sparse method on exactly these layers, in the setting of ``setup``."""
    sizes = [row["size"] for row in rows]
    kept = max(1, sum(len(c.index) for c in total.values()))
    method = get("method", "sparse")(targets=tuple(total), sparsity=round(1 - kept / sum(sizes), 9))
    composed = prepare(
        replace(setup.config, name=None, run=None, method=method, selector=get("selector", "none")())
    )
    state: Any = composed.session.states["method"]
    state["bank"].unpack(pack(list(total.values()), sizes))
    if head:
        _head(composed).load_state_dict(dict(head))
    return composed


def _notes(runs: Sequence[Path], chosen: int, has_head: bool) -> list[str]:
    """What a user should be told beside the numbers."""
    places = [run.resolve() for run in runs]
    twice = [run for i, run in enumerate(runs) if places[i] in places[:i]]
    head = (
        "The head, which is trained in place and cannot be added, the data set"
        if has_head
        else "There is no new head; the data set"
    )
    return [
        *(f"{run} is named more than once: its change counts each time." for run in twice),
        f"{head} and the settings are those of {runs[chosen]}.",
    ]
