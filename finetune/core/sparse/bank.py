"""The sparse store: K trained values and where they sit, for all sites of a method at once."""

from __future__ import annotations

from collections.abc import Callable
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
from .gradient import Layout, entries_gradient, read, used_columns, write_


class Bank(StateModule):
    """Room for ``capacity`` float32 values (the change, starting at 0) over ``sites``.

    ``index`` [capacity] int32 is the flat position of each value in its site's [out, in] weight, ascending within a site; ``starts`` [sites + 1]
    int64 says which slice belongs to which site, and what lies behind ``starts[-1]`` is slack: 0, without gradient. The room never changes, so that
    optimizers and data parallelism need not know when entries move. ``settled_*`` [any length], in the same form, are entries that are trained no
    more and keep their change. All of this is state and is saved; what ``SparseDelta`` derives from it is not.
    """

    index: Tensor
    starts: Tensor
    settled_values: Tensor
    settled_index: Tensor
    settled_starts: Tensor

    def __init__(self, sites: list[Site], capacity: int) -> None:
        super().__init__()
        if max(s.size for s in sites) >= 2**31:
            raise ValueError("a site of 2**31 entries or more needs 64-bit indices")
        self.sizes = [s.size for s in sites]
        self.shapes = [s.shape for s in sites]
        self.ages = False  # whether the optimizer counts the steps of each value by itself; set by the method that builds this
        self.values = nn.Parameter(torch.zeros(capacity))
        self.register_buffer("index", torch.zeros(capacity, dtype=torch.int32))
        self.register_buffer("starts", torch.zeros(len(sites) + 1, dtype=torch.int64))
        self.register_buffer("settled_values", torch.zeros(0))
        self.register_buffer("settled_index", torch.zeros(0, dtype=torch.int32))
        self.register_buffer("settled_starts", torch.zeros(len(sites) + 1, dtype=torch.int64))
        self.frozen = [False] * len(sites)  # sites that rest during this step; set by selectors before it
        self.watch: Callable[[int, WeightGrad], bool] | None = (
            None  # sees every site's whole gradient; True: nobody else needs it
        )
        self.revision = 0  # how often indices moved in this process: what is derived from them is made again
        self._bounds: dict[str, tuple[tuple[int, int], list[int]]] = {}
        self._slices: tuple[Tensor, ...] = ()
        self._slices_of = (0, -1, -1)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the cached slices out of copies: they are part of a graph, which torch does not copy."""
        return self.__dict__ | {"_slices": (), "_slices_of": (0, -1, -1)}

    @property
    def entry_store(self) -> EntryStore:
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """The settled entries may be any number."""
        for name in ("settled_values", "settled_index"):
            if prefix + name in state_dict:
                setattr(self, name, getattr(self, name).new_empty(state_dict[prefix + name].shape))
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.revision += 1
        if not (
            self._whole(self.starts, self.index) and self._whole(self.settled_starts, self.settled_index)
        ):
            args[-1].append(
                f"{prefix}index has positions outside the layers"
            )  # what is to be raised: products would read anywhere

    def _whole(self, starts: Tensor, index: Tensor) -> bool:
        """Whether the slices lie within ``index``, and its positions within their sites."""
        counts, sizes = starts.diff(), torch.tensor(self.sizes, device=starts.device)
        if int(starts[0]) or (counts < 0).any() or int(starts[-1]) > len(index):
            return False
        used = index[: int(starts[-1])]
        return not ((used < 0) | (used >= sizes.repeat_interleave(counts))).any()

    def bounds(self, of: str = "starts") -> list[int]:
        """``starts`` (or ``settled_starts``) as numbers, read from the device once."""
        starts = getattr(self, of)
        now = (self.revision, starts._version)
        if self._bounds.get(of, (None,))[0] != now:
            self._bounds[of] = (now, starts.tolist())
        return self._bounds[of][1]

    @property
    def active(self) -> int:
        """Entries that are trained now."""
        return self.bounds()[-1]

    def slice(self, i: int) -> Tensor:
        """The values of site ``i``. One split serves a whole forward pass, so that backward joins the gradients once instead of padding each to K."""
        bounds = self.bounds()
        if not torch.is_grad_enabled():
            return self.values.detach()[bounds[i] : bounds[i + 1]]
        now = (id(self.values), self.values._version, self.revision)
        if now != self._slices_of:
            counts = [b - a for a, b in zip(bounds, [*bounds[1:], len(self.values)], strict=True)]
            self._slices, self._slices_of = torch.split(self.values, counts), now
        return self._slices[i].detach() if self.frozen[i] else self._slices[i]

    def where(self, i: int) -> Tensor:
        """The flat positions of site ``i``'s values, int32, ascending."""
        bounds = self.bounds()
        return self.index[bounds[i] : bounds[i + 1]]

    def settled(self, i: int) -> tuple[Tensor, Tensor]:
        """The values and flat positions of site ``i``'s settled entries."""
        a, b = self.bounds("settled_starts")[i : i + 2]
        return self.settled_values[a:b], self.settled_index[a:b]

    def all(self, i: int) -> tuple[Tensor, Tensor]:
        """Values and positions of everything that differs from the base at site ``i``: the trained ones first, then the settled."""
        values, where = self.settled(i)
        return (
            (torch.cat([self.slice(i), values]), torch.cat([self.where(i), where]))
            if len(values)
            else (self.slice(i), self.where(i))
        )

    @torch.no_grad()
    def place(self, index: list[Tensor]) -> None:
        """Train the entries at these flat positions of each site (distinct, ascending), from 0. Raises ``ValueError`` above the capacity."""
        self._move(index)
        self.values.zero_()

    def _move(self, index: list[Tensor]) -> None:
        """Write down which entries are trained."""
        self._fits(index)
        for where, a in zip(index, _starts(index).tolist(), strict=False):
            self.index[a : a + len(where)] = where
        self.starts.copy_(_starts(index))
        self.index[int(self.starts[-1]) :] = 0
        self.revision += 1

    def _fits(self, index: list[Tensor]) -> None:
        if sum(map(len, index)) > len(self.values):
            raise ValueError(f"{sum(map(len, index))} entries do not fit into a bank of {len(self.values)}")

    @torch.no_grad()
    def revise(
        self,
        index: list[Tensor],
        moments: dict[str, Tensor],
        dropped: str,
        seeds: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """Train these entries of each site instead, in place. Survivors keep value and moments to the bit, wherever their slots move.

        ``moments``: the optimizer's tensors of shape [capacity], moved along; newcomers get ``seeds[name]`` [capacity], or 0. ``dropped``: entries
        that are trained no more go back to the pretrained weight (``base``), or settle where they are (``kept``); a settled one that returns starts
        from there. Returns the slots of the newcomers [any] int64.
        """
        self._fits(index)
        before, starts = self.bounds(), _starts(index).tolist()
        sources: list[Tensor] = []  # of all sites at once they are held, hence int32
        settled: list[tuple[Tensor, Tensor]] = []
        fresh = torch.zeros_like(self.values)  # what newcomers begin with
        for i, new in enumerate(index):
            old, (values, still) = self.where(i), self.settled(i)
            source, back = _places(new, old), _places(new, still)
            left = torch.ones(len(old), dtype=torch.bool, device=old.device).index_fill_(
                0, source[source >= 0], False
            )
            fresh[starts[i] + (back >= 0).nonzero().view(-1)] = values[back[back >= 0]]
            stays = torch.ones(len(still), dtype=torch.bool, device=old.device).index_fill_(
                0, back[back >= 0], False
            )
            keep = left if dropped == "kept" else torch.zeros_like(left)
            where, order = torch.cat([still[stays], old[keep]]).sort()
            settled.append((torch.cat([values[stays], self.slice(i)[keep]])[order], where))
            sources.append(source.to(torch.int32))
        self.revision += 1  # from here on it cannot be done again, should memory run out
        for name, t in {"": self.values.data, **moments}.items():
            if name:
                del fresh  # before the next is made
                fresh = torch.zeros_like(t).copy_((seeds or {}).get(name, torch.zeros(())))
            for source, a, b, c in zip(sources, before, starts, starts[1:], strict=False):
                fresh[b:c] = torch.where(source >= 0, t[torch.where(source >= 0, source + a, 0)], fresh[b:c])
            fresh[starts[-1] :] = 0
            t.copy_(fresh)
        new = torch.cat([source < 0 for source in sources])
        del fresh, sources
        self._move(index)
        self.settled_starts.copy_(_starts([w for _, w in settled]))
        self.settled_values, self.settled_index = (
            torch.cat([v for v, _ in settled]),
            torch.cat([w for _, w in settled]),
        )
        return new.nonzero().view(-1)

    def pack(self) -> dict[str, Tensor]:
        """What is stored of a finished run: values, counts a site, and the coded gaps between positions in the sites laid end to end."""
        with torch.no_grad():
            entries = [
                (v[order], w[order])
                for v, w in map(self.all, range(len(self.sizes)))
                for order in [w.argsort()]
            ]
        offsets = torch.tensor([0, *self.sizes]).cumsum(0)
        flat = torch.cat([w.long().cpu() + offset for (_, w), offset in zip(entries, offsets, strict=False)])
        return {
            "values": torch.cat([v for v, _ in entries]),
            "starts": _starts([w for _, w in entries]),
            "gaps": encode_sorted(flat),
        }

    def stored_shapes(self) -> Shapes | None:
        return self.packed_shapes(len(self.values))

    def packed_shapes(self, count: int, neighbours: int = 1) -> Shapes:
        """Return dtypes and shapes of what ``pack`` gives for ``count`` entries in random runs of ``neighbours``."""
        return {
            "values": (torch.float32, (count,)),
            "starts": (torch.int64, (len(self.sizes) + 1,)),
            "gaps": (torch.uint8, (expected_bytes(count, sum(self.sizes), neighbours),)),
        }

    @torch.no_grad()
    def unpack(self, stored: dict[str, Tensor]) -> None:
        """Take over what ``pack`` gave. Raises ``ConfigError`` where it does not fit these sites."""
        starts, values, sizes = stored["starts"], stored["values"], torch.tensor(self.sizes)
        if (
            (starts.dtype, starts.shape) != (torch.int64, (len(sizes) + 1,))
            or values.dim() != 1
            or not values.is_floating_point()
        ):
            raise ConfigError(
                "the stored sparse change is not of the form of one, or does not fit this model's layers."
            )
        counts, flat = starts.diff(), decode_sorted(stored["gaps"], len(values))
        if int(starts[0]) or (counts < 0).any() or int(counts.sum()) != len(flat) or (flat.diff() <= 0).any():
            raise ConfigError("the stored sparse change does not fit this model's layers.")
        index = flat - (sizes.cumsum(0) - sizes).repeat_interleave(counts)
        if ((index < 0) | (index >= sizes.repeat_interleave(counts))).any():
            raise ConfigError("the stored sparse change does not fit this model's layers.")
        self.values = nn.Parameter(stored["values"].to(self.values))
        self.starts, self.index = stored["starts"].to(self.starts), index.to(self.index)
        self.settled_values, self.settled_index = self.settled_values[:0], self.settled_index[:0]
        self.settled_starts = torch.zeros_like(self.settled_starts)
        self.revision += 1


def _starts(index: list[Tensor]) -> Tensor:
    return torch.tensor([0, *map(len, index)]).cumsum(0)


def _places(wanted: Tensor, among: Tensor) -> Tensor:
    """Where each element of ``wanted`` is in ``among`` (ascending), int64; -1 where it is not."""
    if not len(among):
        return torch.full((len(wanted),), -1, dtype=torch.int64, device=wanted.device)
    at = torch.searchsorted(among, wanted.to(among)).clamp(max=len(among) - 1)
    return torch.where(among[at] == wanted, at, -1)


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
    """One site's view of a bank: written into the base weight for the length of a product, then restored to the bit."""

    restores = True

    def __init__(self, bank: Bank, i: int, site: Site) -> None:
        super().__init__()
        self._bank, self.i, self.site = (
            [bank],
            i,
            site,
        )  # in a list: the bank is registered once, as the method's state
        self._layouts_of = (0, -1)
        self._lent: tuple[Tensor, Tensor] | None = None  # positions and originals while the weight is changed

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
        return [
            SiteEntries(f"entries of {self.site.name}", self.site.name, self.bank.values, self.bank, self.i)
        ]

    def forward(self, weight: Tensor) -> Tensor:
        values, where = self.bank.all(self.i)
        dense = torch.zeros(self.site.shape, dtype=values.dtype, device=values.device)
        return dense.view(-1).index_put((where.long(),), values).view(self.site.shape)

    @property
    def acts(self) -> bool:
        return (
            self.bank.watch is not None
            or len(self.bank.where(self.i)) + len(self.bank.settled(self.i)[0]) > 0
        )

    def inputs(self) -> tuple[Tensor, ...]:
        return (self.bank.slice(self.i),)

    def _laid(self) -> tuple[Layout, Layout]:
        """The layouts of the trained entries and of all that differ; made again when they have moved."""
        now = (id(self.bank.index), self.bank.revision)
        if now != self._layouts_of:
            where, settled = self.bank.where(self.i), self.bank.settled(self.i)[1]
            trained = Layout.of(where, self.site.shape)
            self._layouts = (
                trained,
                Layout.of(torch.cat([where, settled]), self.site.shape) if len(settled) else trained,
            )
            self._layouts_of = now
        return self._layouts

    def pretrained(self, weight: Tensor) -> Tensor:
        """The weight's own values of the trained entries, [count]."""
        return read(weight, self.bank.where(self.i), self._laid()[0])

    @torch.no_grad()
    def add_(self, weight: Tensor, original: Tensor, gate: float, cache: Cache = ()) -> Cache:
        (values, where), layout = self.bank.all(self.i), self._laid()[1]
        entries = read(weight, where, layout)
        if weight.data_ptr() == original.data_ptr():
            self._lent = where, entries
        write_(
            weight,
            where,
            layout,
            (entries.to(torch.promote_types(entries.dtype, torch.float32)) + gate * values).to(entries.dtype),
        )
        return ()

    @torch.no_grad()
    def restore_(self, weight: Tensor) -> None:
        if self._lent is not None:  # else memory ran out before anything was written
            where, entries = self._lent
            write_(weight, where, self._laid()[1], entries)
            self._lent = None

    def save_input(self, x: Tensor) -> Tensor:
        return x if self.bank.watch else used_columns(x, self._laid()[0])

    def pull(
        self, grad: WeightGrad, original: Tensor, gate: float, cache: Cache
    ) -> tuple[Tensor | None, ...]:
        if (self.bank.watch and self.bank.watch(self.i, grad)) or self.bank.frozen[self.i]:
            return (None,)
        where = self.bank.where(self.i)
        if grad.is_formed:
            return (gate * grad.dense.reshape(-1).index_select(0, where),)
        return (gate * entries_gradient(grad.grad_y, grad.x, where, self.site.shape, self._laid()[0]),)
