"""Switch between sparse changes on a live plain model: add them to its weights, and remove them to the bit.

    switch = Switch(model)
    switch.load("french", changes)     a ``SparseChange`` for each layer name; kept with the original entries
    switch.load("law", others)
    switch.apply("french")             writes K entries per layer and nothing else
    switch.apply("law")                now the sum of both, rounded once to the weights' dtype
    switch.revert("french")            in any order
    switch.revert()                    the model is the base, to the bit

The weights depend on the set of active changes and not on the order in which they were applied: changes that
overlap are added in the order of loading.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ...errors import ConfigError, suggest_nearest
from ..changes import SparseChange
from ..layer import Patched
from ..roles import is_matrix, is_transposed
from .coding import decode_sorted, encode_sorted


def pack(changes: Sequence[SparseChange], sizes: Sequence[int]) -> dict[str, Tensor]:
    """Pack one change for each weight, as ``Bank.pack`` does. ``sizes``: number of entries of each weight."""
    flat = []
    offset = 0
    for change, size in zip(changes, sizes, strict=True):
        flat.append(change.index.cpu() + offset)
        offset += size
    return {
        "values": torch.cat([change.values.cpu() for change in changes]),
        "starts": torch.tensor([0, *(len(change.index) for change in changes)]).cumsum(0),
        "gaps": encode_sorted(torch.cat(flat)),
    }


def unpack(packed: Mapping[str, Tensor], sizes: Sequence[int]) -> list[SparseChange]:
    """Unpack what ``Bank.pack`` returned into one change for each weight; ``sizes``: their entries.

    Raises ``ConfigError`` if it does not fit weights of these sizes.
    """
    counts = packed["starts"].diff().tolist()
    flat = decode_sorted(packed["gaps"], len(packed["values"]))
    if len(counts) != len(sizes) or sum(counts) != len(flat):
        raise ConfigError(
            f"The stored sparse change is for {len(counts)} weights, but {len(sizes)} were given. "
            "Give the weights that it was trained on."
        )
    changes = []
    offset = 0
    for index, values, size in zip(flat.split(counts), packed["values"].split(counts), sizes, strict=True):
        index = index - offset
        if len(index) and not 0 <= int(index[0]) <= int(index[-1]) < size:
            raise ConfigError(
                "The stored sparse change has positions outside the given weights. "
                "Give the weights that it was trained on."
            )
        changes.append(SparseChange(index, values))
        offset += size
    return changes


def add(changes: Sequence[SparseChange]) -> SparseChange:
    """Sum changes of one weight, on the union of their positions.

    The sum is computed in float64 and rounded once, so the order of the changes hardly ever matters.
    """
    index = torch.cat([change.index for change in changes]).unique()
    values = torch.zeros(len(index), dtype=torch.float64, device=index.device)
    for change in changes:
        values[torch.searchsorted(index, change.index)] += change.values
    return SparseChange(index, values.float())


PROBE = 8  # entries of a weight that are compared before a switch
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # bytes of an element: integer dtype


class _Weight:
    """One weight of the live model, with checks that detect changes made by other code.

    The checks compare torch's version counter, and also a few entries, because fused optimizers do not
    increment the counter.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self.weight: Tensor = layer.get_parameter("weight")
        self.transposed = is_transposed(layer)
        self.flat = self.weight.detach().view(-1)
        first = torch.arange(min(PROBE, len(self.flat)), device=self.flat.device)
        self._remember(first, self.flat[first])

    def _remember(self, index: Tensor, entries: Tensor) -> None:
        self.version, self.probe = self.weight._version, (index[:PROBE], entries[:PROBE].clone())

    def in_storage(self, change: SparseChange) -> SparseChange:
        """Return the change with positions in the weight's storage, on its device."""
        index, values = change.index.to(self.flat.device), change.values.to(self.flat.device)
        if self.transposed:
            in_, out = self.weight.shape
            index, order = (index % in_ * out + index // in_).sort()
            values = values[order]
        return SparseChange(index, values)

    @property
    def touched(self) -> bool:
        """Tell whether something else has written, moved or replaced the weight."""
        if self.layer.weight is not self.weight or self.weight.data_ptr() != self.flat.data_ptr():
            return True
        if self.weight._version != self.version:
            return True
        index, entries = self.probe
        return not torch.equal(self.flat[index], entries)

    def write(self, index: Tensor, entries: Tensor) -> None:
        """Overwrite the entries at ``index``.

        On the CPU, numpy does this: on two cores its serial assignment is faster than every way that torch
        offers.
        """
        if self.flat.device.type == "cpu":
            bits = BITS[self.flat.element_size()]  # numpy has no bfloat16
            self.flat.view(bits).numpy()[index.numpy()] = entries.view(bits).numpy()
            torch.autograd.graph.increment_version(self.flat)
        else:
            self.flat.index_copy_(0, index, entries)
        self._remember(index, entries)


class _Placed:
    """A change of one weight and the original entries at its positions."""

    def __init__(self, weight: _Weight, stored: SparseChange) -> None:
        self.weight, self.change = weight, stored
        self.original = weight.flat.index_select(0, stored.index)

    def apply(self) -> None:
        """Write the changed entries."""
        wide = self.original.to(torch.promote_types(self.original.dtype, torch.float32))
        self.weight.write(self.change.index, (wide + self.change.values).to(self.original.dtype))

    def revert(self) -> None:
        """Write the original entries."""
        self.weight.write(self.change.index, self.original)


class Switch:
    """Named sparse changes of one model's linear layers, any set of which can be active.

    The model must be plain: no part attached, no layer patched. If a weight changes in another way
    (training, loading, moving to another device), every further switch raises ``RuntimeError`` and writes
    nothing. Single entries that are written through ``.data`` are not detected. Use it from one thread, and
    not during a forward pass.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._weights: dict[str, _Weight] = {}
        self._loaded: dict[str, dict[str, _Placed]] = {}
        self._written: dict[str, _Placed] = {}
        self._active: tuple[str, ...] = ()

    @property
    def active(self) -> tuple[str, ...]:
        """Return the names of the active changes, in the order of loading."""
        return self._active

    @property
    def loaded(self) -> tuple[str, ...]:
        """Return the names of all changes."""
        return tuple(self._loaded)

    def load(self, name: str, changes: Mapping[str, SparseChange]) -> None:
        """Prepare ``changes`` (by layer name) under ``name``.

        Raises ``ConfigError`` with every fault, and then loads nothing.
        """
        faults = []
        if name in self._loaded:
            faults.append(f"A change called {name!r} is loaded already; take another name.")
        uses = Counter(id(p) for _, p in self.model.named_parameters(remove_duplicate=False))
        layers = dict(self.model.named_modules())
        for layer, change in changes.items():
            faults += _faults(layer, layers, change, uses)
        if faults:
            raise ConfigError(*faults)
        self._check_untouched()
        active = self._active
        self.to()  # the originals are read from the base
        placed = {}
        for layer, change in changes.items():
            if layer not in self._weights:
                self._weights[layer] = _Weight(layers[layer])
            weight = self._weights[layer]
            placed[layer] = _Placed(weight, weight.in_storage(change))
        self._loaded[name] = placed
        self.to(*active)

    @torch.no_grad()
    def to(self, *names: str) -> None:
        """Make exactly these changes active. Without names, the model becomes the base.

        Raises ``ConfigError`` for an unknown name.
        """
        unknown = [name for name in names if name not in self._loaded]
        if unknown:
            known = ", ".join(self._loaded) or "none"
            faults = []
            for name in unknown:
                hint = suggest_nearest(name, self._loaded)
                faults.append(f"No change called {name!r} is loaded.{hint} Loaded: {known}.")
            raise ConfigError(*faults)
        wanted = tuple(name for name in self._loaded if name in names)
        self._check_untouched()
        if wanted == self._active:
            return
        for placed in self._written.values():
            placed.revert()
        self._active = wanted
        self._written = self._loaded[wanted[0]] if len(wanted) == 1 else self._sums(wanted)
        for placed in self._written.values():
            placed.apply()

    def apply(self, name: str) -> None:
        """Add one change to the active ones. Raises ``ConfigError`` if it is active already."""
        if name in self._active:
            raise ConfigError(
                f"The change {name!r} is active already; applying it again would count it twice."
            )
        self.to(*self._active, name)

    def revert(self, name: str | None = None) -> None:
        """Remove one change, or all. Raises ``ConfigError`` if it is not active."""
        if name is None:
            self.to()
        elif name in self._active:
            self.to(*(other for other in self._active if other != name))
        else:
            active = ", ".join(self._active) or "none"
            raise ConfigError(f"The change {name!r} is not active. Active now: {active}.")

    def _sums(self, names: tuple[str, ...]) -> dict[str, _Placed]:
        """Add up the changes of several names. The model must be the base when this is called."""
        by_layer: dict[str, list[SparseChange]] = {}
        for name in names:
            for layer, placed in self._loaded[name].items():
                by_layer.setdefault(layer, []).append(placed.change)
        return {layer: _Placed(self._weights[layer], add(changes)) for layer, changes in by_layer.items()}

    def _check_untouched(self) -> None:
        """Raise ``RuntimeError`` if something else has changed one of the weights."""
        touched = [name for name, weight in self._weights.items() if weight.touched]
        if touched:
            raise RuntimeError(
                f"{len(touched)} weights (first: {touched[0]}) were changed, moved or replaced by something "
                "else since their changes were loaded, so their originals are no longer known. Revert before "
                "you change weights, and make a new Switch afterwards."
            )


def _faults(
    name: str, layers: Mapping[str, nn.Module], change: SparseChange, uses: Mapping[int, int]
) -> list[str]:
    """Return why ``change`` cannot be written into the layer called ``name``."""
    layer = layers.get(name)
    if layer is None:
        return [f"{name}: the model has no such layer.{suggest_nearest(name, layers)}"]
    if isinstance(layer, Patched):
        return [f"{name} has deltas attached; merge or detach them first."]
    if not is_matrix(layer):
        return [f"{name} is a {type(layer).__name__}, not a linear layer."]
    weight, faults = layer.get_parameter("weight"), list[str]()
    if uses[id(weight)] > 1:
        faults.append(
            f"{name} shares its weight with another layer, so a change here would act there too; "
            "leave it out."
        )
    if not weight.is_floating_point() or not weight.is_contiguous():
        faults.append(
            f"{name}: only contiguous weights of a float type can be changed; this one is {weight.dtype} "
            f"with strides {weight.stride()}."
        )
    return faults + _malformed(name, change, weight.numel())


def _malformed(name: str, change: SparseChange, size: int) -> list[str]:
    """Return why ``change`` is not a valid change of a weight of ``size`` entries."""
    index, values = change.index, change.values
    kinds = index.dtype, values.dtype, index.ndim
    if kinds != (torch.int64, torch.float32, 1) or index.shape != values.shape:
        return [
            f"{name}: a change has int64 positions and as many float32 values, not {index.dtype} "
            f"{tuple(index.shape)} and {values.dtype} {tuple(values.shape)}."
        ]
    if not len(index):
        return []
    if int(index[0]) < 0 or int(index[-1]) >= size or not bool((index.diff() > 0).all()):
        return [f"{name}: the positions must ascend, each once, within the weight's {size} entries."]
    return []
