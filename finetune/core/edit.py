"""Parts that change the input or output of a module, or compute its output instead of it.

The hooks are methods of the part. A deep copy of the model, with or without the states, therefore runs copies
of the parts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .changes import Unit
from .part_base import Part

Side = Literal["input", "output"]


class _Slot:
    """What a hook saves for a later hook of the same forward pass. A deep copy is empty."""

    def __init__(self) -> None:
        self.saved: tuple[float, Tensor | None] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> _Slot:
        return _Slot()


class OnModule(Part):
    """Base of the parts that act on a module as a whole, and not on a weight."""

    layer: str | None = None  # dotted name of the module

    def __init__(self) -> None:
        super().__init__()
        self._module: list[nn.Module] = []  # in a list: a module as an attribute would join the state

    @property
    def module(self) -> nn.Module:
        """Return the module that the part acts on."""
        return self._module[0]

    @property
    def mergeable(self) -> bool:
        return False

    def units(self) -> list[Unit]:
        return [Unit(name, self.layer, p) for name, p in self.named_parameters() if p.requires_grad]

    def _take_place(self, model: nn.Module, name: str) -> nn.Module:
        """Remember the module called ``name``, and return it."""
        if self._module:
            raise RuntimeError(f"this part acts on {self.layer} already, so it cannot act on {name}, too")
        module = model.get_submodule(name)
        self.layer, self._module = name, [module]
        return module


class Edit(OnModule):
    """A trained change of the input or output tensor of a module.

    ``gate * forward(y, x)`` is added to the tensor ``y``, in the wider dtype of the two, and the sum is
    rounded to the dtype of ``y``. With gate 0, ``y`` is passed on and no gradient flows. The gate is read
    once in a forward pass. A module may take its input as a keyword argument and return a tuple:
    ``y`` and ``x`` are then the first tensors, and the rest is passed on.

    An edit can be merged if it overrides ``fold_into``; otherwise merging is refused.
    """

    folds_itself = True

    def __init__(self) -> None:
        super().__init__()
        self._hooks: list[RemovableHandle] = []
        self._slot = _Slot()
        self._reads_elsewhere = False

    def describe(self) -> str:
        return f"an edit of a module's tensors ({type(self).__name__})"

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        """Return the change of ``y``, without the gate: of its shape, and of its dtype or a wider one.

        ``x``: the input of the edited module, or the tensor chosen by ``reads`` and ``reads_side`` of ``on``.
        """
        raise NotImplementedError

    @property
    def has_effect(self) -> bool:
        """Tell whether the edit has any effect now; if not, the module's tensors are passed on."""
        return True

    @property
    def mergeable(self) -> bool:
        """Tell whether the class overrides ``fold_into`` and the layer carries no delta."""
        own = type(self).fold_into is not Edit.fold_into
        return own and not getattr(self.module, "deltas", ())

    @property
    def keeps_zeros(self) -> bool:
        """Tell whether folding leaves entries at 0 that are 0; until then an edit changes no weight."""
        return type(self).fold_into is Edit.fold_into

    def fold_into(self, module: nn.Module) -> None:
        """Write ``gate`` times the edit into the module's parameters, which are float32 or wider."""
        raise NotImplementedError(f"{self.describe()} cannot be folded into weights")

    def folded_parameters(self) -> list[str]:
        return [f"{self.layer}.{name}" for name, _ in self.module.named_parameters()]

    @torch.no_grad()
    def fold(self) -> None:
        """Write the edit into the module's parameters, and remove it from the model."""
        if self.gate and self.has_effect:
            self.fold_into(self.module)
        self.detach()

    def on(
        self,
        model: nn.Module,
        name: str,
        edits: Side = "output",
        reads: str | None = None,
        reads_side: Side = "input",
    ) -> Self:
        """Edit the output (or input) of the module called ``name`` until ``detach`` is called.

        ``reads``: name of the module whose input (or output) is ``x``; it must run before the edited tensor
        exists. By default ``x`` is the input of the edited module.
        """
        module = self._take_place(model, name)
        if reads is not None:
            self._reads_elsewhere = True
            source = model.get_submodule(reads)
            if reads_side == "input":
                self._hooks.append(source.register_forward_pre_hook(self._read_input, with_kwargs=True))
            else:
                self._hooks.append(source.register_forward_hook(self._read_output))
        if edits == "input":
            self._hooks.append(module.register_forward_pre_hook(self._edit_input, with_kwargs=True))
        else:
            self._hooks.append(module.register_forward_hook(self._edit_output, with_kwargs=True))
        return self

    def follow(self, old: nn.Module, new: nn.Module) -> None:
        """Act on ``new`` if this edit acts on ``old``, whose place and hooks ``new`` has taken."""
        if self._module and self.module is old:
            self._module = [new]

    def detach(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._module, self._slot = [], [], _Slot()
        self._reads_elsewhere = False

    def _read_input(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._save(_get_input(args, kwargs))

    def _read_output(self, _module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        self._save(_get_first(output))

    def _save(self, x: Tensor) -> None:
        gate = self.gate if self.has_effect else 0.0
        self._slot.saved = (gate, x if gate else None)

    def _edit_input(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        y = _get_input(args, kwargs)
        edited = self._change(y, y)
        return None if edited is y else _with_input(args, kwargs, edited)

    def _edit_output(
        self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        y = _get_first(output)
        edited = self._change(y, None if self._reads_elsewhere else _get_input(args, kwargs))
        return None if edited is y else _with_first(output, edited)

    def _change(self, y: Tensor, x: Tensor | None) -> Tensor:
        """Return ``y`` with the change, or ``y`` itself if the gate is 0. ``x``: None if a hook saved it."""
        if self._reads_elsewhere:
            if self._slot.saved is None:
                raise RuntimeError(
                    f"an edit of {self.layer} reads a module that did not run before it in this forward pass"
                )
            (gate, x), self._slot.saved = self._slot.saved, None
        else:
            gate = self.gate if self.has_effect else 0.0
        if not gate:
            return y
        assert x is not None
        change: Tensor = self(y, x)
        return (y + (change if gate == 1 else gate * change)).to(y.dtype)


class Replacement(OnModule):
    """Computes a module's output instead of the module while the gate is 1. The gate is 0 or 1."""

    gate_is_switch = True
    keeps_zeros = True  # it changes no weight

    def describe(self) -> str:
        return f"a replacement of a module ({type(self).__name__})"

    def forward(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Return the module's output for these arguments. ``original`` is the module's own forward."""
        raise NotImplementedError

    def on(self, model: nn.Module, name: str) -> Self:
        """Replace what the module called ``name`` computes until ``detach`` is called."""
        module: Any = self._take_place(model, name)
        self._original: Callable[..., Any] = module.forward
        self._had_own = "forward" in vars(module)
        module.forward = self._run
        return self

    def detach(self) -> None:
        if not self._module:
            return
        module: Any = self.module
        if self._had_own:
            module.forward = self._original
        else:
            del module.forward
        self._module = []

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        return self(self._original, *args, **kwargs) if self.gate else self._original(*args, **kwargs)


def _get_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return a module's input tensor."""
    key = _find_input(args, kwargs)
    found: Tensor = args[key] if isinstance(key, int) else kwargs[key]
    return found


def _with_input(
    args: tuple[Any, ...], kwargs: dict[str, Any], new: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments with ``new`` in place of the input tensor."""
    key = _find_input(args, kwargs)
    if isinstance(key, int):
        return (*args[:key], new, *args[key + 1 :]), kwargs
    return args, {**kwargs, key: new}


def _find_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | str:
    """Return the position or the keyword of a module's input tensor.

    That is the first positional tensor, or else ``hidden_states``, or else the first tensor by keyword.
    """
    for place, value in enumerate(args):
        if isinstance(value, Tensor):
            return place
    for name in ("hidden_states", *kwargs):
        if isinstance(kwargs.get(name), Tensor):
            return name
    raise RuntimeError("an edit needs a module that is called with a tensor")


def _get_first(output: Any) -> Tensor:
    """Return an output that is a tensor, or the first of a tuple or list."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, tuple | list) and output and isinstance(output[0], Tensor):
        return output[0]
    kind = type(output).__name__
    raise RuntimeError(f"an edit needs a module that returns a tensor or a tuple of tensors, not a {kind}")


def _with_first(output: Any, new: Tensor) -> Any:
    """Return the output with ``new`` instead of its first tensor."""
    if isinstance(output, Tensor):
        return new
    if hasattr(output, "_replace"):  # a named tuple
        return output._replace(**{output._fields[0]: new})
    return type(output)([new, *output[1:]])
