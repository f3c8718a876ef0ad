"""Interventions: give attention heads another basis or order, train again, and see where updates fall.

An intervention changes weights and keeps the model's function. The run is trained again from the changed
base, with the same settings, data, order and seed, for as many steps as its stored state has. Then the sets
of changed entries of both runs are compared, matrix by matrix and place by place. If the pretrained weights
steer where updates fall, the overlap is at chance in the matrices that the intervention changed, and only
there.

Formula:
    rotate:  v' = R^T W_v, its bias b R, for each head; o' = W_o R for each head's columns
    permute: heads of keys and values with their queries in another order: rows of q, k, v, columns of o
    R [head width, head width]: one random orthogonal matrix for each block, the same for all of its heads
    jaccard = |A and B| / |A or B|,  chance = p q / (p + q - p q)
    A, B: changed entries of the run and of the one that is trained again; p, q: their shares
    excess = (jaccard - chance) / (1 - chance): 1 for equal sets, 0 at chance

Paper: "The Path Not Taken: RLVR Provably Learns Off the Principals", 2025, arXiv 2511.08567.

Reading: The paper was read. It trains by reinforcement learning; here the run trains on whatever it was
trained on. Entries that differ at all are compared, or, if these are more than half of the matrices that
changed, those whose change bfloat16 shows (definition 2.1 with its tolerance). No head keeps its place
in a permutation, which is a random cycle. A permutation only renames: put back in order, the updates are
those of the run up to rounding, unless the method itself draws random values for a layer, as LoRA does.
``jaccard_in_order`` says how far they are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge
from torch import Tensor, nn

from ..core.analysis import Analysis, HeatMap, Subject, Table
from ..core.anatomy import Anatomy, Block
from ..core.roles import block_of
from ..errors import ConfigError
from ..registry import register
from ..training.prepare import Setup, prepare
from ..training.session import Session
from .geometry import DENSE, Update, mask_unchanged, updates

COLUMNS = ("layer", "intervened", "jaccard", "chance", "excess")  # as many as fit a terminal
TOLERANCE = {"fp32": 1e-4, "bf16": 0.1, "fp16": 0.1}  # of the logits, by precision; the largest logit is 1


@dataclass(frozen=True)
class HeadChange:
    """What is done to the heads of one block.

    ``order`` [kv_heads] int64: which old head of keys and values, with its queries, stands in each place.
    ``rotation`` [head_dim, head_dim] float64 acts on the values of every head. None: nothing is done.
    """

    kv_heads: int
    order: Tensor | None = None
    rotation: Tensor | None = None

    @classmethod
    def draw(cls, kind: str, anatomy: Anatomy, seed: int, block: int) -> HeadChange:
        """Draw the rotation or the order of one block."""
        generator = torch.Generator().manual_seed(hash((seed, block)) % 2**63)
        heads, width = anatomy.kv_heads, anatomy.head_dim
        if kind == "permute":
            cycle = torch.randperm(heads, generator=generator)
            order = torch.empty_like(cycle)
            order[cycle] = cycle.roll(1)
            return cls(heads, order=order)
        q, r = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))
        return cls(heads, rotation=q * r.diagonal().sign())  # with these signs it is uniformly distributed

    def acts_on(self, role: str) -> bool:
        """Tell whether weights of this role are changed."""
        return role in ("v", "o") or (self.order is not None and role in ("q", "k"))

    def map(self, values: Tensor, role: str) -> Tensor:
        """Return the rows of q, k or v [heads * head_dim, ...], or the columns of o as rows, changed."""
        if self.order is not None:
            by_head = values.reshape(self.kv_heads, -1, *values.shape[1:])
            return by_head[self.order.to(values.device)].reshape(values.shape)
        if self.rotation is None or not self.acts_on(role):
            return values
        width = len(self.rotation)
        by_head = values.reshape(-1, width, *values.shape[1:]).double()
        rotated = torch.einsum("de,hd...->he...", self.rotation.to(values.device), by_head)
        return rotated.reshape(values.shape).to(values.dtype)

    def map_matrix(self, matrix: Tensor, role: str) -> Tensor:
        """Return a weight [out, in] of the attention, or a mask of one, changed."""
        if role == "o":
            return self.map(matrix.T, role).T
        if role != "qkv":
            return self.map(matrix, role)
        q, k, v = matrix.chunk(3)
        return torch.cat([self.map(q, "q"), self.map(k, "k"), self.map(v, "v")])

    def put_in_order(self, mask: Tensor, role: str) -> Tensor:
        """Undo the order in a mask [out, in] of a changed weight."""
        assert self.order is not None
        return HeadChange(self.kv_heads, order=self.order.argsort()).map_matrix(mask, role)


@torch.no_grad()
def change_block(block: Block, change: HeadChange) -> None:
    """Change the attention weights of a block in place; what the block computes stays the same."""
    for role, site in block.attention.sites.items():
        weight = site.as_matrix(site.module.get_parameter("weight"))  # a view
        weight.copy_(change.map_matrix(weight.clone(), role))
        bias = dict(site.module.named_parameters()).get("bias")
        if bias is not None and role != "o":
            bias.copy_(change.map_matrix(bias.clone()[:, None], role)[:, 0])


@torch.no_grad()
def measure_function_error(first: nn.Module, second: nn.Module, inputs: Mapping[str, Tensor]) -> float:
    """Return the largest difference of two models' logits on a batch, divided by the largest logit."""
    wanted, given = first.eval()(**inputs).logits.double(), second.eval()(**inputs).logits.double()
    return float((wanted - given).abs().max() / wanted.abs().max())


@dataclass(frozen=True)
class Entries:
    """The changed entries of the matrix of a role in a block, as a mask [out, in]."""

    role: str
    block: int
    mask: Tensor


@dataclass
class Overlap:
    """Sums over matrices, from which the overlap of two sets of entries follows."""

    both: int = 0
    either: int = 0
    chance_both: float = 0.0
    chance_either: float = 0.0

    def add(self, first: Tensor, second: Tensor) -> None:
        """Add the sets of one matrix, given as masks."""
        self.both += int((first & second).sum())
        self.either += int((first | second).sum())
        p, q = float(first.double().mean()), float(second.double().mean())
        self.chance_both += p * q * first.numel()
        self.chance_either += (p + q - p * q) * first.numel()

    @property
    def jaccard(self) -> float | None:
        """Return the share of the entries in either set that are in both; None for empty sets."""
        return self.both / self.either if self.either else None

    @property
    def chance(self) -> float | None:
        """Return the overlap of independent random sets of the same sizes."""
        return self.chance_both / self.chance_either if self.chance_either else None

    @property
    def excess(self) -> float | None:
        """Return 1 for equal sets and 0 at chance; None where chance gives equal sets."""
        jaccard, chance = self.jaccard, self.chance
        if jaccard is None or chance is None or chance == 1:
            return None
        return (jaccard - chance) / (1 - chance)


@register("interventions")
@dataclass(frozen=True)
class Interventions(Analysis):
    """Interventions: whether updates follow the pretrained weights when attention heads are changed.

    Options:
        kind: ``rotate`` gives the values of all heads another basis, ``permute`` gives the heads another
            order.
        blocks: Numbers of the blocks to change; by default every second one, from the first.
        seed: Decides rotations and orders.
    """

    kind: Literal["rotate", "permute"] = "rotate"
    blocks: tuple[Annotated[int, Ge(0)], ...] = ()
    seed: Annotated[int, Ge(0)] = 0

    def __call__(self, *subjects: Subject) -> Table:
        """Train a run again from the changed base, and compare, with a row for each matrix.

        Raises ``ConfigError`` for a model without a known anatomy, blocks that it does not have, and a run
        whose changes do not reach the matrices that are changed.
        """
        (subject,) = subjects
        setup = subject.open()
        if setup.config.train.batch_size == "auto":
            raise ConfigError(
                f"what={self.name} trains {subject.path} again, and its train.batch_size=auto was found by "
                "the memory of that time. Name a run with a number there."
            )
        before, in_bf16 = _find_changed(setup, None)
        config = setup.config
        del setup
        fresh = prepare(config)
        changes, error, session = self._change_base(fresh, subject)
        if not any(_is_changed(found, changes) for found in before.values()):
            raise ConfigError(
                f"what={self.name} changes attention weights, and {subject.path} changed none of those in "
                f"the blocks {', '.join(map(str, changes))}. Choose other blocks, or a run that adapts the "
                "attention."
            )
        with closing(session.steps()) as steps:
            for step in steps:
                if step.number == subject.step:
                    break
        after, _ = _find_changed(replace(fresh, session=session), in_bf16)
        table = self._compare(before, after, changes)
        summary = {"function_error": error, "tolerance": TOLERANCE[config.train.precision]}
        mask = "changed_bf16" if in_bf16 else "changed"
        details = {"mask": mask, "blocks": list(changes), "step": subject.step}
        return replace(table, summary={**table.summary, **summary}, details={**details, **table.details})

    def _change_base(self, setup: Setup, subject: Subject) -> tuple[dict[int, HeadChange], float, Session]:
        """Return the change of each block, the error of the function, and a session on the new base.

        Raises ``ConfigError`` if the model cannot be changed so, or does not keep its function.
        """
        pretrained, device = setup.session.pretrained, setup.session.accelerator.device
        assert pretrained.reload is not None
        read = pretrained.reload
        plain = read()
        changes = self._draw_changes(Anatomy.of(plain), subject)

        def read_changed() -> nn.Module:
            model = read()
            for block in Anatomy.of(model).blocks:
                if block_of(block.name) in changes:
                    change_block(block, changes[block_of(block.name)])
            return model

        model = read_changed()
        batch = next(part for step in setup.session.batches.steps(0, 1) for part in step if part)
        inputs = setup.session.compute.on_device(batch.inputs)
        with setup.session.accelerator.autocast():
            error = measure_function_error(plain.to(device), model.to(device), inputs)
        del plain
        if not error <= TOLERANCE[setup.config.train.precision]:
            raise ConfigError(
                f"what={self.name} kind={self.kind} does not keep the function of the model of "
                f"{subject.path}: its logits differ by {error:.2g} of the largest. Take a run of another "
                "model."
            )
        changed = replace(pretrained, model=model, reload=read_changed, source=None)
        session = Session(changed, setup.session.recipe, setup.session.batches, setup.session.accelerator)
        session.check_objectives()
        return changes, error, session

    def _draw_changes(self, anatomy: Anatomy, subject: Subject) -> dict[int, HeadChange]:
        """Return the change of each block by its number."""
        known = [block_of(block.name) for block in anatomy.blocks]
        chosen = sorted({*self.blocks}) or known[::2]
        if wrong := [str(number) for number in chosen if number not in known]:
            raise ConfigError(
                f"what.blocks: the model of {subject.path} has no block {', '.join(wrong)}; its last is "
                f"{known[-1]}."
            )
        if self.kind == "permute" and anatomy.kv_heads < 2:
            raise ConfigError(
                f"what.kind=permute needs two heads of keys and values or more, and the model of "
                f"{subject.path} has one. Take kind=rotate."
            )
        drawn = {}
        for number in chosen:
            drawn[number] = HeadChange.draw(self.kind, anatomy, self.seed, number)
        return drawn

    def _compare(
        self, before: Mapping[str, Entries], after: Mapping[str, Entries], changes: Mapping[int, HeadChange]
    ) -> Table:
        """Compare the changed entries of two runs, with a row for each matrix."""
        there, elsewhere, in_order = Overlap(), Overlap(), Overlap()
        layers: list[dict[str, Any]] = []
        for name, found in before.items():
            first, second = found.mask, after[name].mask
            own, ordered, is_changed = Overlap(), Overlap(), _is_changed(found, changes)
            own.add(first, second)
            (there if is_changed else elsewhere).add(first, second)
            if is_changed and self.kind == "permute":
                renamed = changes[found.block].put_in_order(second, found.role)
                ordered.add(first, renamed)
                in_order.add(first, renamed)
            layers.append(
                {
                    "layer": name,
                    "intervened": is_changed,
                    "density": float(first.double().mean()),
                    "density_again": float(second.double().mean()),
                    "jaccard": own.jaccard,
                    "chance": own.chance,
                    "excess": own.excess,
                    "jaccard_in_order": ordered.jaccard,
                }
            )
        summary: dict[str, Any] = {"kind": self.kind}
        for place, overlap in (("intervened", there), ("elsewhere", elsewhere)):
            for measure in ("jaccard", "chance", "excess"):
                summary[f"{measure}_{place}"] = getattr(overlap, measure)
        summary["jaccard_in_order"] = in_order.jaccard
        notes = ["An excess of 1 means that both runs changed the same entries, 0 that they agree by chance."]
        rows = []
        for layer in layers:
            rows.append({key: layer[key] for key in COLUMNS})
        return Table(rows, summary, {"layers": layers}, notes, [_plot(before, after)])


def _is_changed(found: Entries, changes: Mapping[int, HeadChange]) -> bool:
    """Tell whether the intervention changes this matrix."""
    return found.block in changes and changes[found.block].acts_on(found.role)


def _plot(before: Mapping[str, Entries], after: Mapping[str, Entries]) -> HeatMap:
    """Draw the excess of every block and role; what lies in no block is left out."""
    cells: dict[tuple[int, str], Overlap] = {}
    for name, found in before.items():
        if found.block >= 0:
            cells.setdefault((found.block, found.role), Overlap()).add(found.mask, after[name].mask)
    blocks = sorted({block for block, _ in cells})
    roles = list(dict.fromkeys(role for _, role in cells))
    values = []
    for block in blocks:
        row = []
        for role in roles:
            excess = cells[block, role].excess if (block, role) in cells else None
            row.append(math.nan if excess is None else excess)
        values.append(row)
    title = "overlap of updates above chance"
    return HeatMap("excess", title, "role", "block", roles, list(map(str, blocks)), values)


def _find_changed(setup: Setup, in_bf16: bool | None) -> tuple[dict[str, Entries], bool]:
    """Return the changed entries of each matrix of a run, and whether only those that bfloat16 shows count.

    ``in_bf16``: whether only they count; None: if more than a share ``DENSE`` changed in the matrices that
    changed at all.
    """
    changed: dict[str, Entries] = {}
    shown: dict[str, Entries] = {}
    count = entries = 0
    with torch.no_grad():
        for update in updates(setup):
            mask = update.after != update.before
            changed |= _divide_by_role(update, mask)
            shown |= _divide_by_role(update, ~mask_unchanged(update.before, update.after))
            if mask.any():  # a method may leave whole matrices as they are
                count += int(mask.sum())
                entries += mask.numel()
    if in_bf16 is None:
        in_bf16 = count > DENSE * entries
    return (shown if in_bf16 else changed), in_bf16


def _divide_by_role(update: Update, mask: Tensor) -> dict[str, Entries]:
    """Return the entries of a layer by its name; those of a joint matrix of q, k and v one by one."""
    site = update.site
    if site.role != "qkv":
        return {site.name: Entries(site.role, site.block, mask.cpu())}
    found = {}
    for role, part in zip(("q", "k", "v"), mask.cpu().chunk(3), strict=True):
        found[f"{site.name} {role}"] = Entries(role, site.block, part)
    return found
