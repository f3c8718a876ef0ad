"""IST: in every step a few blocks train, those that matter more often (Yao et al., 2024, arXiv 2410.11772), and RST, its control.

Every block has a score s, 0 at the start: its *un*importance. In each step a share of the blocks is drawn
without replacement with weights sigmoid(-s); the others keep their values and moments to the bit. Every
``every`` steps a few distinct sets D_k of blocks are drawn with weights sigmoid(s), and the loss l_k with the
changes in them damped is measured. With a_k = r_k - mean(r) and p = sigmoid(s) from before:

    s_i += rate * a_k * p_i * (1 - p_i)     for every k and every i in D_k

The numbers and p (1 - p), the derivative of the sigmoid and not of its logarithm, are those of the released
code, as is that only damped blocks are updated; the paper's body could not be read. The code probes with 16
training examples of their own; here it is the batch of the step. ``reward=exp`` is its r = exp(-l), which all
but vanishes at a high loss; ``loss`` is r = -l. ``probes=0`` is RST: every draw is uniform.

Blocks are the numbered ones that hold parts of the method. All that lies outside them (head, class token)
trains in every step. The moments of AdamW are kept for all blocks, so the optimizer's memory does not fall. A
sparse bank is one tensor with one count of steps for Adam's bias correction.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Gt, Le, Lt
from torch import Tensor, nn

from ..core.changes import Unit
from ..core.method import Run
from ..core.part import Part, parts
from ..core.roles import block_of
from ..core.selector import Selector
from ..core.state import StateModule
from ..errors import ConfigError
from ..registry import register

TRIES = 100  # draws for each probe to find sets that differ; scores may have made all but one very rare


class Blocks(StateModule):
    """The score of each block, and the parts in it. Only the scores are state, and a run does not store them."""

    scores: Tensor

    def __init__(self, parts: dict[int, list[Part]]) -> None:
        super().__init__()
        self.parts = parts  # by block; in plain containers, since they belong to the method's state
        self.register_buffer("scores", torch.zeros(len(parts), dtype=torch.float64))
        self.chosen: list[int] = []
        self.frozen: list[Unit] = []
        self.resting: dict[nn.Parameter, list[slice]] = {}  # slices of shared parameters, in ascending order
        self.copies: list[tuple[Tensor, slice, Tensor]] = []

    def pack(self) -> dict[str, Tensor]:
        return {}

    def unpack(self, stored: dict[str, Tensor]) -> None: ...

    def draw(self, weights: Tensor, count: int, generator: torch.Generator) -> list[int]:
        """``count`` blocks without replacement, ascending. All of them need no draw, so that the method's own draws stay as they are."""
        blocks = list(self.parts)
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
                f"selector.every={self.every} does not end before the run's {steps} steps do, so no block is "
                "ever scored; take less, or probes=0."
            ]
        return (
            [
                f"selector.probes={self.probes}: a single probe has none to be compared with; take 2 or "
                "more, or 0."
            ]
            if self.probes == 1
            else []
        )

    def build(self, model: nn.Module, states: nn.Module) -> Blocks:
        blocks: dict[int, list[Part]] = {}
        faults: list[str] = []
        for part in parts(states):
            units = part.units()
            fault = _unfit(part, units)
            if fault:
                faults.append(fault)
            for block in sorted({block_of(unit.place) for unit in units if unit.place is not None}):
                if block >= 0:
                    blocks.setdefault(block, []).append(part)
        if not faults and not blocks:
            faults = ["chooses among numbered blocks, and this method changes no linear layer in one."]
        if faults:
            cure = "Choose a method of changes to single layers, for example method=lora or method=shira, or selector=none."
            raise ConfigError(*(f"selector={self.name} {why} {cure}" for why in faults))
        return Blocks(dict(sorted(blocks.items())))

    def count(self, share: float, state: Blocks) -> int:
        """A share of the blocks, rounded down (as a decimal: 0.29 of 100 are 29), and at least one."""
        return max(1, int(round(share * len(state.parts), 9)))

    def before_step(self, run: Run, state: Blocks) -> None:
        if self.probes and run.step and run.step % self.every == 0:
            self._score(run, state)
        state.chosen = state.draw(
            torch.sigmoid(-state.scores), self.count(self.trained, state), run.generator
        )
        used: set[int] = set()
        resting: list[Unit] = []
        for block, members in state.parts.items():
            for part in members:
                for unit in part.units():
                    if block in state.chosen:
                        used.add(id(unit.parameter))
                    else:
                        resting.append(unit)
        for unit in resting:
            if unit.span is not None:
                state.resting.setdefault(unit.parameter, []).append(unit.span)
            elif id(unit.parameter) in used:  # shared with a block that trains
                continue
            unit.set_frozen(True)
            state.frozen.append(unit)
        for parameter, spans in state.resting.items():
            state.resting[parameter] = list(_joined(spans))
            for tensor in (parameter.data, *run.moments(parameter).values()):
                for span in state.resting[parameter]:
                    state.copies.append((tensor, span, tensor[span].clone()))

    @torch.no_grad()
    def after_step(self, run: Run, state: Blocks) -> None:
        """Put the resting slices of shared parameters back: the optimizer's momentum and decay move all of one."""
        known = {id(tensor) for tensor, _, _ in state.copies}
        for tensor, span, before in state.copies:
            tensor[span] = before
        for parameter, spans in state.resting.items():
            for tensor in run.moments(parameter).values():
                if id(tensor) not in known:  # the optimizer has made it in this step
                    for span in spans:
                        tensor[span] = 0
        for unit in state.frozen:
            unit.set_frozen(False)
        state.frozen, state.resting, state.copies = [], {}, []

    def _score(self, run: Run, state: Blocks) -> None:
        """Measure what damping does, and move the scores. The gates are what they were afterwards."""
        losses, sets = [], self._sets(run, state)
        for damped in sets if len(sets) > 1 else ():
            members = [part for block in damped for part in state.parts[block]]
            gates = [part.gate for part in members]
            try:
                for part, gate in zip(members, gates, strict=True):
                    part.gate = gate * self.factor
                losses.append(float(run.evaluate(run.batch)))
            finally:
                for part, gate in zip(members, gates, strict=True):
                    part.gate = gate
        if losses and all(map(math.isfinite, losses)):
            state.scores += self.change(
                state.scores, [[list(state.parts).index(b) for b in damped] for damped in sets], losses
            )
            run.log(
                **{
                    f"score_{block}": score
                    for block, score in zip(state.parts, state.scores.tolist(), strict=True)
                }
            )

    def _sets(self, run: Run, state: Blocks) -> list[list[int]]:
        """Distinct sets of blocks to damp: ``probes`` of them, or as many as there are and as chance gives in so many tries."""
        count = self.count(self.damped, state)
        wanted = min(self.probes, math.comb(len(state.parts), count))
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


def _unfit(part: Part, units: list[Unit]) -> str | None:
    """Return why a part cannot be selected by block; None if it can, or if it lies outside all blocks."""
    if any(unit.place is None for unit in units):
        return f"freezes and damps what sits on a block's layers, and {part.describe()} is not tied to one."
    inside = [unit.name for unit in units if unit.place is not None and block_of(unit.place) >= 0]
    if inside and part.gate_is_switch:
        return f"damps the changes in a block, and {inside[0]} is trained in place, where a change is all there or gone."
    return None


def _joined(spans: list[slice]) -> Iterator[slice]:
    """Join neighbouring slices, so that few large copies are made instead of many small ones."""
    start = stop = 0
    for span in sorted(spans, key=lambda span: (span.start, span.stop)):
        if span.start != stop:
            if stop > start:
                yield slice(start, stop)
            start = span.start
        stop = span.stop
    if stop > start:
        yield slice(start, stop)
