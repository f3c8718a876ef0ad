"""The numbered blocks of a model as selectors see them: freeze some for a step, and restore them after it."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from torch import Tensor, nn

from .attach import parts
from .changes import Unit
from .method import Run
from .part import Part
from .roles import block_of
from .state import StateModule

ELSEWHERE = -1  # in place of a block's number: the parts that lie in no numbered block


def group_parts(states: nn.Module) -> dict[int, list[Part]]:
    """Return the parts that train values in each numbered block, and those that train some ``ELSEWHERE``.

    The task's head is left out: it trains in every step.
    """
    found: dict[int, list[Part]] = {}
    head = getattr(states, "head", None)
    for part in parts(states):
        if part is not head:
            for block in sorted({find_block(unit) for unit in part.units()}):
                found.setdefault(block, []).append(part)
    return dict(sorted(found.items()))


def find_block(unit: Unit) -> int:
    """Return the number of the block that a unit lies in, or ``ELSEWHERE``."""
    return ELSEWHERE if unit.place is None else block_of(unit.place)


class Blocks(StateModule):
    """The parts in the numbered blocks, and what is frozen in the current step.

    Frozen values keep their bits and their moments, also under weight decay. A checkpoint has only what a
    subclass registers, and a finished run stores nothing.
    """

    def __init__(self, parts: dict[int, list[Part]]) -> None:
        """Take what ``group_parts`` returns."""
        super().__init__()
        # in plain containers, since the parts belong to the method's state
        self.parts = {block: members for block, members in parts.items() if block != ELSEWHERE}
        self.all_parts = list({id(part): part for members in parts.values() for part in members}.values())
        self.chosen: list[int] = []  # blocks that train in the current step
        self._frozen: list[Unit] = []
        self._spans: dict[nn.Parameter, list[slice]] = {}  # frozen, of parameters that several blocks share
        self._copies: list[tuple[Tensor, slice, Tensor]] = []  # a tensor, a frozen span of it, its values

    def pack(self) -> dict[str, Tensor]:
        """Return nothing: what is selected is not part of the stored change."""
        return {}

    def unpack(self, stored: dict[str, Tensor]) -> None:
        """Take nothing from a stored change."""

    def units(self) -> Iterator[tuple[int, Unit]]:
        """Yield every unit that trains now with its block, or with ``ELSEWHERE``."""
        for part in self.all_parts:
            for unit in part.units():
                yield find_block(unit), unit

    def freeze_all_but(self, run: Run, chosen: Collection[int]) -> None:
        """Freeze every unit that lies in none of the ``chosen`` blocks, of which ``ELSEWHERE`` can be one."""
        used: set[int] = set()
        resting: list[Unit] = []
        for block, unit in self.units():
            if block in chosen:
                used.add(id(unit.parameter))
            else:
                resting.append(unit)
        for unit in resting:
            if unit.span is not None:
                self._spans.setdefault(unit.parameter, []).append(unit.span)
            elif id(unit.parameter) in used:  # shared with a block that trains
                continue
            unit.set_frozen(True)
            self._frozen.append(unit)
        for parameter, spans in self._spans.items():
            self._spans[parameter] = list(_join_neighbours(spans))
            for tensor in (parameter.data, *run.moments(parameter).values()):
                for span in self._spans[parameter]:
                    self._copies.append((tensor, span, tensor[span].clone()))

    @torch.no_grad()
    def restore(self, run: Run) -> None:
        """Restore the frozen spans of shared parameters, and unfreeze everything.

        The optimizer's momentum and decay move all of a shared parameter.
        """
        known = {id(tensor) for tensor, _, _ in self._copies}
        for tensor, span, before in self._copies:
            tensor[span] = before
        for parameter, spans in self._spans.items():
            for tensor in run.moments(parameter).values():
                if id(tensor) not in known:  # the optimizer has made it in this step
                    for span in spans:
                        tensor[span] = 0
        for unit in self._frozen:
            unit.set_frozen(False)
        self._frozen, self._spans, self._copies = [], {}, []


def _join_neighbours(spans: list[slice]) -> Iterator[slice]:
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
