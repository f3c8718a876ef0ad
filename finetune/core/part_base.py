"""The base of everything that a method attaches to a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

from .changes import Changes, Unit
from .state import StateModule

Source = Callable[[], Iterator[tuple[str, Tensor]]]  # reads the model's original parameters again, by name


class Part(StateModule):
    """Anything that a method attaches to the model.

    ``gate`` scales its effect. At 0 the part is absent and the model computes what the pretrained one
    computes, to the bit. The attributes and methods below declare what other code needs to know of a part.
    """

    gate: float = 1.0
    gate_is_switch: bool = False  # whether the gate can only be 0 or 1
    decays: bool = True  # whether weight decay may pull its matrices towards zero
    folds_itself: bool = False  # whether ``fold`` writes into the model's weights, in their dtype

    def describe(self) -> str:
        """Return a noun phrase for messages."""
        return f"a change of type {type(self).__name__}"

    def adapted(self) -> int:
        """Count the model's entries that this part can change. Deltas return 0: their layers are counted."""
        return 0

    def count_held(self) -> int:
        """Count the trained values that are held at 0."""
        return 0

    def count_changed(self) -> int | None:
        """Count the adapted entries that differ from the pretrained ones in the model's dtype.

        None if the part cannot tell. Deltas return 0: their layers count them.
        """
        return 0

    @property
    def mergeable(self) -> bool:
        """Tell whether ``merge`` can make the change permanent."""
        return True

    @property
    def keeps_zeros(self) -> bool:
        """Tell whether no entry of a weight that is held at 0 (``zeros.py``) ever differs from 0."""
        return False

    @property
    def recoverable(self) -> bool:
        """Tell whether gate 0 gives the pretrained model back without reading a file."""
        return True

    def changes(self) -> Changes:
        """Return the trained change in the simplest form that it has, without the gate."""
        return Changes()

    def units(self) -> list[Unit]:
        """Return the groups of values that are trained now, each with its place in the model."""
        return [Unit(name, None, p) for name, p in self.named_parameters() if p.requires_grad]

    def use_source(self, source: Source | None) -> None:
        """Receive the function that reads the original parameters again. Most parts have no use for it."""

    def detach(self) -> None:
        """Leave the model as it was before this part. Deltas do nothing: ``unpatch`` removes their layers."""

    def folded_parameters(self) -> list[str]:
        """List the names of the parameters that ``fold`` writes to. Only what folds itself has any."""
        return []

    def fold(self) -> None:
        """Make the change permanent. Deltas do nothing: ``merge`` writes their layers' weights."""
