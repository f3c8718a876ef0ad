"""The base of the objectives that pull a model towards a frozen teacher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import torch.nn.functional as F
from annotated_types import Ge, Gt
from torch import Tensor

from .loss import count, example_losses, scored
from .objective import PREVIOUS, Objective
from .run import Run, Seen


def sum_divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return T^2 KL(teacher || student), summed over the n rows of logits [n, classes], float32 or wider.

    The factor T^2 makes the size of the gradient nearly independent of the temperature T.
    """
    wanted = F.log_softmax(teacher / temperature, -1)
    given = F.log_softmax(student / temperature, -1)
    return F.kl_div(given, wanted, reduction="sum", log_target=True) * temperature**2


@dataclass(frozen=True)
class Distillation(Objective):
    """Base of the objectives with a teacher.

    Options:
        teacher: ``base``: the pretrained model, with the checkpoint's head if the run kept it, otherwise
            with the head that is being trained. ``previous``: the model as the previous phase left it, in a
            method whose phases keep their parts. Otherwise: a model folder of the same task and vocabulary.
        task: Weight of the task's cross-entropy.
        kl: Weight of the divergence KL(teacher || student) of the predictions.
        temperature: Temperature of both softmaxes in that divergence, which is multiplied by its square.
    """

    teacher: str = "base"
    task: Annotated[float, Ge(0)] = 1.0
    kl: Annotated[float, Ge(0)] = 1.0
    temperature: Annotated[float, Gt(0)] = 1.0

    def __post_init__(self) -> None:
        if not any(self.all_weights().values()):
            names = ", ".join(f"objective.{name}" for name in self.all_weights())
            raise ValueError(f"{names} are all 0, so there is nothing to minimize; raise one of them.")

    def references(self) -> tuple[str, ...]:
        return (self.teacher,)

    def check(self, run: Run) -> None:
        if self.teacher != PREVIOUS:  # "previous" exists only once its phase begins
            run.reference(self.teacher)  # raises ConfigError if it does not fit

    def weights(self, run: Run) -> dict[str, float]:
        return {name: weight for name, weight in self.all_weights().items() if weight}

    def all_weights(self) -> dict[str, float]:
        """Return the weight of every term; one of weight 0 is not computed."""
        return {"task": self.task, "kl": self.kl}

    def counts(self, run: Run, batch: Any) -> dict[str, float]:
        return {name: self.count_term(name, batch) for name in self.weights(run)}

    def terms(self, run: Run, seen: Seen, batch: Any) -> dict[str, Tensor]:
        taught = run.reference(self.teacher)(batch)
        return {name: self.sum_term(name, seen, taught, batch) for name in self.weights(run)}

    def count_term(self, name: str, batch: Any) -> int:
        """Return what a micro-batch adds to a term's count: by default its scored examples or tokens."""
        return count(batch.labels)

    def sum_term(self, name: str, seen: Seen, taught: Seen, batch: Any) -> Tensor:
        """Return a term's sum from the outputs of the student and the teacher."""
        labels = batch.labels.to(seen.logits.device)
        if name == "task":
            return example_losses(seen.logits, labels).sum()
        return sum_divergence(scored(seen.logits, labels), scored(taught.logits, labels), self.temperature)
