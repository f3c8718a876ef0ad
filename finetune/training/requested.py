"""Check that as many entries are trained and stored as the method's settings ask for."""

from __future__ import annotations

from pathlib import Path

from safetensors import safe_open

from .session import Session

PREFIX = "method."  # prefix of the names of the method's tensors in a stored change


def differences(session: Session, delta: Path | None = None, step: int | None = None) -> list[str]:
    """Return one sentence for each difference from the settings; none if they do not ask for exact amounts.

    ``delta``: the folder of the change stored after ``step`` (from 1, over the whole run), to be checked too.
    """
    method, state = session.current, session.states["method"]
    found = method.check_trained(session.run, state)
    start = session.phases[session.phase].start
    if delta and step and step > start:
        found += method.check_stored(session.run, state, _shapes(delta), step - start - 1)
    return found


def _shapes(delta: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the method's stored tensors, by their names in its state."""
    found = {}
    with safe_open(delta / "delta.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118  (safetensors' handle is not a mapping)
            if name.startswith(PREFIX):
                found[name.removeprefix(PREFIX)] = tuple(file.get_slice(name).get_shape())
    return found
