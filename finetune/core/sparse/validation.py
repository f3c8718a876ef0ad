"""Find settings of a sparse method that contradict each other or would be ignored."""

from __future__ import annotations

import re

from ... import registry
from ...errors import suggest_nearest
from .grain import N_OF_M, PATTERN
from .scores import settings_used
from .settings import SparseSettings

SCORE_OPTIONS = ("batches", "rank", "power", "eps")
SCHEDULES_OF_N_OF_M = ("static", "one_shot", "redraw")  # those that never change the number of entries


def find_contradictions(settings: SparseSettings) -> list[str]:
    """Return one sentence for each contradiction; it names the settings, their values and the cure."""
    scores = registry.catalog("score")
    if settings.score not in scores:
        return [
            f"method.score={settings.score} is not known.{suggest_nearest(settings.score, scores)} Known: "
            f"{', '.join(scores)}."
        ]
    found = _unused_options(settings)
    found += _grain_contradictions(settings)
    if settings.selection != "eval" and scores[settings.score].facts.get("needs", "weight") == "weight":
        found.append(
            f"method.selection={settings.selection} has no effect with score={settings.score}, which needs "
            "no gradient. Take a gradient score, such as score=snip."
        )
    if settings.grain == "matrix" and settings.scope in ("matrix", "layer"):
        found.append(
            f"method.grain=matrix leaves scope={settings.scope} nothing to choose from: a matrix is one "
            "unit. Take scope=role, block or model."
        )
    if settings.scope == "layer" and (
        settings.direction == "smallest" or scores[settings.score].facts.get("signed")
    ):
        found.append(
            "method.scope=layer divides the budget in proportion to mean scores, which must not be negative; "
            f"those of score={settings.score} with direction={settings.direction} can be. Take scope=matrix "
            "or scope=model."
        )
    schedule = settings.schedule
    if settings.score == "change" and not schedule.dense and schedule.name in ("static", "grow"):
        found.append(
            f"method.score=change is 0 for every entry before training, and schedule={schedule.name} has no "
            "dense phase before its first choice. Take schedule=one_shot."
        )
    return found


def _unused_options(settings: SparseSettings) -> list[str]:
    """Name options of other scores that are set and would be ignored."""
    found, used = [], settings_used()
    for name in SCORE_OPTIONS:
        value, default = getattr(settings, name), type(settings).__dataclass_fields__[name].default
        if name not in used[settings.score] and value != default:
            users = ", ".join(score for score, names in used.items() if name in names)
            found.append(
                f"method.{name}={value} has no effect with score={settings.score}; it belongs to {users}."
            )
    return found


def _grain_contradictions(settings: SparseSettings) -> list[str]:
    """Return the faults of ``grain``: its form and, for N:M, the settings that contradict it."""
    grain, schedule = settings.grain, settings.schedule.name
    if not re.fullmatch(PATTERN, grain):
        return [
            f"method.grain={grain} is not a grain. Take element, row, column, head, matrix, block:B (such "
            "as block:16) or N:M (such as 2:4)."
        ]
    match = re.fullmatch(N_OF_M, grain)
    if not match:
        return []
    n, m = int(match[1]), int(match[2])
    share, found = 1 - n / m, []
    if share <= 0:
        found.append(f"method.grain={grain} leaves nothing out; n:m needs n below m, as in 2:4.")
    elif abs(settings.sparsity - share) > 1e-6:
        found.append(
            f"method.grain={grain} trains {n} of {m} entries: sparsity={settings.sparsity:g} must be "
            f"{share:g}."
        )
    if settings.scope != "matrix":
        found.append(
            f"method.grain={grain} fixes the count in every row, so scope={settings.scope} cannot move "
            "entries between rows. Take scope=matrix."
        )
    if schedule not in SCHEDULES_OF_N_OF_M:
        found.append(
            f"method.grain={grain} fixes the count in every row, which schedule={schedule} would change. "
            f"Take schedule={', '.join(SCHEDULES_OF_N_OF_M[:-1])} or {SCHEDULES_OF_N_OF_M[-1]}."
        )
    return found
