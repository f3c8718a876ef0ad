"""The interface of a selector: it decides before every step which parts of a method train in that step.

The method does not know about it. The order within a step:

method.before_step -> selector.before_step -> forward, backward, optimizer.step -> method.after_step ->
selector.after_step
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:  # the configuration uses selectors in places where torch must not be imported
    from torch import nn

    from .method import Run


@dataclass(frozen=True)
class Selector:
    """Base of all selectors. It selects everything."""

    KIND: ClassVar[str] = "selector"
    name: ClassVar[str]
    unused_parameters: ClassVar[bool] = False  # whether some trained tensors may get no gradient in a step

    def faults(self, steps: int) -> list[str]:
        """Return why the settings make no sense in a run of ``steps`` steps, one sentence for each fault."""
        return []

    def build(self, model: nn.Module, states: nn.Module) -> nn.Module | None:
        """Make the selector's state, after the method's parts are attached; None if it has none.

        Raises ``ConfigError`` if the selector cannot act on these parts.
        """
        return None

    def before_step(self, run: Run, state: Any) -> None:
        """Freeze what does not train in this step. Called after the method's ``before_step``."""

    def after_step(self, run: Run, state: Any) -> None:
        """Undo what ``before_step`` set. Between steps everything is trainable, as it was built."""
