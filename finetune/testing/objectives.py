"""Check what every objective must guarantee: ``check_objective(KD(), lambda: LoRA(rank=4))``."""

from __future__ import annotations

from collections.abc import Callable

from ..core.objective import Objective
from .contract import (
    SAVED,
    Kind,
    Make,
    Trial,
    check_base_untouched,
    check_bf16,
    check_resume,
    check_same_seed,
    compare_steps,
    run_backward,
    run_checks,
)


def check_terms(trial: Trial) -> None:
    """The terms of micro-batches of unequal size add up to those of the whole batch, after some training.

    With an objective that is not ``exact`` the loss must differ, or it should say that it is exact.
    """
    whole, parts = trial.resume(SAVED[1]), trial.resume(SAVED[1])
    parts.batches.micro_batch_size = 3
    if trial.objective.exact:
        compare_steps(whole, parts)
        return
    losses = [run_backward(session) for session in (whole, parts)]
    assert losses[0] != losses[1], "exact=False, but micro-batches give the loss of the whole batch"


def check_passes(trial: Trial) -> None:
    """A step runs the model forward once, and each reference once, whatever the number of terms.

    With data streams that is once for the training data and for each stream; a reference may leave some out.
    """
    session = trial.begin()
    session.start()
    ran: list[int] = []
    models = [session.model]
    for name in trial.objective.references():
        models.append(session.run.reference(name).model)
    for model in {id(model): model for model in models}.values():
        model.register_forward_hook(lambda *_: ran.append(1))
    micro = next(session.batches.steps(0, 1))
    session._backward(micro)
    least, most = len(micro) + len(models) - 1, len(micro) * len(models)
    assert least <= len(ran) <= most, f"{len(ran)} forward passes for {len(models)} models"


CHECKS: dict[str, Callable[[Trial], None]] = {
    "resume": check_resume,
    "same_seed": check_same_seed,
    "passes": check_passes,
    "terms": check_terms,
    "base_untouched": check_base_untouched,
    "bf16": check_bf16,
}


def check_objective(objective: Objective, make: Make, kind: Kind = "vit") -> None:
    """Run every check of ``CHECKS``: train the method that ``make`` gives with ``objective``."""
    run_checks(CHECKS, Trial(make, kind, objective=objective))
