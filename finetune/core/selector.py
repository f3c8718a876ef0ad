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

    def streams(self) -> tuple[str, ...]:
        """Name the data streams whose gradients ``before_step`` asks ``run.stream_gradients`` for."""
        return ()

    def build(self, model: nn.Module, states: nn.Module) -> nn.Module | None:
        """Make the selector's state, after the method's parts are attached; None if it has none.

        Raises ``ConfigError`` if the selector cannot act on these parts.
        """
        return None

    def before_step(self, run: Run, state: Any) -> None:
        """Freeze what does not train in this step. Called after the method's ``before_step``."""

    def trains(self, state: Any) -> bool:
        """Tell whether anything trains in this step, as ``before_step`` left it; if not, the step is skipped.

        The loss of a skipped step is measured in eval mode, and no value moves.
        """
        return True

    def after_step(self, run: Run, state: Any) -> None:
        """Undo what ``before_step`` set. Between steps everything is trainable, as it was built."""

    def count_selected(self, state: Any) -> dict[str, int]:
        """Return in how many steps of the phase each block was selected, by its name, for ``result.json``.

        Nothing if the selector does not count.
        """
        return {}
