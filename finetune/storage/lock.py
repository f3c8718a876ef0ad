"""The lock of a run's folder, ``RUN/.lock``: no two processes write into one run. Imports no torch.

It is held by an open file (``flock``), so it ends with its process, however that ends; what stands in the file is for people, and for other machines
on a shared file system, where ``flock`` may not reach. Whoever takes it clears up after a process that was killed.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..system import safe

NAME = ".lock"
TEMPORARY = re.compile(
    r"\.(?P<name>.+)\.(?P<pid>\d{1,10})\.(?P<end>tmp|old)"
)  # what ``files.replacing`` makes
INHERITED = "FINETUNE_LOCK_FD"  # the number of the open file by which the parent of this process holds the lock of its run
SHARED = (
    "nfs",
    "cifs",
    "smb",
    "lustre",
    "gpfs",
    "beegfs",
    "ceph",
    "gluster",
    "9p",
    "virtiofs",
    "fuse",
    "afs",
    "pvfs",
    "orangefs",
)
UNSUPPORTED = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
_held: set[int] = set()


def _forget() -> None:
    """A process forked from one that holds a lock (a worker that loads data) does not hold it: it may live a little longer."""
    for handle in _held:
        os.close(handle)
    _held.clear()


os.register_at_fork(after_in_child=_forget)


def lock(folder: Path) -> int | None:
    """Take the lock: an open file, to be given to ``release``; ``None`` if another process has it. Raises ``OSError`` where none can be made.

    Where the file system knows no locks, what stands in the file has to do.
    """
    for left in reversed(range(10)):
        handle = os.open(folder / NAME, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if (
                _is(handle, folder) or not left
            ):  # there are file systems that number a file anew at every look
                return handle  # else it was removed between the two, and keeps nobody out
        except BlockingIOError:
            os.close(handle)
            return None
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                os.close(handle)
                raise
            said = _said(folder)
            if not said or said["host"] != socket.gethostname() or not _alive(said["pid"]):
                return handle
            os.close(handle)
            return None
        os.close(handle)
    return None


def sign(handle: int, pid: int) -> None:
    """Write into a held lock who has it."""
    try:
        os.ftruncate(handle, 0)
        os.pwrite(
            handle, json.dumps({"pid": pid, "host": socket.gethostname(), "started": time.time()}).encode(), 0
        )
    except OSError:
        pass  # a full disk; the lock holds all the same


def release(handle: int) -> None:
    """Give a lock back; since when it was held stays there, for whoever wants to know how long a run took."""
    try:
        said = os.pread(handle, 1000, 0)
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps({"started": json.loads(said)["started"]}).encode(), 0)
    except (OSError, ValueError, KeyError, TypeError):
        pass  # a full disk, or nobody signed
    finally:
        os.close(handle)


def holder(folder: Path) -> str:
    """Who took the lock of a run folder last and has not given it back, as ``process 12 on host``; empty if nobody is known."""
    said = _said(folder)
    return f"process {said['pid']} on {said['host']}" if said else ""


def look(folder: Path) -> None:
    """Raise ``ConfigError`` if another process holds the lock now; takes and makes nothing. ``held`` decides, and this spares the wait."""
    if os.environ.get(INHERITED):
        return
    try:
        handle = os.open(folder / NAME, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(_in_use(folder)) from None
    except OSError:
        pass
    finally:
        os.close(handle)


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold the lock of ``folder``, which is made if need be; a parent's lock, if this process was given it, is enough.

    Raises ``ConfigError`` naming a live holder, or where none can be taken; ``FileNotFoundError`` at the end if the folder is gone by then.
    """
    given = os.environ.get(INHERITED, "")
    if given.isdecimal() and _is(int(given), folder):
        handle, ours = int(given), False
    else:
        handle, ours = _take(folder), True
    _held.add(handle)
    try:
        for place in (folder, folder / "checkpoints"):
            recover(place)
        yield
        if not any(
            (folder / name).exists() for name in (NAME, "config.yaml")
        ):  # the lock alone may have been removed by hand
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder / NAME))
    finally:
        _held.discard(handle)
        if ours:
            release(handle)


def recover(folder: Path) -> None:
    """Put back what a killed process had moved away, and remove what it left half written. For whoever holds the lock."""
    found = [
        (file, match)
        for file in (folder.iterdir() if folder.is_dir() else ())
        if (match := TEMPORARY.fullmatch(file.name))
    ]
    for file, match in found:
        place, writer = file.with_name(match["name"]), int(match["pid"])
        if match["end"] == "old" and not place.exists():
            file.replace(place)
        elif writer == os.getpid() or not _alive(writer):
            shutil.rmtree(file) if file.is_dir() and not file.is_symlink() else file.unlink()


def _alive(pid: int) -> bool:
    """Whether a process of this machine has that number."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _take(folder: Path) -> int:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = lock(folder)
    except OSError as error:
        raise ConfigError(
            f"The run folder {folder} cannot be written: {error.strerror}. Start from a folder with room that you may write to."
        ) from error
    if handle is None:
        raise ConfigError(_in_use(folder))
    said = _said(folder)
    if said and said["host"] != socket.gethostname() and _kind(folder).startswith(SHARED):
        os.close(handle)
        raise ConfigError(
            f"{folder} was last used by {holder(folder)}, which did not say that it ended, and this machine cannot see whether it works. "
            f"If it does not, remove {folder / NAME}; then the same command goes on."
        )
    sign(handle, os.getpid())
    return handle


def _in_use(folder: Path) -> str:
    return f"{folder} is in use by {holder(folder) or 'another process'}. Wait for it, or end it; then the same command goes on."


def _is(handle: int, folder: Path) -> bool:
    """Whether an open file is the lock that lies in ``folder`` now."""
    try:
        return os.path.samestat(os.fstat(handle), (folder / NAME).lstat())
    except OSError:
        return False


def _said(folder: Path) -> dict[str, Any]:
    """The process and the machine that a lock names."""
    try:
        said: dict[str, Any] = safe.read_json(folder / NAME, {"pid": int, "host": str}, most=1000)
        return said
    except (OSError, ValueError):
        return {}


def _kind(folder: Path) -> str:
    """The type of the file system that ``folder`` lies on, as Linux names it; empty if unknown."""
    try:
        lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    place, found = str(folder.resolve()), ("", "")
    for line in lines:
        before, _, after = line.partition(" - ")
        mount = before.split()[4].replace("\\040", " ")
        if len(mount) >= len(found[0]) and f"{place}/".startswith(f"{mount.rstrip('/')}/"):
            found = (mount, after.split()[0])
    return found[1]
