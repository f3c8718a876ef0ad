"""The store of a sparse method: K trained values and their positions, for all of its sites together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ConfigError
from ..changes import Changes, SparseChange, Unit
from ..part import Cache, Delta, WeightGrad
from ..site import Site
from ..state import EntryStore, Shapes, StateModule
from .coding import decode_sorted, encode_sorted, expected_bytes
from .gradient import Layout, entries_gradient, make_layout, read, used_columns, write_


class Bank(StateModule):
    """Room for ``capacity`` float32 values over ``sites``. A value is the change of one entry, from 0.

    The capacity never changes, so optimizers and data parallelism need not know when entries move. Values
    behind ``starts[-1]`` are unused: they are 0 and get no gradient. Settled entries are no longer trained
    and keep their change. All tensors below are state and are saved; what ``SparseDelta`` derives from them
    is not.
    """

    index: Tensor  # [capacity] int32: flat position of each value in its site's weight, ascending in a site
    starts: Tensor  # [sites + 1] int64: where the values of each site start
    settled_values: Tensor  # [any length], and the two below: settled entries in the same form
    settled_index: Tensor
    settled_starts: Tensor

    def __init__(self, sites: list[Site], capacity: int) -> None:
        super().__init__()
        if max(s.size for s in sites) >= 2**31:
            raise ValueError("a site of 2**31 entries or more needs 64-bit indices")
        self.sizes = [s.size for s in sites]
        self.shapes = [s.shape for s in sites]
        self._sites = sites
        self.chooses_live = False  # whether the method chooses no entry that is held at 0
        self.ages = False  # whether the optimizer counts the steps of each value alone; the method sets it
        self.values = nn.Parameter(torch.zeros(capacity))
        self.register_buffer("index", torch.zeros(capacity, dtype=torch.int32))
        self.register_buffer("starts", torch.zeros(len(sites) + 1, dtype=torch.int64))
        self.register_buffer("settled_values", torch.zeros(0))
        self.register_buffer("settled_index", torch.zeros(0, dtype=torch.int32))
        self.register_buffer("settled_starts", torch.zeros(len(sites) + 1, dtype=torch.int64))
        self.frozen = [False] * len(sites)  # sites that do not train in this step; selectors set it
        # Called in backward with the whole gradient of each site. True: the values need no gradient.
        self.watch: Callable[[int, WeightGrad], bool] | None = None
        self.revision = 0  # counts moves of entries; caches that depend on positions are made again
        self._bounds: dict[str, tuple[tuple[int, int], list[int]]] = {}
        self._slices: tuple[Tensor, ...] = ()
        self._slices_key = (0, -1, -1)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the cached slices out of copies: torch cannot copy tensors that are part of a graph."""
        return self.__dict__ | {"_slices": (), "_slices_key": (0, -1, -1)}

    @property
    def entry_store(self) -> EntryStore:
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Make room for the saved number of settled entries, and refuse positions outside the weights."""
        for name in ("settled_values", "settled_index"):
            if prefix + name in state_dict:
                setattr(self, name, getattr(self, name).new_empty(state_dict[prefix + name].shape))
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.revision += 1
        trained_fit = self._positions_fit(self.starts, self.index)
        if not trained_fit or not self._positions_fit(self.settled_starts, self.settled_index):
            errors: list[str] = args[-1]  # torch raises them
            errors.append(f"{prefix}index has positions outside the layers")

    def _positions_fit(self, starts: Tensor, index: Tensor) -> bool:
        """Tell whether the slices lie within ``index``, and its positions within their sites."""
        counts, sizes = starts.diff(), torch.tensor(self.sizes, device=starts.device)
        if int(starts[0]) or (counts < 0).any() or int(starts[-1]) > len(index):
            return False
        used = index[: int(starts[-1])]
        if ((used < 0) | (used >= sizes.repeat_interleave(counts))).any():
            return False
        return self._are_live(used.split(counts.tolist()))

    def _are_live(self, index: Sequence[Tensor]) -> bool:
        """Tell whether no position, of those of each site, is of an entry that is held at 0."""
        for site, where in zip(self._sites, index, strict=True):
            pruned = site.pruned
            if pruned is not None and bool(pruned.reshape(-1)[where.to(pruned.device).long()].any()):
                return False
        return True

    def bounds(self, name: str = "starts") -> list[int]:
        """Return ``starts``, or another buffer, as Python numbers, read from the device once a revision."""
        buffer: Tensor = getattr(self, name)
        key = (self.revision, buffer._version)
        if name not in self._bounds or self._bounds[name][0] != key:
            self._bounds[name] = key, buffer.tolist()
        return self._bounds[name][1]

    @property
    def active(self) -> int:
        """Return the number of entries that are trained now."""
        return self.bounds()[-1]

    def slice(self, i: int) -> Tensor:
        """Return the values of site ``i``, with gradient unless the site is frozen.

        One split serves a whole forward pass: backward then joins the gradients once, instead of padding the
        gradient of each site to the capacity.
        """
        bounds = self.bounds()
        if not torch.is_grad_enabled():
            return self.values.detach()[bounds[i] : bounds[i + 1]]
        key = (id(self.values), self.values._version, self.revision)
        if key != self._slices_key:
            counts = [b - a for a, b in zip(bounds, [*bounds[1:], len(self.values)], strict=True)]
            self._slices, self._slices_key = torch.split(self.values, counts), key
        return self._slices[i].detach() if self.frozen[i] else self._slices[i]

    def pruned(self, i: int) -> Tensor | None:
        """Return which entries of site ``i``'s weight are held at 0, [out, in] bool; None if none are."""
        return self._sites[i].pruned

    def positions(self, i: int) -> Tensor:
        """Return the flat positions of site ``i``'s values, int32, ascending."""
        bounds = self.bounds()
        return self.index[bounds[i] : bounds[i + 1]]

    def settled(self, i: int) -> tuple[Tensor, Tensor]:
        """Return the values and the flat positions of site ``i``'s settled entries."""
        a, b = self.bounds("settled_starts")[i : i + 2]
        return self.settled_values[a:b], self.settled_index[a:b]

    def all(self, i: int) -> tuple[Tensor, Tensor]:
        """Return values and positions of all that differs from the base, trained entries first."""
        values, where = self.settled(i)
        if not len(values):
            return self.slice(i), self.positions(i)
        return torch.cat([self.slice(i), values]), torch.cat([self.positions(i), where])

    @torch.no_grad()
    def place(self, index: list[Tensor]) -> None:
        """Train the entries at these flat positions of each site (distinct, ascending), from a change of 0.

        Raises ``ValueError`` if there are more than the capacity.
        """
        self._set_positions(index)
        self.values.zero_()

    def _set_positions(self, index: list[Tensor]) -> None:
        """Write down which entries are trained."""
        self._check_capacity(index)
        if not self._are_live(index):
            raise ValueError("an entry that is pruned and stays 0 cannot be trained")
        starts = _starts(index)
        for where, start in zip(index, starts.tolist(), strict=False):
            self.index[start : start + len(where)] = where
        self.starts.copy_(starts)
        self.index[int(starts[-1]) :] = 0
        self.revision += 1

    def _check_capacity(self, index: list[Tensor]) -> None:
        count = sum(len(where) for where in index)
        if count > len(self.values):
            raise ValueError(f"{count} entries do not fit into a bank of {len(self.values)}")

    @torch.no_grad()
    def revise(
        self,
        index: list[Tensor],
        moments: dict[str, Tensor],
        dropped: str,
        seeds: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """Train these entries of each site instead of the current ones. Works in place.

        Entries that stay keep value and moments to the bit, even if their slots move. ``moments``: the
        optimizer's tensors of shape [capacity], which are moved along; new entries get ``seeds[name]``
        [capacity], or 0. ``dropped``: entries that leave go back to the pretrained weight (``base``) or
        settle with their change (``kept``). A settled entry that returns starts from its change. Returns the
        slots of the new entries, int64.
        """
        self._check_capacity(index)
        old_starts, starts = self.bounds(), _starts(index).tolist()
        # The old slot of each entry, -1 if it is new; int32, since those of all sites are held at once.
        sources: list[Tensor] = []
        settled: list[tuple[Tensor, Tensor]] = []
        fresh = torch.zeros_like(self.values)  # values of new entries
        for i, new in enumerate(index):
            old, (settled_values, settled_where) = self.positions(i), self.settled(i)
            source, returning = _find(new, old), _find(new, settled_where)
            has_returned = returning >= 0
            fresh[starts[i] + has_returned.nonzero().view(-1)] = settled_values[returning[has_returned]]
            stays_settled = _all_but(len(settled_where), returning[has_returned])
            if dropped == "kept":
                settles = _all_but(len(old), source[source >= 0])
            else:
                settles = torch.zeros(len(old), dtype=torch.bool, device=old.device)
            where, order = torch.cat([settled_where[stays_settled], old[settles]]).sort()
            values = torch.cat([settled_values[stays_settled], self.slice(i)[settles]])[order]
            settled.append((values, where))
            sources.append(source.to(torch.int32))
        self.revision += 1  # what follows cannot be repeated if memory runs out
        for name, t in {"": self.values.data, **moments}.items():
            if name:
                del fresh  # before the next one is made
                fresh = torch.zeros_like(t).copy_((seeds or {}).get(name, torch.zeros(())))
            for source, old_start, start, end in zip(sources, old_starts, starts, starts[1:], strict=False):
                fresh[start:end] = _moved(t, source, old_start, fresh[start:end])
            fresh[starts[-1] :] = 0
            t.copy_(fresh)
        is_new = torch.cat([source < 0 for source in sources])
        del fresh, sources
        self._set_positions(index)
        self.settled_starts.copy_(_starts([where for _, where in settled]))
        self.settled_values = torch.cat([values for values, _ in settled])
        self.settled_index = torch.cat([where for _, where in settled])
        return is_new.nonzero().view(-1)

    @torch.no_grad()
    def pack(self) -> dict[str, Tensor]:
        """Return what a finished run stores.

        ``values`` and ``starts`` are as in the bank, settled entries included; ``gaps`` codes the distances
        between positions when all sites are laid end to end.
        """
        values, index, flat = list[Tensor](), list[Tensor](), list[Tensor]()
        offset = 0
        for i, size in enumerate(self.sizes):
            site_values, where = self.all(i)
            order = where.argsort()
            values.append(site_values[order])
            index.append(where[order])
            flat.append(index[-1].long().cpu() + offset)
            offset += size
        return {
            "values": torch.cat(values),
            "starts": _starts(index),
            "gaps": encode_sorted(torch.cat(flat)),
        }

    def stored_shapes(self) -> Shapes | None:
        return self.packed_shapes(len(self.values))

    def packed_shapes(self, count: int, neighbours: int = 1) -> Shapes:
        """Return dtypes and shapes of what ``pack`` returns for ``count`` entries.

        The entries are assumed to lie in random runs of ``neighbours`` adjacent positions.
        """
        return {
            "values": (torch.float32, (count,)),
            "starts": (torch.int64, (len(self.sizes) + 1,)),
            "gaps": (torch.uint8, (expected_bytes(count, sum(self.sizes), neighbours),)),
        }

    @torch.no_grad()
    def unpack(self, stored: dict[str, Tensor]) -> None:
        """Load what ``pack`` returned. Raises ``ConfigError`` if it does not fit these sites."""
        starts, values, sizes = stored["starts"], stored["values"], torch.tensor(self.sizes)
        starts_fit = (starts.dtype, starts.shape) == (torch.int64, (len(sizes) + 1,))
        if not starts_fit or values.dim() != 1 or not values.is_floating_point():
            raise ConfigError("the stored sparse change is malformed, or does not fit this model's layers.")
        counts, flat = starts.diff(), decode_sorted(stored["gaps"], len(values))
        if int(starts[0]) or (counts < 0).any() or int(counts.sum()) != len(flat) or (flat.diff() <= 0).any():
            raise ConfigError("the stored sparse change does not fit this model's layers.")
        index = flat - (sizes.cumsum(0) - sizes).repeat_interleave(counts)
        if ((index < 0) | (index >= sizes.repeat_interleave(counts))).any():
            raise ConfigError("the stored sparse change does not fit this model's layers.")
        if not self._are_live(index.split(counts.tolist())):
            raise ConfigError("the stored sparse change has entries that are pruned in this model.")
        self.values = nn.Parameter(stored["values"].to(self.values))
        self.starts, self.index = stored["starts"].to(self.starts), index.to(self.index)
        self.settled_values, self.settled_index = self.settled_values[:0], self.settled_index[:0]
        self.settled_starts = torch.zeros_like(self.settled_starts)
        self.revision += 1


def _starts(index: list[Tensor]) -> Tensor:
    """Return where each of the concatenated tensors starts, and the total; [count + 1] int64."""
    return torch.tensor([0, *(len(where) for where in index)]).cumsum(0)


def _find(wanted: Tensor, among: Tensor) -> Tensor:
    """Return the place of each element of ``wanted`` in ``among`` (ascending), int64; -1 if it is absent."""
    if not len(among):
        return torch.full((len(wanted),), -1, dtype=torch.int64, device=wanted.device)
    at = torch.searchsorted(among, wanted.to(among)).clamp(max=len(among) - 1)
    return torch.where(among[at] == wanted, at, -1)


def _moved(t: Tensor, source: Tensor, start: int, fresh: Tensor) -> Tensor:
    """Return the elements of ``t`` at ``start + source``; those of ``fresh`` where ``source`` is -1."""
    return torch.where(source >= 0, t[torch.where(source >= 0, source + start, 0)], fresh)


def _all_but(count: int, left_out: Tensor) -> Tensor:
    """Return a mask [count] bool that is False at the places ``left_out``."""
    mask = torch.ones(count, dtype=torch.bool, device=left_out.device)
    return mask.index_fill_(0, left_out, False)


@dataclass(frozen=True, eq=False)
class SiteEntries(Unit):
    """The trained entries of one site of a bank."""

    bank: Bank
    i: int

    @property
    def span(self) -> slice:
        bounds = self.bank.bounds()
        return slice(bounds[self.i], bounds[self.i + 1])

    def set_frozen(self, frozen: bool) -> None:
        self.bank.frozen[self.i] = frozen


class SparseDelta(Delta):
    """One site's view of a bank.

    The entries are written into the base weight for the duration of a product, and restored to the bit after
    it.
    """

    restores = True

    @property
    def keeps_zeros(self) -> bool:
        return self.bank.chooses_live

    def __init__(self, bank: Bank, i: int, site: Site) -> None:
        super().__init__()
        self._bank = [bank]  # in a list: the method's state registers the bank, and only once
        self.i, self.site = i, site
        self._layouts_key = (0, -1)
        self._overwritten: tuple[Tensor, Tensor] | None = None  # positions, original entries

    @property
    def bank(self) -> Bank:
        return self._bank[0]

    def describe(self) -> str:
        return "single entries"

    def changes(self) -> Changes:
        values, where = self.bank.all(self.i)
        order = where.argsort()
        return Changes(entries=SparseChange(where[order].long(), values.detach()[order].float()))

    def units(self) -> list[Unit]:
        name = self.site.name
        return [SiteEntries(f"entries of {name}", name, self.bank.values, self.bank, self.i)]

    def forward(self, weight: Tensor) -> Tensor:
        values, where = self.bank.all(self.i)
        dense = torch.zeros(self.site.shape, dtype=values.dtype, device=values.device)
        return dense.view(-1).index_put((where.long(),), values).view(self.site.shape)

    @property
    def has_effect(self) -> bool:
        if self.bank.watch is not None:
            return True
        return len(self.bank.positions(self.i)) + len(self.bank.settled(self.i)[0]) > 0

    def inputs(self) -> tuple[Tensor, ...]:
        return (self.bank.slice(self.i),)

    def _find_layouts(self) -> tuple[Layout, Layout]:
        """Return the layouts of the trained entries and of all that differ, made once a revision."""
        key = (id(self.bank.index), self.bank.revision)
        if key != self._layouts_key:
            where, settled = self.bank.positions(self.i), self.bank.settled(self.i)[1]
            trained = everything = make_layout(where, self.site.shape)
            if len(settled):
                everything = make_layout(torch.cat([where, settled]), self.site.shape)
            self._layouts, self._layouts_key = (trained, everything), key
        return self._layouts

    def pretrained(self, weight: Tensor) -> Tensor:
        """Return the weight's own values of the trained entries, [count]."""
        return read(weight, self.bank.positions(self.i), self._find_layouts()[0])

    @torch.no_grad()
    def add_(self, weight: Tensor, original: Tensor, gate: float, cache: Cache = ()) -> Cache:
        (values, where), layout = self.bank.all(self.i), self._find_layouts()[1]
        entries = read(weight, where, layout)
        if weight.data_ptr() == original.data_ptr():
            self._overwritten = where, entries
        wide = entries.to(torch.promote_types(entries.dtype, torch.float32))
        write_(weight, where, layout, (wide + gate * values).to(entries.dtype))
        return ()

    @torch.no_grad()
    def restore_(self, weight: Tensor) -> None:
        if self._overwritten is not None:
            where, entries = self._overwritten
            write_(weight, where, self._find_layouts()[1], entries)
            self._overwritten = None

    def save_input(self, x: Tensor) -> Tensor:
        return x if self.bank.watch else used_columns(x, self._find_layouts()[0])

    def pull(
        self, grad: WeightGrad, original: Tensor, gate: float, cache: Cache
    ) -> tuple[Tensor | None, ...]:
        if (self.bank.watch and self.bank.watch(self.i, grad)) or self.bank.frozen[self.i]:
            return (None,)
        where, layout = self.bank.positions(self.i), self._find_layouts()[0]
        if grad.is_formed:
            return (gate * grad.dense.reshape(-1).index_select(0, where),)
        return (gate * entries_gradient(grad.grad_y, grad.x, where, self.site.shape, layout),)
