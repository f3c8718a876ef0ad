"""The interface of an optimizer: a frozen dataclass of settings that makes the torch optimizer of a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Le

if TYPE_CHECKING:  # checking a configuration must not import torch
    import torch
    from torch import nn

    from .method import Method
    from .run import Run


@dataclass(frozen=True)
class Optimizer:
    """Base of all optimizers, with the settings that all of them have.

    A subclass adds the settings that only it uses.
    ``needs_grad``: False if ``step`` measures losses instead of using gradients. Then training runs no
    backward pass, and there is no gradient to clip or to scale.
    ``former``: settings that earlier versions had and that are ignored now, each with the only value that it
    may have. They are still written into configurations, because config hashes must not change.

    Options:
        lr: Peak learning rate.
        weight_decay: Decoupled weight decay.
        schedule: Course of the learning rate after the warm-up.
        warmup: Share of all steps over which the learning rate rises from 0 to ``lr``.
    """

    KIND: ClassVar[str] = "optimizer"
    name: ClassVar[str]
    needs_grad: ClassVar[bool] = True
    former: ClassVar[dict[str, Any]] = {}

    lr: Annotated[float, Gt(0)] = 1e-3
    weight_decay: Annotated[float, Ge(0)] = 0.0
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: Annotated[float, Ge(0), Le(1)] = 0.1

    def faults(self, steps: int) -> list[str]:
        """Return why the settings make no sense in a run of ``steps`` steps, one sentence for each fault."""
        return []

    def find_conflicts(self, method: Method, clip: float | None) -> list[str]:
        """Return why the optimizer and ``method``, or ``train.clip``, do not go together.

        One sentence for each fault.
        """
        if self.needs_grad:
            return []
        found = []
        if any(phase.method.reads_gradients for phase in method.phases()):
            found.append(
                f"method={method.name} reads gradients with these settings, and optimizer={self.name} "
                "computes none. Choose optimizer=adamw, or settings of the method that read no gradient."
            )
        if clip is not None:
            found.append(
                f"train.clip={clip:g} has no effect with optimizer={self.name}, which computes no gradient. "
                "Set train.clip=null."
            )
        return found

    def make(self, groups: list[dict[str, Any]], states: nn.Module) -> torch.optim.Optimizer:
        """Return the torch optimizer over ``groups``: dictionaries of ``params`` and ``weight_decay``.

        ``states`` holds the method's parts, for an optimizer that treats some of them differently.
        """
        raise NotImplementedError

    def step(self, run: Run, evaluate: Callable[[], float]) -> None:
        """Move the trained values once.

        ``evaluate`` returns the loss of the step's batch at the current values, over all processes, in eval
        mode and without gradient. Only an optimizer that needs no gradient uses it.
        """
        run.optimizer.step()
