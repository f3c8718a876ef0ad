"""What ``finetune inspect`` found, as a table and as plots."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

Row = Mapping[str, Any]
OVERLAPS = {"magnitude": "|w|", "gradient": "|g|", "principal": "princ.", "low": "low"}
MASKS = {"changed": "the changed entries", "changed_bf16": "the entries that differ in bfloat16"}


@dataclass(frozen=True)
class InspectionTable:
    """A row for each role, each block and all layers together; overlaps as multiples of chance."""

    result: Row

    def __rich__(self) -> Table:
        from rich.box import SIMPLE_HEAD
        from rich.table import Column, Table

        overlaps = [name for name in OVERLAPS if name in self.result["total"]["overlap"]]
        heads = ["changed", "bf16", "norm", "rank", "NSS", "angle", *(OVERLAPS[name] for name in overlaps)]
        columns = [Column("", no_wrap=True), *(Column(head, justify="right", no_wrap=True) for head in heads)]
        table = Table(*columns, box=SIMPLE_HEAD, padding=0, show_edge=False)
        for kind, rows in (
            ("role", self.result["roles"]),
            ("block", self.result["blocks"]),
            ("total", [self.result["total"]]),
        ):
            for row in rows:
                table.add_row(
                    _name(kind, row), *_cells(row), *(_multiple(row["overlap"][name]) for name in overlaps)
                )
            table.add_section()
        table.caption = caption(self.result)
        table.caption_justify = "left"
        return table


def _name(kind: str, row: Row) -> str:
    if kind == "block":
        return f"block {row['block']}" if row["block"] >= 0 else "no block"
    return str(row["role"]) if kind == "role" else "all"


def _cells(row: Row) -> list[str]:
    shares = [f"{100 * row[key]:.3g}%" for key in ("density", "density_bf16")]
    angle = f"{max(row['angle_left'], row['angle_right']):.1f}°"
    return [
        *shares,
        f"{row['relative_norm']:.2g}",
        f"{row['effective_rank']:.1f}",
        f"{row['nss']:.2g}",
        angle,
    ]


def _multiple(overlap: Row) -> str:
    """An overlap as a multiple of chance."""
    return (
        "-"
        if overlap["share"] is None or not overlap["chance"]
        else f"x{overlap['share'] / overlap['chance']:.3g}"
    )


def caption(result: Row) -> str:
    """What the columns mean."""
    share, rank = f"{100 * result['alpha']:g} %", result["rank"]
    return (
        f"bf16: changed when rounded to it; norm: |dW| / |W|; rank: effective rank of dW; NSS: relative change of the singular values; angle: the "
        f"largest between the first {rank} singular directions before and after. Overlaps of {MASKS[result['mask']]}, as multiples of chance: |w|, "
        f"|g|: with as many of the largest; princ.: with the {share} largest by the rank-{rank} part of W; low: with the {share} smallest by |w|."
    )


def summary(result: Row) -> list[str]:
    """Lines on what is no layer: other parameters, churn."""
    lines = [f"{result['method']}, step {result['step']}, weights in {result['dtype']}"]
    rest = [row for row in result["others"] if row["changed"]]
    if rest:
        lines.append(
            f"changed beside the layers: {sum(r['changed'] for r in rest):,} entries of {len(rest)} embeddings, norms, biases and the like"
        )
    if result["churn"]:
        values = [line["churn"] for line in result["churn"]]
        lines.append(
            f"churn: {len(values)} moves, share of new entries {values[0]:.3g} at first, {values[-1]:.3g} at last"
        )
    return lines


def plots(result: Row, folder: Path) -> list[Path]:
    """Write the PNGs that the result has data for into ``folder``, and nothing else; returns their paths."""
    made = []
    folder.mkdir(parents=True, exist_ok=True)
    if result["layers"]:
        made.append(
            _heat_map(
                folder / "density.png",
                f"share of {MASKS[result['mask']]}",
                result,
                lambda rows: _density(rows, result["mask"]),
            )
        )
        made.append(_heat_map(folder / "relative_norm.png", "|dW| / |W|", result, _relative))
    if result["churn"]:
        made.append(_curve(folder / "churn.png", result))
    return made


def _density(rows: Sequence[Row], mask: str) -> float:
    return float(sum(r[mask] for r in rows) / sum(r["entries"] for r in rows))


def _relative(rows: Sequence[Row]) -> float:
    change, weight = (math.sqrt(sum(r[key] ** 2 for r in rows)) for key in ("change_norm", "weight_norm"))
    return change / weight if weight else 0.0


def grid(
    layers: Sequence[Row], value: Callable[[Sequence[Row]], float]
) -> tuple[list[int], list[str], list[list[float]]]:
    """Blocks, roles, and a value for each pair, NaN where there is no such layer."""
    blocks, roles = sorted({r["block"] for r in layers}), list(dict.fromkeys(r["role"] for r in layers))
    cells = [
        [[r for r in layers if (r["block"], r["role"]) == (block, role)] for role in roles]
        for block in blocks
    ]
    return blocks, roles, [[value(cell) if cell else math.nan for cell in row] for row in cells]


def _figure(width: float, height: float) -> tuple[Any, Any]:
    """A figure on the Agg canvas, without pyplot's global state and whatever display there is."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots()


def _heat_map(file: Path, title: str, result: Row, value: Callable[[Sequence[Row]], float]) -> Path:
    blocks, roles, values = grid(result["layers"], value)
    figure, axes = _figure(2.5 + 0.7 * len(roles), 1.8 + 0.28 * len(blocks))
    image = axes.imshow(values, aspect="auto", cmap="viridis", vmin=0)
    axes.set_xticks(range(len(roles)), roles)
    axes.set_yticks(range(len(blocks)), [str(b) if b >= 0 else "-" for b in blocks])
    axes.set_xlabel("role")
    axes.set_ylabel("block")
    axes.set_title(f"{result['method']}: {title}", fontsize=10)
    figure.colorbar(image, ax=axes)
    figure.savefig(file, dpi=120)
    return file


def _curve(file: Path, result: Row) -> Path:
    figure, axes = _figure(5.5, 3.2)
    axes.plot(
        [line["step"] for line in result["churn"]], [line["churn"] for line in result["churn"]], marker="."
    )
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("step")
    axes.set_ylabel("share of trained entries that are new")
    axes.set_ylim(bottom=0)
    axes.set_title(f"{result['method']}: churn", fontsize=10)
    figure.savefig(file, dpi=120)
    return file
