"""The interface of a pass: offline work on the weights of a stored model, one site after the other.

The driver (``finetune/artifacts/passes.py``) reads a model folder, calls ``tensor`` for each site, and writes
a new folder. A pass without ``needs`` never sees the model, only one weight at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from .site import Site
from .statistics import SiteStatistics, StatisticName
from .structure import Structured


@dataclass(frozen=True)
class Pruned:
    """A pruned weight [out, in], and which of its entries are pruned and stay 0, [out, in] bool."""

    weight: Tensor
    zeros: Tensor


def weight_of(result: Tensor | Structured | Pruned) -> Tensor | Structured:
    """Return the weight of what ``Pass.tensor`` has returned, or what replaces it."""
    return result.weight if isinstance(result, Pruned) else result


@dataclass(frozen=True)
class Pass:
    """Base of all passes. Fields are hyperparameters; class variables are facts that checks rely on.

    ``verb``: the command that runs the pass, such as ``prune``. ``needs``: the statistics that ``tensor``
    uses; with any, the command needs a data set to calibrate on. ``idempotent``: a second run over the result
    with the same settings and statistics changes nothing. ``models``: ``several`` if the pass reads further
    models of the same base beside the one that it changes; it then writes ``combine`` and not ``tensor``.
    ``makes_structures``: weights are replaced by the tensors of structures.

    Options:
        targets: Layers to change: roles (``q``), groups of roles (``attention``, ``mlp``, ``all``), or
            patterns of layer names.
    """

    KIND: ClassVar[str] = "pass"
    name: ClassVar[str]
    verb: ClassVar[str]
    needs: ClassVar[tuple[StatisticName, ...]] = ()
    idempotent: ClassVar[bool] = False
    models: ClassVar[Literal["one", "several"]] = "one"
    makes_structures: ClassVar[bool] = False

    targets: tuple[str, ...] = ("all",)

    def is_sequential(self) -> bool:
        """Tell whether a block's statistics are gathered with the blocks before it already changed."""
        return False

    def faults(self, sites: Sequence[Site]) -> list[str]:
        """Return why the settings make no sense for these sites, one sentence for each fault.

        Called before anything is written, once without any site and once with those of the model.
        """
        return []

    def tensor(
        self, site: Site, weight: Tensor, statistics: SiteStatistics | None
    ) -> Tensor | Structured | Pruned:
        """Return the new weight of a site, [out, in], or what replaces it, in the dtype of ``weight``.

        A pass that prunes returns ``Pruned``: the folder's masks then say which entries stay 0.

        ``weight`` [out, in]: as it is stored; it must not be changed. ``statistics``: what the pass
        ``needs``, or None if it needs nothing. The result must follow from the arguments alone.
        """
        raise NotImplementedError

    def count_faults(self, models: int) -> list[str]:
        """Return why the settings make no sense for that many further models."""
        return []

    def combine(self, site: Site, weight: Tensor, changes: Sequence[Tensor | None]) -> Tensor:
        """Return the new weight of a site, [out, in], float64; it is rounded once to the stored dtype.

        ``weight`` [out, in]: that of the base, float64. ``changes``: what each further model adds to it, in
        the order in which the user names them, [out, in] in float64; None where a model changes nothing.
        """
        raise NotImplementedError
