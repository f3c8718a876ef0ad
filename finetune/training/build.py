"""Build the states of a phase: what is trained of a model, and the parts attached to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from ..core.attach import parts
from ..core.inplace import InPlace
from ..core.method import Method
from ..core.selector import Selector
from ..errors import ConfigError


@dataclass(frozen=True)
class Pretrained:
    """A model to train, whose parameters are frozen.

    ``head``: names of the parameters of its head, which every method trains. ``new_head``: whether the head
    starts anew, instead of coming with the checkpoint. ``reload`` returns the model as it was, as a new
    module, for methods that keep no copy of its parameters. ``read_teacher`` returns the model in another
    folder; it raises ``ConfigError`` if that model does not fit the task.
    """

    model: nn.Module
    head: tuple[str, ...] = ()
    new_head: bool = True
    reload: Callable[[], nn.Module] | None = None
    read_teacher: Callable[[str], nn.Module] | None = None

    def original_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the model's parameters as they were, by name."""
        assert self.reload is not None
        for name, parameter in self.reload().named_parameters():
            yield name, parameter.detach()


def build_states(pretrained: Pretrained, method: Method, selector: Selector | None = None) -> nn.ModuleDict:
    """Attach the trainable head and the method's parts to the model; return their states.

    The keys are ``head`` (where there is a new one), ``method``, and ``selector`` if one is given. Shapes
    follow from the configuration and the model alone, so a model on the meta device can be built for, too.
    Raises ``ConfigError`` if the method or the selector does not fit the model, or if nothing is
    trained.
    """
    model, states = pretrained.model, nn.ModuleDict()
    if pretrained.head:
        states["head"] = InPlace(model, list(pretrained.head), keep=True)
    states["method"] = method.build(model)
    for part in parts(states):
        part.use_source(pretrained.original_parameters if pretrained.reload else None)
    if not any(parameter.requires_grad for parameter in states.parameters()):
        raise ConfigError(
            f"method={method.name} has nothing to train here: a language model has no new head. "
            "Choose another method, for example lora."
        )
    if selector is not None:
        states["selector"] = selector.build(model, states) or nn.Module()
    return states
