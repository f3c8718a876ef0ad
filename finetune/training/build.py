"""Build the states of a phase: what is trained of a model, and the parts attached to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..core.attach import parts
from ..core.inplace import InPlace
from ..core.method import Method
from ..core.part import Source
from ..core.selector import Selector
from ..core.zeros import layers_with_zeros
from ..errors import ConfigError
from ..models.load import Base, original_parameters, reload


@dataclass(frozen=True)
class Pretrained:
    """A model to train, whose parameters are frozen.

    ``head``: names of the parameters of its head. ``new_head``: the head is newly initialized; otherwise the
    model has the values that the checkpoint came with. ``train_head``: whether the head is trained; only a
    kept one may be frozen. ``reload`` returns the model as it was, as a new module, for methods that keep no
    copy of its parameters. ``source`` reads these parameters again without a second model where it can.
    ``read_teacher`` returns the model in another folder; it raises ``ConfigError`` if that model does not fit
    the task.
    """

    model: nn.Module
    head: tuple[str, ...] = ()
    new_head: bool = True
    train_head: bool = True
    reload: Callable[[], nn.Module] | None = None
    source: Source | None = None
    read_teacher: Callable[[str], nn.Module] | None = None

    def original_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the model's parameters as they were, by name."""
        if self.source is not None:
            yield from self.source()
            return
        assert self.reload is not None
        for name, parameter in self.reload().named_parameters():
            yield name, parameter.detach()


def take_base(base: Base, method: Method) -> Pretrained:
    """Return the model of ``base`` as ``method`` trains it."""
    return Pretrained(
        base.model,
        base.head,
        base.new_head,
        method.head,
        reload=partial(reload, base),
        source=partial(original_parameters, base),
    )


def build_states(
    pretrained: Pretrained,
    method: Method,
    selector: Selector | None = None,
    previous: nn.ModuleDict | None = None,
) -> nn.ModuleDict:
    """Attach the head and the method's parts to the model; return their states.

    ``previous``: the states of the phase before, if its parts stay attached. They are frozen, and its head is
    trained on.

    The keys are ``head`` (for a classifier), ``method``, ``selector`` if one is given, and ``kept`` for the
    methods' states of earlier phases, by their number. Shapes follow from the configuration and the model
    alone, so a model on the meta device can be built for, too. Raises ``ConfigError`` if the method or the
    selector does not fit the model, if nothing is trained, or if an untrained head would be frozen.
    """
    model, states = pretrained.model, nn.ModuleDict()
    head: Any = None
    if not pretrained.train_head:
        _check_frozen_head(pretrained)
    if previous is not None and "head" in previous:
        head = states["head"] = previous["head"]
    elif pretrained.head:
        head = states["head"] = InPlace(model, list(pretrained.head), keep=True)
    if previous is not None:
        kept = list(previous["kept"].children()) if "kept" in previous else []
        kept.append(previous["method"])
        states["kept"] = nn.ModuleList(kept)
    states["method"] = method.build(model)  # a method that trains all parameters finds the head taken
    if previous is not None:
        states["kept"].requires_grad_(False)
    if head is not None and not pretrained.train_head:
        head.freeze_for_good()
    _refuse_losing_zeros(model, states, method)
    for part in parts(states):
        part.use_source(pretrained.original_parameters if pretrained.reload else None)
    if not any(parameter.requires_grad for parameter in states.parameters()):
        reason = "method.head=false freezes the head" if head else "a language model has no new head"
        raise ConfigError(
            f"method={method.name} has nothing to train here: {reason}. "
            "Choose another method, for example lora."
        )
    if selector is not None:
        states["selector"] = selector.build(model, states) or nn.Module()
    return states


def method_states(states: nn.ModuleDict) -> list[nn.Module]:
    """Return the states of the methods that are attached, by phase: the kept ones, then the current one."""
    kept: list[nn.Module] = list(states["kept"].children()) if "kept" in states else []
    return [*kept, states["method"]]


def _refuse_losing_zeros(model: nn.Module, states: nn.Module, method: Method) -> None:
    """Raise ``ConfigError`` if entries of the model are held at 0 and a part may change them."""
    if not any(layers_with_zeros(model)):
        return
    losing = sorted({part.describe() for part in parts(states) if not part.keeps_zeros})
    if losing:
        raise ConfigError(
            f"method={method.name} cannot keep the zeros of this pruned model: it trains "
            f"{' and '.join(losing)}. Choose another method, for example lora, or set model.zeros=free, "
            "which lets every entry change."
        )


def _check_frozen_head(pretrained: Pretrained) -> None:
    """Raise ``ConfigError`` unless the model has a head that can be left as it is."""
    if not pretrained.head:
        raise ConfigError(
            "method.head=false has no effect on a language model, which has no head for labels. Leave it out."
        )
    if pretrained.new_head:
        raise ConfigError(
            "method.head=false would leave a new head untrained, at random values. Take model.head=keep and "
            "a checkpoint whose head has the labels of the data set, or leave method.head out."
        )
