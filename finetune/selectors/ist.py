"""IST: train a few blocks in each step, the important ones more often; and RST, its control.

Every block has a score s, which is 0 at the start and means *un*importance. In each step a share ``trained``
of the blocks is drawn without replacement with weights sigmoid(-s); the others keep their values and moments
to the bit. Every ``every`` steps ``probes`` distinct sets D_k of blocks are drawn with weights sigmoid(s).
For each set the changes in its blocks are damped by ``factor``, and the loss l_k is measured. With
``probes=0`` every draw is uniform: this is RST.

Blocks are the numbered ones that hold parts of the method. Everything outside of them (head, class token)
trains in every step. The moments of AdamW are kept for all blocks, so the optimizer's memory does not shrink.
A sparse bank is one tensor with one count of steps for Adam's bias correction.

Formula:
    s_i += rate * a_k * p_i * (1 - p_i)      for every k and every block i in D_k
    a_k = r_k - mean(r),  p = sigmoid(s) before the probes
    r_k = exp(-l_k) with reward=exp, -l_k with reward=loss

Paper: Yao et al., "Layer-wise Importance Matters: Less Memory for Better Performance in Parameter-efficient
Fine-tuning of Large Language Models", Findings of EMNLP 2024, arXiv 2410.11772.

Reading: The abstract and the released code were read; the body of the paper was not available. All defaults
are the code's constants. Two more things follow the code: the factor p (1 - p) is the derivative of the
sigmoid and not of its logarithm, and only damped blocks change their scores. At a high loss exp(-l) is nearly
0; reward=loss avoids that.

Differs:
- The code probes with 16 training examples of their own; here the probes use the batch of the step.
- A share of the blocks is at least one block, and no more sets are drawn than there are; the code fails or
  hangs on models of few blocks.
- All ranks draw the same blocks; the code draws on each rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Gt, Le, Lt
from torch import Tensor, nn

from ..core.blocks import ELSEWHERE, Blocks, group_parts
from ..core.method import Run
from ..core.part import Part
from ..core.roles import block_of
from ..core.selector import Selector
from ..errors import ConfigError
from ..registry import register

TRIES = 100  # draws for each probe until all sets differ; the scores may make all sets but one very rare


class ScoredBlocks(Blocks):
    """The blocks and their scores, which alone are in a checkpoint."""

    scores: Tensor  # [blocks] float64

    def __init__(self, parts: dict[int, list[Part]]) -> None:
        super().__init__(parts)
        self.register_buffer("scores", torch.zeros(len(self.parts), dtype=torch.float64))

    def draw(self, weights: Tensor, count: int, generator: torch.Generator) -> list[int]:
        """Draw ``count`` blocks without replacement with ``weights`` [blocks]; return them ascending.

        If all blocks are asked for, the generator is not used, so that the method's own draws stay as they
        are.
        """
        blocks = list(self.parts)
        if count >= len(blocks):
            return blocks
        drawn = torch.multinomial(weights.cpu().clamp(min=1e-30), count, generator=generator)
        return sorted(blocks[i] for i in drawn.tolist())


@register("ist")
@dataclass(frozen=True)
class IST(Selector):
    """IST: train a few blocks in each step, drawn by learned scores.

    Options:
        trained: Share of the blocks that trains in a step.
        damped: Share of the blocks that is damped by a probe.
        factor: Factor by which a probe damps the changes in a block.
        every: Number of steps from one round of probes to the next.
        probes: Number of probes in a round; 0: none, and every draw is uniform (RST).
        rate: Size of a step of the scores.
        reward: Reward of a probe with loss l: ``exp`` is exp(-l), ``loss`` is -l.
    """

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
                f"selector.every={self.every} is not below the run's {steps} steps, so no block is ever "
                "scored; take less, or selector.probes=0."
            ]
        if self.probes == 1:
            return [
                "selector.probes=1: there is nothing to compare a single probe with; take 2 or more, or "
                "selector.probes=0."
            ]
        return []

    def build(self, model: nn.Module, states: nn.Module) -> ScoredBlocks:
        state = ScoredBlocks(group_parts(states))
        faults: list[str] = []
        for part in state.all_parts:
            fault = _why_unfit(part)
            if fault:
                faults.append(fault)
        if not faults and not state.parts:
            faults = ["chooses among numbered blocks, and this method changes no linear layer in one."]
        if faults:
            cure = (
                "Choose a method of changes to single layers, for example method=lora or method=shira, or "
                "selector=none."
            )
            raise ConfigError(*(f"selector={self.name} {why} {cure}" for why in faults))
        return state

    def count_blocks(self, share: float, state: ScoredBlocks) -> int:
        """Return a share of the number of blocks, rounded down (0.29 of 100 is 29), and at least 1."""
        return max(1, int(round(share * len(state.parts), 9)))

    def before_step(self, run: Run, state: ScoredBlocks) -> None:
        if self.probes and run.step and run.step % self.every == 0:
            self._update_scores(run, state)
        count = self.count_blocks(self.trained, state)
        state.chosen = state.draw(torch.sigmoid(-state.scores), count, run.generator)
        state.freeze_all_but(run, {*state.chosen, ELSEWHERE})

    def after_step(self, run: Run, state: ScoredBlocks) -> None:
        state.restore(run)

    def _update_scores(self, run: Run, state: ScoredBlocks) -> None:
        """Measure the loss with each set of blocks damped, and update the scores. The gates are restored."""
        sets = self._draw_sets(run, state)
        if len(sets) < 2:
            return
        losses = []
        for damped in sets:
            members = [part for block in damped for part in state.parts[block]]
            gates = [part.gate for part in members]
            try:
                for part, gate in zip(members, gates, strict=True):
                    part.gate = gate * self.factor
                losses.append(float(run.evaluate(run.batch)))
            finally:
                for part, gate in zip(members, gates, strict=True):
                    part.gate = gate
        if not all(map(math.isfinite, losses)):
            return
        order = list(state.parts)
        positions = [[order.index(block) for block in damped] for damped in sets]
        state.scores += self.score_changes(state.scores, positions, losses)
        for block, score in zip(state.parts, state.scores.tolist(), strict=True):
            run.log(**{f"score_{block}": score})

    def _draw_sets(self, run: Run, state: ScoredBlocks) -> list[list[int]]:
        """Draw ``probes`` distinct sets of blocks to damp, or fewer if fewer are found."""
        count = self.count_blocks(self.damped, state)
        wanted = min(self.probes, math.comb(len(state.parts), count))
        found: list[list[int]] = []
        if wanted < 2:
            return found
        for _ in range(TRIES * wanted):
            drawn = state.draw(torch.sigmoid(state.scores), count, run.generator)
            if drawn not in found:
                found.append(drawn)
            if len(found) == wanted:
                break
        return found

    def score_changes(self, scores: Tensor, sets: list[list[int]], losses: list[float]) -> Tensor:
        """Return the changes of ``scores`` [blocks] after probes with these ``losses``.

        ``sets``: the blocks that each probe damped, by their positions in ``scores``.
        """
        rewards = torch.tensor(losses, dtype=scores.dtype).neg()
        if self.reward == "exp":
            rewards = rewards.exp()
        rewards -= rewards[0].clone()  # the mean of equal rewards is then exactly 0
        p, changes = torch.sigmoid(scores), torch.zeros_like(scores)
        for advantage, damped in zip(rewards - rewards.mean(), sets, strict=True):
            changes[damped] += self.rate * advantage.to(scores.device) * (p * (1 - p))[damped]
        return changes


def _why_unfit(part: Part) -> str | None:
    """Return why a part cannot be selected by block; None if it can, or if it lies outside of all blocks."""
    for unit in part.units():
        if unit.place is None:
            return (
                f"freezes and damps what sits on a block's layers, and {part.describe()} is not tied to one."
            )
        if part.gate_is_switch and block_of(unit.place) >= 0:
            return (
                f"damps the changes in a block, and {unit.name} is trained in place: its change can only be "
                "on or off."
            )
    return None
