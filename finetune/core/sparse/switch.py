"""Sparse changes on a live plain model: put into the weights in place and taken out again, to the bit.

    switch = Switch(model)
    switch.load("french", changes)          SparseChange by layer name; kept beside the model, with the original entries
    switch.load("law", others)
    switch.apply("french")                  writes K entries a layer and nothing else
    switch.apply("law")                     the sum of both, rounded once to the weights' type
    switch.revert("french")                 in any order
    switch.revert()                         the model is the base, to the bit

Only the set of changes that are in counts, not the order in which they came: where they overlap they are added in the order of loading.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ...errors import ConfigError, near
from ..changes import SparseChange
from ..part import Patched
from ..roles import is_matrix
from .coding import decode_sorted, encode_sorted


def pack(changes: Sequence[SparseChange], sizes: Sequence[int]) -> dict[str, Tensor]:
    """The form that ``Bank.pack`` gives, of one change for each weight; ``sizes``: their entries."""
    starts = torch.tensor([0, *(len(c.index) for c in changes)]).cumsum(0)
    offsets = torch.tensor([0, *sizes]).cumsum(0)[:-1].tolist()
    flat = torch.cat([c.index.cpu() + offset for c, offset in zip(changes, offsets, strict=True)])
    return {
        "values": torch.cat([c.values.cpu() for c in changes]),
        "starts": starts,
        "gaps": encode_sorted(flat),
    }


def unpack(packed: Mapping[str, Tensor], sizes: Sequence[int]) -> list[SparseChange]:
    """One change for each weight from what ``Bank.pack`` gave. Raises ``ConfigError`` where it does not fit weights of these sizes."""
    counts = packed["starts"].diff().tolist()
    flat = decode_sorted(packed["gaps"], len(packed["values"]))
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    if len(counts) != len(sizes) or sum(counts) != len(flat):
        raise ConfigError(
            f"The stored sparse change is of {len(counts)} weights, and {len(sizes)} are given. Give those that it was trained on."
        )
    index = [part - offset for part, offset in zip(flat.split(counts), offsets.tolist(), strict=False)]
    if any(len(i) and not 0 <= int(i[0]) <= int(i[-1]) < size for i, size in zip(index, sizes, strict=True)):
        raise ConfigError(
            "The stored sparse change has positions outside the weights given. Give those that it was trained on."
        )
    return [SparseChange(i, v) for i, v in zip(index, packed["values"].split(counts), strict=True)]


def add(changes: Sequence[SparseChange]) -> SparseChange:
    """The sum, on the union of the positions: taken in float64 and rounded once, so that the order hardly ever shows."""
    index = torch.cat([c.index for c in changes]).unique()
    values = torch.zeros(len(index), dtype=torch.float64, device=index.device)
    for change in changes:
        values[torch.searchsorted(index, change.index)] += change.values
    return SparseChange(index, values.float())


PROBE = 8  # entries a weight that are compared before a switch
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class _Weight:
    """One weight in place. Remembers torch's count of in-place changes, which fused optimizers pass by, and a few entries."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self.weight: Tensor = layer.get_parameter("weight")
        self.transposed = type(layer).__name__ == "Conv1D"  # stored [in, out]
        self.flat = self.weight.detach().view(-1)
        first = torch.arange(min(PROBE, len(self.flat)), device=self.flat.device)
        self._remember(first, self.flat[first])

    def _remember(self, index: Tensor, entries: Tensor) -> None:
        self.version, self.probe = self.weight._version, (index[:PROBE], entries[:PROBE].clone())

    def stored(self, change: SparseChange) -> SparseChange:
        """The same with positions in storage, on the weight's device."""
        index, values = change.index.to(self.flat.device), change.values.to(self.flat.device)
        if self.transposed:
            in_, out = self.weight.shape
            index, order = (index % in_ * out + index // in_).sort()
            values = values[order]
        return SparseChange(index, values)

    @property
    def touched(self) -> bool:
        """Whether another than this object wrote, moved or replaced the weight."""
        elsewhere = self.layer.weight is not self.weight or self.weight.data_ptr() != self.flat.data_ptr()
        return (
            elsewhere
            or self.weight._version != self.version
            or not torch.equal(self.flat[self.probe[0]], self.probe[1])
        )

    def write(self, index: Tensor, entries: Tensor) -> None:
        """Overwrite the entries at ``index``. On the CPU by numpy, whose serial assignment beats all of torch's on two cores too."""
        if self.flat.device.type == "cpu":
            bits = BITS[self.flat.element_size()]  # numpy has no bfloat16
            self.flat.view(bits).numpy()[index.numpy()] = entries.view(bits).numpy()
            torch.autograd.graph.increment_version(self.flat)
        else:
            self.flat.index_copy_(0, index, entries)
        self._remember(index, entries)


class _Placed:
    """A change of one weight, ready to be written: the original entries are kept from now on."""

    def __init__(self, weight: _Weight, stored: SparseChange) -> None:
        self.weight, self.change = weight, stored
        self.original = weight.flat.index_select(0, stored.index)

    def apply(self) -> None:
        wide = self.original.to(torch.promote_types(self.original.dtype, torch.float32))
        self.weight.write(self.change.index, (wide + self.change.values).to(self.original.dtype))

    def revert(self) -> None:
        self.weight.write(self.change.index, self.original)


class Switch:
    """Named sparse changes of one model's linear layers, any set of which can be in. The model must be plain: nothing attached, no layer patched.

    Weights that change in another way while this object knows them (training, loading, moving to another device) are noticed, and nothing is written
    any more: ``RuntimeError``. What goes unnoticed: single entries written through ``.data``. One thread at a time, no forward pass during a switch.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._weights: dict[str, _Weight] = {}
        self._loaded: dict[str, dict[str, _Placed]] = {}
        self._in: dict[str, _Placed] = {}
        self._active: tuple[str, ...] = ()

    @property
    def active(self) -> tuple[str, ...]:
        """The names of the changes that are in, in the order of loading."""
        return self._active

    @property
    def loaded(self) -> tuple[str, ...]:
        """The names of all changes."""
        return tuple(self._loaded)

    def load(self, name: str, changes: Mapping[str, SparseChange]) -> None:
        """Keep ``changes`` (by layer name) ready under ``name``. Raises ``ConfigError`` with all that does not fit; nothing is loaded then."""
        faults = (
            [f"A change called {name!r} is loaded already; take another name."]
            if name in self._loaded
            else []
        )
        uses = Counter(id(p) for _, p in self.model.named_parameters(remove_duplicate=False))
        layers = dict(self.model.named_modules())
        for layer, change in changes.items():
            faults += _faults(layer, layers, change, uses)
        if faults:
            raise ConfigError(*faults)
        self._check()
        active = self._active
        self.to()
        for layer in changes:
            if layer not in self._weights:
                self._weights[layer] = _Weight(layers[layer])
        self._loaded[name] = {
            n: _Placed(self._weights[n], self._weights[n].stored(c)) for n, c in changes.items()
        }
        self.to(*active)

    @torch.no_grad()
    def to(self, *names: str) -> None:
        """Make exactly these changes be in; none: the base. Raises ``ConfigError`` for an unknown name."""
        unknown = [n for n in names if n not in self._loaded]
        if unknown:
            raise ConfigError(
                *(
                    f"No change called {n!r} is loaded.{near(n, self._loaded)} Loaded: {', '.join(self._loaded) or 'none'}."
                    for n in unknown
                )
            )
        wanted = tuple(n for n in self._loaded if n in names)
        self._check()
        if wanted == self._active:
            return
        for placed in self._in.values():
            placed.revert()
        self._active = wanted
        self._in = self._loaded[wanted[0]] if len(wanted) == 1 else self._sums(wanted)
        for placed in self._in.values():
            placed.apply()

    def apply(self, name: str) -> None:
        """Put one more change in. Raises ``ConfigError`` if it is in already."""
        if name in self._active:
            raise ConfigError(f"The change {name!r} is in already; a second time it would count twice.")
        self.to(*self._active, name)

    def revert(self, name: str | None = None) -> None:
        """Take one change out, or all. Raises ``ConfigError`` if it is not in."""
        if name is not None and name not in self._active:
            raise ConfigError(f"The change {name!r} is not in. In now: {', '.join(self._active) or 'none'}.")
        self.to(*(n for n in self._active if name not in (n, None)))

    def _sums(self, names: tuple[str, ...]) -> dict[str, _Placed]:
        """The changes of several names as one; the base must be in place."""
        found: dict[str, list[SparseChange]] = {}
        for name in names:
            for layer, placed in self._loaded[name].items():
                found.setdefault(layer, []).append(placed.change)
        return {layer: _Placed(self._weights[layer], add(parts)) for layer, parts in found.items()}

    def _check(self) -> None:
        wrong = [name for name, weight in self._weights.items() if weight.touched]
        if wrong:
            raise RuntimeError(
                f"{len(wrong)} weights (first: {wrong[0]}) were changed, moved or replaced by something else since their changes were loaded, "
                "so their originals are not known any more. Revert before that, and make a new Switch after it."
            )


def _faults(
    name: str, layers: Mapping[str, nn.Module], change: SparseChange, uses: Mapping[int, int]
) -> list[str]:
    """Why ``change`` cannot be written into the layer called ``name``."""
    layer = layers.get(name)
    if layer is None:
        return [f"{name}: the model has no such layer.{near(name, layers)}"]
    if isinstance(layer, Patched):
        return [f"{name} has deltas attached; merge or detach them first."]
    if not is_matrix(layer):
        return [f"{name} is a {type(layer).__name__}, not a linear layer."]
    weight, (index, values) = layer.get_parameter("weight"), (change.index, change.values)
    faults = []
    if uses[id(weight)] > 1:
        faults.append(
            f"{name} shares its weight with another layer, so a change here would act there too; leave it out."
        )
    if not weight.is_floating_point() or not weight.is_contiguous():
        faults.append(
            f"{name}: only contiguous weights of a float type can be changed; this one is {weight.dtype} with strides {weight.stride()}."
        )
    if (index.dtype, values.dtype, index.ndim) != (
        torch.int64,
        torch.float32,
        1,
    ) or index.shape != values.shape:
        what = f"{index.dtype} {tuple(index.shape)} and {values.dtype} {tuple(values.shape)}"
        faults.append(f"{name}: a change has int64 positions and as many float32 values, not {what}.")
    elif len(index) and not (
        int(index[0]) >= 0 and int(index[-1]) < weight.numel() and bool((index.diff() > 0).all())
    ):
        faults.append(
            f"{name}: the positions must ascend, each once, within the weight's {weight.numel()} entries."
        )
    return faults
