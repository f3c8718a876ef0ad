"""What a selector is: it says, before every step, which of a method's parts train in it. The method does not know.

method.before_step -> selector.before_step -> forward, backward, optimizer.step -> method.after_step -> selector.after_step
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:  # the configuration asks for selectors where torch is not wanted
    from torch import nn

    from .method import Run


@dataclass(frozen=True)
class Selector:
    """Base of all selectors; it selects everything."""

    KIND: ClassVar[str] = "selector"
    name: ClassVar[str]
    unused_parameters: ClassVar[bool] = False  # some trained tensors may get no gradient in a step

    def faults(self, steps: int) -> list[str]:
        """What cannot mean anything in a run of so many steps, each as a sentence that names the setting."""
        return []

    def build(self, model: nn.Module, states: nn.Module) -> nn.Module | None:
        """The state, made when the method's parts are attached. Raises ``ConfigError`` where it cannot act on them."""
        return None

    def before_step(self, run: Run, state: Any) -> None: ...

    def after_step(self, run: Run, state: Any) -> None:
        """Undo what ``before_step`` set: between steps everything counts as trained, as it was built."""
