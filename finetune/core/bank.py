"""The sparse store: K trained values and where they sit, for all sites of a method at once."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from .coding import decode_sorted, encode_sorted
from .part import Kept, Restorable, WeightGrad
from .site import Site


class Bank(nn.Module):
    """K float32 values (the change, starting at 0) over ``sites``.

    ``index`` [K] int32 is the flat position of each value in its site's [out, in] weight, ascending within a site; ``starts`` [sites + 1] int64 says
    which slice of the K belongs to which site. Both are state and are saved; views and originals derive from them.
    """

    index: Tensor
    starts: Tensor

    def __init__(self, sites: list[Site], counts: list[int]) -> None:
        super().__init__()
        if max(s.size for s in sites) >= 2**31:
            raise ValueError("a site of 2**31 entries or more needs 64-bit indices")
        self.values = nn.Parameter(torch.zeros(sum(counts)))
        self.register_buffer("index", torch.cat([torch.arange(c, dtype=torch.int32) for c in counts]))
        self.register_buffer("starts", torch.tensor([0, *counts]).cumsum(0))
        self.sizes = [s.size for s in sites]
        self._slices: tuple[Tensor, ...] = ()  # derived, like ``_bounds``: made again when what they derive from has changed
        self._bounds: list[int] = []
        self._slices_of = self._bounds_of = (0, -1)

    @property
    def bounds(self) -> list[int]:
        """``starts`` as numbers, read from the device once."""
        now = (id(self.starts), self.starts._version)
        if now != self._bounds_of:
            self._bounds, self._bounds_of = self.starts.tolist(), now
        return self._bounds

    def slice(self, i: int) -> Tensor:
        """The values of site ``i``. One split serves a whole forward pass, so that backward joins the gradients once instead of padding each to K."""
        if not torch.is_grad_enabled():
            return self.values.detach()[self.bounds[i] : self.bounds[i + 1]]
        now = (id(self.values), self.values._version)
        if now != self._slices_of:
            self._slices, self._slices_of = torch.split(self.values, self.starts.diff().tolist()), now
        return self._slices[i]

    def where(self, i: int) -> Tensor:
        """The flat positions of site ``i``'s values, int32."""
        return self.index[self.bounds[i] : self.bounds[i + 1]]

    def pack(self) -> dict[str, Tensor]:
        """What is stored of a finished run: values, counts a site, and the coded gaps between positions in the sites laid end to end."""
        offsets = torch.tensor([0, *self.sizes]).cumsum(0)[:-1]
        flat = self.index.long().cpu() + offsets.repeat_interleave(self.starts.diff().cpu())
        return {"values": self.values.detach(), "starts": self.starts, "gaps": encode_sorted(flat)}

    @torch.no_grad()
    def unpack(self, stored: dict[str, Tensor]) -> None:
        """Take over what ``pack`` gave. Raises ``ConfigError`` where it does not fit these sites."""
        counts = stored["starts"].diff()
        flat = decode_sorted(stored["gaps"], len(stored["values"]))
        offsets = torch.tensor([0, *self.sizes]).cumsum(0)
        if len(counts) != len(self.sizes) or int(counts.sum()) != len(flat) or (len(flat) and int(flat[-1]) >= offsets[-1]):
            raise ConfigError("the stored sparse change does not fit this model's layers.")
        self.values = nn.Parameter(stored["values"].to(self.values))
        self.starts = stored["starts"].to(self.starts)
        self.index = (flat - offsets[:-1].repeat_interleave(counts)).to(self.index)

    @torch.no_grad()
    def place(self, index: list[Tensor]) -> None:
        """Put the values of each site at these flat positions (made ascending; the counts stay those of the build)."""
        self.index.copy_(torch.cat([i.sort().values.to(torch.int32) for i in index]))


class SparseDelta(Restorable):
    """One site's view of a bank: written into the base weight for the length of a product, then restored to the bit."""

    def __init__(self, bank: Bank, i: int, site: Site) -> None:
        super().__init__()
        self._bank, self._i, self._shape = [bank], i, site.shape  # in a list: the bank is registered once, as the method's state

    def forward(self, weight: Tensor) -> Tensor:
        values = self._bank[0].slice(self._i)
        dense = torch.zeros(self._shape, dtype=values.dtype, device=values.device)
        return dense.view(-1).index_put((self._bank[0].where(self._i).long(),), values).view(self._shape)

    def inputs(self) -> tuple[Tensor, ...]:
        return (self._bank[0].slice(self._i),)

    def _positions(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """A flat view of the weight's storage and the positions in it; a transposed weight is stored as [in, out]."""
        index = self._bank[0].where(self._i).long()
        if weight.is_contiguous():
            return weight.view(-1), index
        out, in_ = self._shape
        return weight.T.view(-1), index % in_ * out + index // in_

    @torch.no_grad()
    def add_(self, weight: Tensor, original: Tensor, kept: Kept = ()) -> Kept:
        flat, index = self._positions(weight)
        entries = flat[index]
        if weight.data_ptr() == original.data_ptr():
            self._lent = entries
        change = self.gate * self._bank[0].slice(self._i)
        flat[index] = (entries.to(torch.promote_types(entries.dtype, torch.float32)) + change).to(entries.dtype)
        return ()

    @torch.no_grad()
    def restore_(self, weight: Tensor) -> None:
        flat, index = self._positions(weight)
        flat[index] = self._lent
        del self._lent

    def pull(self, grad: WeightGrad, original: Tensor, kept: Kept) -> tuple[Tensor | None, ...]:
        return (self.gate * grad.dense.view(-1)[self._bank[0].where(self._i).long()],)
