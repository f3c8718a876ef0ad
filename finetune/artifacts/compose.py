"""Add the stored sparse changes of several runs on one base, as LT-SFT does (arXiv 2110.07560).

The result has the form of a run folder, so ``eval``, ``merge`` and ``inspect`` accept it. Its method is a
static sparse one on the changed layers. A new head is trained in place and cannot be added, so it is taken
from one of the runs, as are the data set and all other settings.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config import plugin_records
from ..core.attach import parts, patched
from ..core.changes import SparseChange
from ..core.site import all_sites
from ..core.sparse.switch import add, pack
from ..core.zeros import describe_zeros
from ..errors import ConfigError
from ..registry import get
from ..storage.atomic import STAMP, replacing, write_json_atomic, write_yaml_atomic
from ..storage.delta import read_description, save_delta
from ..storage.run_folder import RunFolder
from ..training.build import method_states
from ..training.prepare import Setup, prepare
from .plain import check_free
from .reopen import place_of, rebuild, run_of


@torch.no_grad()
def sparse_changes(setup: Setup) -> dict[str, SparseChange]:
    """Return the change of each layer of a rebuilt run, by the layer's name, without entries of 0.

    Raises ``ConfigError`` if the run changes anything in another way. The head does not count.
    """
    layers = patched(setup.session.model)
    other = set()  # kinds of parts that are not sparse changes
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
    for state in method_states(setup.session.states):
        other |= {part.describe() for part in parts(state) if part not in on_layers}
    if other or not layers:
        fault = "it trains the head only"
        if other:
            fault = f"it stores {' and '.join(sorted(other))}"
        raise ConfigError(
            f"method={setup.config.method.name} has no sparse change that could be added: {fault}. "
            "Compose runs of sparse methods, for example method=shira."
        )
    return found


def _without_zeros(change: SparseChange) -> SparseChange:
    """Leave out the entries whose change is 0."""
    nonzero = change.values != 0
    return SparseChange(change.index[nonzero], change.values[nonzero])


def _scaled(change: SparseChange, weight: float) -> SparseChange:
    """Multiply a change by a number."""
    return _without_zeros(SparseChange(change.index, weight * change.values))


def conflicts(changes: Sequence[SparseChange]) -> tuple[int, int]:
    """Count the entries that several of ``changes`` move, and those moved in opposite directions."""
    index = torch.cat([change.index for change in changes]).unique()
    count = torch.zeros(len(index), dtype=torch.int16)
    up, down = torch.zeros_like(count), torch.zeros_like(count)
    for change in changes:
        place = torch.searchsorted(index, change.index)
        count[place] += (change.values != 0).to(count.dtype)
        up[place] += (change.values > 0).to(count.dtype)
        down[place] += (change.values < 0).to(count.dtype)
    return int((count > 1).sum()), int(((up > 0) & (down > 0)).sum())


def compose(
    runs: Sequence[Path], out: Path, weights: Sequence[float] | None = None, head: Path | None = None
) -> dict[str, Any]:
    """Write the sum of the runs' changes, each times its weight (1 by default), to ``out``.

    The head is that of the run ``head``, by default the last of ``runs``. Returns what was added and where
    the runs disagree. Raises ``ConfigError``, with nothing written, if the runs do not fit each other.
    """
    if faults := find_faults(runs, out, weights, head):
        raise ConfigError(*faults)
    if weights is None:
        weights = [1.0] * len(runs)
    head_run = len(runs) - 1
    if head:
        head_run = place_of(head, runs)
    changes: list[dict[str, SparseChange]] = []
    about_runs = []
    setup, head_values = None, dict[str, Tensor]()
    for i, run in enumerate(runs):
        rebuilt = rebuild(run)
        try:
            found = sparse_changes(rebuilt)
        except ConfigError as error:
            raise ConfigError(*(f"{run}: {fault}" for fault in error.faults)) from None
        weighted = {layer: _scaled(change, weights[i]) for layer, change in found.items()}
        changes.append(weighted)
        entries = sum(len(change.index) for change in weighted.values())
        method = rebuilt.config.method.name
        about_runs.append({"run": str(run), "method": method, "weight": weights[i], "entries": entries})
        if i == head_run:
            setup = rebuilt
            head_values = {name: t.clone() for name, t in _head(rebuilt).state_dict().items()}
    assert setup is not None
    rows, total = _sum_by_layer(setup, changes)
    composed = _as_run(setup, rows, total, head_values)
    entries = sum(len(change.index) for change in total.values())
    summary = {
        "runs": about_runs,
        "head": str(runs[head_run]) if head_values else None,
        "entries": entries,
        "density": entries / sum(row["size"] for row in rows),
        "conflicts": sum(row["conflicts"] for row in rows),
        "opposite_signs": sum(row["opposite_signs"] for row in rows),
    }
    _write(out, composed, summary, rows)
    return {"out": str(out), **summary, "notes": _notes(runs, head_run, bool(head_values)), "layers": rows}


def _write(out: Path, composed: Setup, summary: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the composed run: its configuration, its change, and ``compose.json``."""
    with replacing(out) as temporary:
        files = RunFolder(temporary)
        temporary.mkdir()
        write_yaml_atomic(files.config, composed.config.as_dict(), plugin_records.comments(composed.config))
        about = {
            "method": composed.config.method.name,
            "config": composed.config.as_dict(),
            "task": composed.base.task,
            "labels": list(composed.labels),
            "head": list(composed.base.head),
            "step": 0,
            "phase": 0,
            "base_fingerprint": composed.fingerprint,
            **describe_zeros(composed.session.model),
            "composed": summary,
        }
        save_delta(files.delta, composed.session.states, about)
        write_json_atomic(temporary / "compose.json", {**STAMP, **summary, "layers": rows})


def find_faults(
    runs: Sequence[Path], out: Path | None, weights: Sequence[float] | None, head: Path | None
) -> list[str]:
    """Return every fault that can be found without reading a model. What is None is not looked at."""
    faults = []
    if len(runs) < 2:
        faults.append(
            f"compose adds at least two runs, but the number given is {len(runs)}: "
            "finetune compose RUN1 RUN2 out=DIR."
        )
    if weights is not None and len(weights) != len(runs):
        given = ",".join(f"{weight:g}" for weight in weights)
        faults.append(f"weights={given} has {len(weights)} numbers for {len(runs)} runs; give one for each.")
    for weight in weights or ():
        if not math.isfinite(weight):
            faults.append(f"weights: {weight} is not a finite number.")
    try:
        if out:
            check_free(out)
    except ConfigError as error:
        faults += error.faults
    by_base: dict[str, list[str]] = {}
    for run in runs:
        try:
            fingerprint = read_description(run_of(run)[0].delta)["base_fingerprint"]
        except ConfigError as error:
            faults += [fault.replace("ckpt=", "", 1) for fault in error.faults]
        else:
            by_base.setdefault(fingerprint, []).append(str(run))
    if len(by_base) > 1:
        named = [f"{', '.join(members)} on {fingerprint[:8]}" for fingerprint, members in by_base.items()]
        faults.append(
            f"The runs were trained on different bases, so their changes cannot be added: {'; '.join(named)}."
        )
    if head and place_of(head, runs) < 0:
        known = ", ".join(str(run) for run in runs)
        faults.append(f"head={head} is not one of the runs named; take one of {known}.")
    return faults


def _head(setup: Setup) -> nn.Module:
    """Return the state of the head; an empty module for a language model."""
    states: nn.ModuleDict = setup.session.states
    return states["head"] if "head" in states else nn.Module()


def _sum_by_layer(
    setup: Setup, changes: Sequence[Mapping[str, SparseChange]]
) -> tuple[list[dict[str, Any]], dict[str, SparseChange]]:
    """Return a row for each layer that some run changes, in the model's order, and the sum of its changes."""
    rows, total = [], {}
    unchanged = SparseChange(torch.zeros(0, dtype=torch.int64), torch.zeros(0))
    for site in all_sites(setup.session.model):
        of_layer = [by_layer.get(site.name, unchanged) for by_layer in changes]
        if all(change is unchanged for change in of_layer):
            continue
        total[site.name] = _without_zeros(add(of_layer))
        several, opposite = conflicts(of_layer)
        rows.append(
            {
                "layer": site.name,
                "size": site.size,
                "entries": len(total[site.name].index),
                "conflicts": several,
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
    """Prepare a sparse method on exactly these layers, with the sum as its state; the rest is ``setup``'s."""
    sizes = [row["size"] for row in rows]
    entries = max(1, sum(len(change.index) for change in total.values()))
    method = get("method", "sparse")(targets=tuple(total), sparsity=round(1 - entries / sum(sizes), 9))
    selector = get("selector", "none")()
    config = replace(setup.config, name=None, run=None, method=method, selector=selector)
    composed = prepare(config, trains=False)
    state: Any = composed.session.states["method"]
    state["bank"].unpack(pack(list(total.values()), sizes))
    if head:
        _head(composed).load_state_dict(dict(head))
    return composed


def _notes(runs: Sequence[Path], head_run: int, has_head: bool) -> list[str]:
    """Return notes that a user should read besides the numbers."""
    notes = []
    seen = set()
    for run in runs:
        if run.resolve() in seen:
            notes.append(f"{run} is named more than once: its change counts each time.")
        seen.add(run.resolve())
    if has_head:
        notes.append(
            f"The head, the data set and the settings are those of {runs[head_run]}: "
            "heads are trained in place and cannot be added."
        )
    else:
        notes.append(f"There is no new head; the data set and the settings are those of {runs[head_run]}.")
    return notes
