"""Check at a run's end that the method acted, nothing else moved, and the requested amount was trained."""

from __future__ import annotations

from pathlib import Path

from ..core.attach import base, parts
from ..core.sparse.switch import BITS
from ..core.zeros import find_lost_zeros
from ..models.stored import fingerprint
from ..storage.progress import WatchRecord
from .prepare import Setup
from .requested import differences
from .watchdog import checksums, describe_unmoved, find_unmoved, may_rest, moving_tensors


class FrozenState:
    """Checksums of frozen parameters and buffers, taken before the first step; a run must not change them.

    ``find_changes`` compares them in the same process. If every part can be switched off without reading a
    file, it compares the whole base with the loaded one, not only the frozen parameters.
    """

    def __init__(self, setup: Setup) -> None:
        self.setup, self.states = setup, setup.session.states
        self.buffers = self._buffers()
        self.parameters = "" if self._is_recoverable else self._parameters()

    @property
    def _is_recoverable(self) -> bool:
        return all(part.recoverable for part in parts(self.setup.session.states))

    def _names_of_parts(self) -> set[str]:
        """Return the model's names of all tensors that parts brought or train."""
        names = set()
        for part in parts(self.setup.session.states):
            for name, _ in (*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)):
                names.add(name.replace("/", "."))
        return names

    def _parameters(self) -> str:
        return fingerprint(self.setup.session.model, self._names_of_parts())

    def _buffers(self) -> dict[str, int]:
        """Return a checksum of each of the model's own buffers, such as the statistics of a batch norm."""
        of_parts, own = self._names_of_parts(), {}
        for name, buffer in self.setup.session.model.named_buffers():
            original_name = name.replace(".base.", ".")
            if original_name not in of_parts and buffer.element_size() in BITS:
                own[original_name] = buffer
        return checksums(own)

    def find_changes(self) -> list[str]:
        """Return one sentence for each thing that changed."""
        session, found = self.setup.session, []
        now = self._buffers()
        moved = [name for name, checksum in self.buffers.items() if now.get(name) != checksum]
        if moved:
            found.append(
                f"{len(moved)} buffers of the model changed in training (first: {moved[0]}), "
                "and the stored change does not hold them"
            )
        if self._is_recoverable:
            with base(session.states):
                same = fingerprint(session.model, self.setup.base.new_parameters) == self.setup.fingerprint
        else:  # comparable only within a phase, as another phase freezes other parameters
            same = self.states is not session.states or self._parameters() == self.parameters
        if not same:
            found.append(
                "frozen weights changed during training: "
                "without its parts the model is not the pretrained one"
            )
        return found


def find_suspicions(
    record: WatchRecord,
    setup: Setup,
    frozen: FrozenState,
    delta: Path | None = None,
    best_step: int | None = None,
) -> list[str]:
    """Return the reasons not to trust the run after its last step; empty if nothing is wrong.

    ``delta``: the folder of its stored change, which is the change after step ``best_step``.
    """
    session, found = setup.session, []
    if record.still and record.seen > 1:
        still = find_unmoved(record.still, session)
        some_rest = may_rest(session) and len(still) < len(moving_tensors(session.states))
        if still and not some_rest:
            found.append(describe_unmoved(still, session))
    if lost := find_lost_zeros(session.model):
        found.append(lost)
    return [*found, *frozen.find_changes(), *differences(session, delta, best_step)]
