"""Plan the phases of a run: which steps each has, under which method, objective and learning rate."""

from __future__ import annotations

from dataclasses import dataclass

from ..core.method import Method
from ..core.objective import PREVIOUS, Objective
from ..errors import ConfigError


@dataclass(frozen=True)
class PlannedPhase:
    """A phase of a run: its method and objective, and the numbers of steps done at its start and at its end.

    ``lr_start``, ``lr_end``: likewise of its learning rate's schedule. ``keeps``: its parts stay attached
    under the next phase.
    """

    method: Method
    objective: Objective
    start: int
    end: int
    lr_start: int
    lr_end: int
    keeps: bool


def plan_phases(method: Method, steps: int, default: Objective) -> list[PlannedPhase]:
    """Return the phases of a run of ``steps`` steps; ``default``: the objective of phases without one.

    Raises ``ConfigError`` if an objective compares with a phase before whose parts are not kept.
    """
    phases, start = method.phases(), 0
    planned: list[PlannedPhase] = []
    for i, phase in enumerate(phases):
        end = round(steps * sum(p.share for p in phases[: i + 1]))
        lr_start, lr_end = (start, end) if phase.schedule == "restart" else (0, steps)
        objective = phase.objective or default
        if PREVIOUS in objective.references() and not (planned and planned[-1].keeps):
            raise ConfigError(
                f"objective={objective.name} compares with the model that the phase before left, and phase "
                f"{i + 1} of method={method.name} has none below it. Take "
                "objective.teacher=base, or a path."
            )
        planned.append(PlannedPhase(phase.method, objective, start, end, lr_start, lr_end, phase.keeps))
        start = end
    return planned


def attached_phases(phases: list[PlannedPhase], phase: int) -> list[PlannedPhase]:
    """Return the phases whose parts are attached in ``phase``: those before it that are kept, and itself."""
    first = phase
    while first > 0 and phases[first - 1].keeps:
        first -= 1
    return phases[first : phase + 1]
