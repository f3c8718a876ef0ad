"""Show the update geometry of a run, as ``finetune inspect`` measures it: a table and plots."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..core.analysis import Curves, HeatMap, Plot

if TYPE_CHECKING:
    from rich.table import Table

Inspection = Mapping[str, Any]  # the whole result
Measurements = Mapping[str, Any]  # of one layer, or of all layers of a role, a block or the model
OVERLAPS = {"magnitude": "|w|", "gradient": "|g|", "principal": "princ.", "low": "low"}
MASKS = {"changed": "the changed entries", "changed_bf16": "the entries that differ in bfloat16"}


@dataclass(frozen=True)
class InspectionTable:
    """A table with a line for each role, each block and the whole model; overlaps are multiples of chance."""

    result: Inspection

    def __rich__(self) -> Table:
        from rich.box import SIMPLE_HEAD
        from rich.table import Column, Table

        overlaps = [name for name in OVERLAPS if name in self.result["total"]["overlap"]]
        table = Table(Column("", no_wrap=True), box=SIMPLE_HEAD, padding=0, show_edge=False)
        for heading in ("changed", "bf16", "norm", "rank", "NSS", "angle"):
            table.add_column(heading, justify="right", no_wrap=True)
        for name in overlaps:
            table.add_column(OVERLAPS[name], justify="right", no_wrap=True)
        for role in self.result["roles"]:
            table.add_row(str(role["role"]), *_make_cells(role, overlaps))
        table.add_section()
        for block in self.result["blocks"]:
            name = f"block {block['block']}" if block["block"] >= 0 else "no block"
            table.add_row(name, *_make_cells(block, overlaps))
        table.add_section()
        table.add_row("all", *_make_cells(self.result["total"], overlaps))
        table.add_section()
        table.caption = explain_columns(self.result)
        table.caption_justify = "left"
        return table


def _make_cells(measured: Measurements, overlaps: Sequence[str]) -> list[str]:
    """Return the text of every column but the first."""
    cells = [
        f"{100 * measured['density']:.3g}%",
        f"{100 * measured['density_bf16']:.3g}%",
        f"{measured['relative_norm']:.2g}",
        f"{measured['effective_rank']:.1f}",
        f"{measured['nss']:.2g}",
        f"{max(measured['angle_left'], measured['angle_right']):.1f}°",
    ]
    for name in overlaps:
        cells.append(_show_multiple(measured["overlap"][name]))
    return cells


def _show_multiple(overlap: Measurements) -> str:
    """Return an overlap as a multiple of chance."""
    if overlap["share"] is None or not overlap["chance"]:
        return "-"
    return f"x{overlap['share'] / overlap['chance']:.3g}"


def explain_columns(result: Inspection) -> str:
    """Return what the columns of the table mean."""
    share, rank, mask = f"{100 * result['alpha']:g} %", result["rank"], MASKS[result["mask"]]
    return (
        "changed: share of entries that changed; bf16: share that changed after rounding to bfloat16; "
        "norm: |dW| / |W|; rank: effective rank of dW; NSS: relative change of the singular values; "
        f"angle: the largest angle between the first {rank} singular directions before and after. "
        f"Overlaps of {mask}, as multiples of chance, with the same number of largest entries of |w| and "
        f"|g|, with the {share} largest entries of the rank-{rank} part of W (princ.), "
        f"and with the {share} smallest entries of |w| (low)."
    )


def summarise(result: Inspection) -> list[str]:
    """Return lines about what the table leaves out: parameters outside of layers, and churn."""
    lines = [f"{result['method']}, step {result['step']}, weights in {result['dtype']}"]
    changed = [parameter["changed"] for parameter in result["others"] if parameter["changed"]]
    if changed:
        lines.append(
            f"changed outside of the layers: {sum(changed):,} entries of {len(changed)} embeddings, norms, "
            "biases and the like"
        )
    churn = [move["churn"] for move in result["churn"]]
    if churn:
        lines.append(
            f"churn: {len(churn)} moves; the share of new entries was {churn[0]:.3g} in the first "
            f"and {churn[-1]:.3g} in the last"
        )
    return lines


def make_plots(result: Inspection) -> list[Plot]:
    """Return the plots that the result has data for."""
    plots: list[Plot] = []
    if result["layers"]:
        mask = result["mask"]

        def find_density(layers: Sequence[Measurements]) -> float:
            return float(sum(layer[mask] for layer in layers) / sum(layer["entries"] for layer in layers))

        plots.append(_make_heat_map("density", f"share of {MASKS[mask]}", result, find_density))
        plots.append(_make_heat_map("relative_norm", "|dW| / |W|", result, _find_relative_norm))
    if result["churn"]:
        y_label = "share of trained entries that are new"
        steps = [move["step"] for move in result["churn"]]
        shares = {"churn": [move["churn"] for move in result["churn"]]}
        title = f"{result['method']}: churn"
        plots.append(Curves("churn", title, "step", y_label, steps, shares, from_zero=True))
    return plots


def _make_heat_map(
    name: str, title: str, result: Inspection, measure: Callable[[Sequence[Measurements]], float]
) -> HeatMap:
    blocks, roles, values = make_grid(result["layers"], measure)
    names = [str(block) if block >= 0 else "-" for block in blocks]  # "-": outside of all blocks
    return HeatMap(name, f"{result['method']}: {title}", "role", "block", roles, names, values)


def _find_relative_norm(layers: Sequence[Measurements]) -> float:
    change = math.sqrt(sum(layer["change_norm"] ** 2 for layer in layers))
    weight = math.sqrt(sum(layer["weight_norm"] ** 2 for layer in layers))
    return change / weight if weight else 0.0


def make_grid(
    layers: Sequence[Measurements], measure: Callable[[Sequence[Measurements]], float]
) -> tuple[list[int], list[str], list[list[float]]]:
    """Return the blocks, the roles, and a value for each pair; NaN if there is no such layer."""
    cells: dict[tuple[int, str], list[Measurements]] = {}
    for layer in layers:
        cells.setdefault((layer["block"], layer["role"]), []).append(layer)
    blocks = sorted({block for block, _ in cells})
    roles = list(dict.fromkeys(role for _, role in cells))
    values = []
    for block in blocks:
        line = []
        for role in roles:
            cell = cells.get((block, role))
            line.append(measure(cell) if cell else math.nan)
        values.append(line)
    return blocks, roles, values
