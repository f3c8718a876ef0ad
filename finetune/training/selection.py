"""Choose the state that a run keeps: the best on validation, or the last."""

from __future__ import annotations

from typing import Any

from ..config import plugin_records
from ..core.zeros import describe_zeros
from ..storage.delta import save_delta
from ..storage.progress import ProgressRecord
from ..storage.run_folder import RunFolder
from .evaluate import sort_key
from .prepare import Setup


def keep_if_best(setup: Setup, files: RunFolder, record: ProgressRecord) -> dict[str, float]:
    """Validate, and store the change if it is the best so far; return the metrics.

    Metrics are compared only within a stage: one phase, before or after it meets its target (such as its
    sparsity). The first state of a stage is always stored. With ``train.select=last``, every state is stored.
    """
    metrics = setup.evaluate("val").metrics
    key, stage = list(sort_key(metrics)), setup.session.phase_and_target_met
    is_best = record.best is None or record.best_stage != stage or key > record.best
    if is_best or setup.config.train.select == "last":
        record.best, record.best_step, record.best_stage = key, setup.session.number, stage
        record.val = metrics
        if setup.session.accelerator.is_main_process:
            save_delta(files.delta, setup.session.states, describe_change(setup))
    return metrics


def describe_change(setup: Setup) -> dict[str, Any]:
    """Return the content of ``delta.json``: what the stored change belongs to."""
    config, model = setup.config, setup.base
    return {
        "method": config.method.name,
        "config": config.as_dict(),
        "task": model.task,
        "labels": list(setup.labels),
        "head": list(model.head),
        "step": setup.session.number,
        "phase": setup.session.phase,
        "base_fingerprint": setup.fingerprint,
        **describe_zeros(setup.session.model),
        **plugin_records.record_of(config),
    }


def patience_is_over(setup: Setup, record: ProgressRecord) -> bool:
    """Return whether the last ``train.patience`` validations brought no better state.

    Validations before the last phase has met its target do not count.
    """
    session, settings = setup.session, setup.config.train
    patience, every = settings.patience, settings.eval_every
    if not patience or not every or record.best_step is None:
        return False
    final_stage = [len(session.phases) - 1, 1]
    if session.phase_and_target_met != final_stage or record.best_stage != final_stage:
        return False
    return session.number // every - record.best_step // every >= patience
