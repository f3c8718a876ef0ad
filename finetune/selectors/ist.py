"""IST: in every step a few blocks train, those that matter more often (Yao et al., 2024, arXiv 2410.11772), and RST, its control.

Every block has a score s, 0 at the start: its *un*importance. In each step a share of the blocks is drawn without replacement with weights
sigmoid(-s); the others keep their values and moments to the bit. Every ``every`` steps a few distinct sets D_k of blocks are drawn with weights
sigmoid(s), and the loss l_k with the changes in them damped is measured. With a_k = r_k - mean(r) and p = sigmoid(s) from before:

    s_i += rate * a_k * p_i * (1 - p_i)     for every k and every i in D_k

The numbers and p (1 - p), the derivative of the sigmoid and not of its logarithm, are those of the released code, as is that only damped blocks
are updated; the paper's body could not be read. The code probes with 16 training examples of their own; here it is the batch of the step.
``reward=exp`` is its r = exp(-l), which all but vanishes at a high loss; ``loss`` is r = -l. ``probes=0`` is RST: every draw is uniform.

Blocks are the numbered ones that hold parts of the method. All that lies outside them (head, class token) trains in every step. The moments of AdamW
are kept for all blocks, so the optimizer's memory does not fall. A sparse bank is one tensor with one count of steps for Adam's bias correction.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import groupby
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Gt, Le, Lt
from torch import Tensor, nn

from ..core.inplace import InPlace
from ..core.method import Run
from ..core.part import Delta, Part, patched
from ..core.roles import block_of
from ..core.selector import Selector
from ..core.sparse.bank import Bank, SparseDelta
from ..core.sparse.engine import moments
from ..errors import ConfigError
from ..registry import register

TRIES = 100  # draws for each probe to find sets that differ; scores may have made all but one very rare


class Blocks(nn.Module):
    """The score of each block, and the deltas in it. Only the scores are state; they are no part of the change that a run stores."""

    scores: Tensor

    def __init__(self, deltas: dict[int, list[Delta]]) -> None:
        super().__init__()
        self.deltas = deltas  # by block; in plain containers, since they belong to the method's state
        self.banks: dict[Bank, dict[int, int]] = {}  # the block of each of a bank's sites
        for block, found in deltas.items():
            for delta in found:
                if isinstance(delta, SparseDelta):
                    self.banks.setdefault(delta.bank, {})[delta.i] = block
        self.register_buffer("scores", torch.zeros(len(deltas), dtype=torch.float64))
        self.chosen: list[int] = []
        self.rested: list[nn.Parameter] = []
        self.held: list[tuple[Tensor, slice, Tensor]] = []

    def pack(self) -> dict[str, Tensor]:
        return {}

    def unpack(self, stored: dict[str, Tensor]) -> None: ...

    def draw(self, weights: Tensor, count: int, generator: torch.Generator) -> list[int]:
        """``count`` blocks without replacement, ascending. All of them need no draw, so that the method's own draws stay as they are."""
        blocks = list(self.deltas)
        if count >= len(blocks):
            return blocks
        return sorted(
            blocks[i]
            for i in torch.multinomial(weights.cpu().clamp(min=1e-30), count, generator=generator).tolist()
        )


@register("ist")
@dataclass(frozen=True)
class IST(Selector):
    """IST: train a few blocks in each step, drawn by learned scores."""

    trained: Annotated[float, Gt(0), Le(1)] = 0.25
    damped: Annotated[float, Gt(0), Lt(1)] = 0.5
    factor: Annotated[float, Ge(0), Lt(1)] = 0.25
    every: Annotated[int, Ge(1)] = 10
    probes: Annotated[int, Ge(0)] = 3
    rate: Annotated[float, Gt(0)] = 10.0
    reward: Literal["exp", "loss"] = "exp"

    unused_parameters: ClassVar[bool] = True

    def faults(self, steps: int) -> list[str]:
        if self.probes and self.every >= steps:
            return [
                f"selector.every={self.every} does not end before the run's {steps} steps do, so no block is ever scored; take less, or probes=0."
            ]
        return (
            [
                f"selector.probes={self.probes}: a single probe has none to be compared with; take 2 or more, or 0."
            ]
            if self.probes == 1
            else []
        )

    def build(self, model: nn.Module, states: nn.Module) -> Blocks:
        deltas: dict[int, list[Delta]] = {}
        for name, layer in patched(model).items():
            deltas.setdefault(block_of(name), []).extend(layer.deltas)
        placed = {id(delta) for found in deltas.values() for delta in found}
        faults = [
            why
            for part in states.modules()
            if isinstance(part, Part) and id(part) not in placed and (why := _unfit(part))
        ]
        deltas.pop(-1, None)
        if not faults and not deltas:
            faults = ["chooses among numbered blocks, and this method changes no linear layer in one."]
        if faults:
            cure = "Choose a method of changes to single layers, for example method=lora or method=shira, or selector=none."
            raise ConfigError(*(f"selector={self.name} {why} {cure}" for why in faults))
        return Blocks(dict(sorted(deltas.items())))

    def count(self, share: float, state: Blocks) -> int:
        """A share of the blocks, rounded down (as a decimal: 0.29 of 100 are 29), and at least one."""
        return max(1, int(round(share * len(state.deltas), 9)))

    def before_step(self, run: Run, state: Blocks) -> None:
        if self.probes and run.step and run.step % self.every == 0:
            self._score(run, state)
        state.chosen = state.draw(
            torch.sigmoid(-state.scores), self.count(self.trained, state), run.generator
        )
        used = {id(p) for block in state.chosen for delta in state.deltas[block] for p in delta.parameters()}
        for parameter in (
            p for found in state.deltas.values() for delta in found for p in delta.parameters()
        ):
            if parameter.requires_grad and id(parameter) not in used:
                state.rested.append(parameter)
                parameter.requires_grad_(False)
        for bank, blocks in state.banks.items():
            bank.frozen = [i in blocks and blocks[i] not in state.chosen for i in range(len(bank.sizes))]
            state.held += [
                (t, part, t[part].clone())
                for t in (bank.values.data, *moments(run, bank).values())
                for part in _resting(bank)
            ]

    @torch.no_grad()
    def after_step(self, run: Run, state: Blocks) -> None:
        """A bank is one tensor to the optimizer, whose momentum and decay move all of it: the resting slices go back to what they were."""
        for parameter in state.rested:
            parameter.requires_grad_(True)
        known = {id(t) for t, _, _ in state.held}
        for bank in state.banks:
            fresh = [
                (t, part, torch.zeros_like(t[part]))
                for t in moments(run, bank).values()
                if id(t) not in known
                for part in _resting(bank)
            ]
            for t, part, before in state.held + fresh:
                t[part] = before
            bank.frozen = [False] * len(bank.sizes)
        state.rested, state.held = [], []

    def _score(self, run: Run, state: Blocks) -> None:
        """Measure what damping does, and move the scores. The gates are what they were afterwards."""
        losses, sets = [], self._sets(run, state)
        for damped in sets if len(sets) > 1 else ():
            deltas = [delta for block in damped for delta in state.deltas[block]]
            gates = [delta.gate for delta in deltas]
            try:
                for delta, gate in zip(deltas, gates, strict=True):
                    delta.gate = gate * self.factor
                losses.append(float(run.evaluate(run.batch)))
            finally:
                for delta, gate in zip(deltas, gates, strict=True):
                    delta.gate = gate
        if losses and all(map(math.isfinite, losses)):
            state.scores += self.change(
                state.scores, [[list(state.deltas).index(b) for b in damped] for damped in sets], losses
            )
            run.log(
                **{
                    f"score_{block}": score
                    for block, score in zip(state.deltas, state.scores.tolist(), strict=True)
                }
            )

    def _sets(self, run: Run, state: Blocks) -> list[list[int]]:
        """Distinct sets of blocks to damp: ``probes`` of them, or as many as there are and as chance gives in so many tries."""
        count = self.count(self.damped, state)
        wanted = min(self.probes, math.comb(len(state.deltas), count))
        found: list[list[int]] = []
        for _ in range(TRIES * wanted if wanted > 1 else 0):
            drawn = state.draw(torch.sigmoid(state.scores), count, run.generator)
            found += [drawn] if drawn not in found else []
            if len(found) == wanted:
                break
        return found

    def change(self, scores: Tensor, sets: list[list[int]], losses: list[float]) -> Tensor:
        """What the scores [L] change by after the loss with each set of blocks (by place) damped."""
        rewards = torch.tensor(losses, dtype=scores.dtype).neg()
        rewards = rewards.exp() if self.reward == "exp" else rewards
        rewards -= rewards[0].clone()  # so that equal ones are centred to 0 and not to a rounding error
        p, change = torch.sigmoid(scores), torch.zeros_like(scores)
        for advantage, damped in zip(rewards - rewards.mean(), sets, strict=True):
            change[damped] += self.rate * advantage.to(scores.device) * (p * (1 - p))[damped]
        return change


def _unfit(part: Part) -> str | None:
    """Why a part that sits on no patched layer cannot be selected by block; None where it lies outside all blocks."""
    if not isinstance(part, InPlace):
        return (
            f"freezes and damps what sits on a block's layers, and {type(part).__name__} is not tied to one."
        )
    inside = [name for name in part.names if block_of(name) >= 0]
    return (
        f"damps the changes in a block, and {inside[0]} is trained in place, where a change is all there or gone."
        if inside
        else None
    )


def _resting(bank: Bank) -> list[slice]:
    """Where the values of the frozen sites are; neighbours as one."""
    bounds, runs = (
        bank.bounds(),
        [(frozen, [*sites]) for frozen, sites in groupby(range(len(bank.sizes)), bank.frozen.__getitem__)],
    )
    return [slice(bounds[sites[0]], bounds[sites[-1] + 1]) for frozen, sites in runs if frozen]
