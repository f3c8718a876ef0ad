"""IRepair: train in each step only the blocks that react most to bad data.

Before every step the model reads a batch of the stream ``bad``: examples of the behaviour to repair, such as
toxic continuations. The gradient of their loss gives each block a sensitivity. The most sensitive ``blocks``
blocks are the *slice*, and only they train in this step, on the objective of the run. All other blocks
keep their values and their moments to the bit. ``objective=repair`` is the loss of the paper: that of the
corrected examples, and the divergence from the pretrained model on general data.

Embeddings, positions and the norm after the last block are outside of all blocks and are not trained. Nor is
the head of a language model. The head of a classifier trains in every step, as with any selector, unless
``method.head=false`` freezes it. With a method that trains little in each block, such as ``method=lora``, the
sensitivity is the norm of the gradient of what it trains there.

If the gradient of the bad data is 0 in every block, the slice is empty and the step is skipped.

Formula:
    L_bad = mean -log p over the scored tokens (or examples) of the step's bad batch
    S_b = sqrt(sum of |dL_bad/dw|^2 over all trained values w of block b)
    slice = the ``blocks`` largest S_b; of equal ones the first

Paper: "IRepair: An Intent-Aware Approach to Repair Data-Driven Errors in Large Language Models", FSE 2025,
arXiv 2502.07072.

Reading: The abstract was read, and code of a later study that credits the authors' artefact; the body of the
paper was not available. The slice of one block, a new choice in every step and the plain norm, not divided
by the size of the block, are those of that code. A slice of several blocks, ``every`` and the control
``by=random`` are this project's.

Rate: The code uses RMSprop at 5e-5, after a linear warm-up of 150 updates, batches of 4, and gradients
clipped to 0.5. Here the optimizer is the run's own; ``train.clip=0.5`` clips the slice's gradient as well.

Differs:
- The code draws the bad and the corrected continuation of the same prompt. Here the streams are independent
  data sets, each in an order of its own.
- The code computes sensitivities in train mode, with the dropout probabilities set to 0; here in eval mode.
- The code's second backward pass computes the gradients of all blocks and drops most of them. Here the other
  blocks are frozen before the forward pass.
- The code's fixed choice is by the mean gradient over 500 examples. Here ``every`` at the number of steps
  keeps the slice of the first batch.

Cost: One more forward and backward pass for each choice, over a batch of bad examples. The gradients of all
blocks are in memory until the slice is chosen. Adam has moments of all blocks that were ever chosen.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge
from torch import Tensor, nn

from ..core.blocks import ELSEWHERE, Blocks, group_parts
from ..core.method import Run
from ..core.part import Part
from ..core.selector import Selector
from ..errors import ConfigError, RunFailed
from ..registry import register

BAD = "bad"


class Slice(Blocks):
    """The blocks of the current slice, and in how many steps each block was in one."""

    in_slice: Tensor  # [blocks] bool
    steps: Tensor  # [blocks] int64

    def __init__(self, parts: dict[int, list[Part]]) -> None:
        super().__init__(parts)
        self.register_buffer("in_slice", torch.zeros(len(self.parts), dtype=torch.bool))
        self.register_buffer("steps", torch.zeros(len(self.parts), dtype=torch.int64))


@register("irepair")
@dataclass(frozen=True)
class IRepair(Selector):
    """IRepair: train in each step only the blocks whose gradient on the stream ``bad`` is largest.

    Options:
        blocks: Number of blocks that train in a step.
        every: Number of steps from one choice of the blocks to the next; at the number of steps of the run
            the first choice stays.
        by: ``sensitivity``, or ``random``, the control that draws the blocks and needs no stream.
    """

    blocks: Annotated[int, Ge(1)] = 1
    every: Annotated[int, Ge(1)] = 1
    by: Literal["sensitivity", "random"] = "sensitivity"

    unused_parameters: ClassVar[bool] = True

    def streams(self) -> tuple[str, ...]:
        return (BAD,) if self.by == "sensitivity" else ()

    def build(self, model: nn.Module, states: nn.Module) -> Slice:
        state = Slice(group_parts(states))
        if faults := self._find_faults(state):
            raise ConfigError(*faults)
        for block, unit in state.units():
            if block == ELSEWHERE and unit.span is None:  # entries of a bank are frozen in each step
                unit.set_frozen(True)
        return state

    def _find_faults(self, state: Slice) -> list[str]:
        """Return why the blocks of these parts cannot be chosen, one sentence for each fault."""
        faults = []
        for part in state.all_parts:
            if any(unit.place is None for unit in part.units()):
                faults.append(
                    f"selector=irepair trains some blocks and freezes the rest, and {part.describe()} is not "
                    "tied to a block. Choose another method, for example method=full or method=lora."
                )
        if not faults and not state.parts:
            faults = [
                "selector=irepair chooses among numbered blocks, and this method trains nothing in one. "
                "Choose another method, for example method=full or method=lora."
            ]
        if not faults and self.blocks > len(state.parts):
            faults = [
                f"selector.blocks={self.blocks} is more than the {len(state.parts)} blocks in which this "
                f"method trains something; take at most {len(state.parts)}."
            ]
        return faults

    def before_step(self, run: Run, state: Slice) -> None:
        state.restore(run)  # what a try of this step froze, before memory ran out
        if run.step % self.every == 0:
            chosen = self._draw(run, state) if self.by == "random" else self._choose(run, state)
            # rounding on one process must not make it choose other blocks
            state.in_slice.copy_(run.average_or_broadcast(chosen.to(torch.uint8)) != 0)
        numbers = zip(state.parts, state.in_slice.tolist(), strict=True)
        state.chosen = [block for block, is_in in numbers if is_in]
        state.freeze_all_but(run, state.chosen)

    def trains(self, state: Slice) -> bool:
        return bool(state.chosen)

    def after_step(self, run: Run, state: Slice) -> None:
        state.steps += state.in_slice
        state.restore(run)

    def count_selected(self, state: Slice) -> dict[str, int]:
        return {str(block): steps for block, steps in zip(state.parts, state.steps.tolist(), strict=True)}

    def _draw(self, run: Run, state: Slice) -> Tensor:
        """Return which blocks are drawn, bool [blocks]."""
        order = torch.randperm(len(state.parts), generator=run.generator)
        return order < self.blocks

    def _choose(self, run: Run, state: Slice) -> Tensor:
        """Return which blocks are most sensitive to the step's bad examples, bool [blocks]; none at 0."""
        with run.stream_gradients(BAD) as loss:
            norms = measure_sensitivities(state)
        run.log(loss_bad=loss)
        for block, norm in zip(state.parts, norms, strict=True):
            run.log(**{f"sensitivity_{block}": norm})
        if not all(map(math.isfinite, norms)):
            raise RunFailed(
                f"The loss of streams.{BAD} is {loss} at step {run.step + 1} of its phase, and its gradient "
                "is not finite, so no block can be chosen. Try a smaller optimizer.lr, or "
                "train.precision=fp32."
            )
        chosen = torch.zeros(len(norms), dtype=torch.bool)
        if any(norms):
            ranking = sorted(
                range(len(norms)), key=norms.__getitem__, reverse=True
            )  # keeps equal ones in order
            chosen[ranking[: self.blocks]] = True
        return chosen


def measure_sensitivities(state: Blocks) -> list[float]:
    """Return the norm of the gradient of everything that trains in each block, in float64."""
    squares = dict.fromkeys(state.parts, 0.0)
    for block, unit in state.units():
        grad = unit.parameter.grad
        if block == ELSEWHERE or grad is None:
            continue
        values = grad if unit.span is None else grad[unit.span]
        squares[block] += float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2
    return [math.sqrt(square) for square in squares.values()]
