"""Keep two processes from writing into one run: the lock file ``RUN/.lock``. Imports no torch.

The lock is an open file (``flock``), so the kernel releases it when its process ends, however that happens.
The file also records the process and the host that hold it: for messages, and for shared file systems, where
``flock`` may not reach other machines. The process that takes the lock cleans up after one that was killed.
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
TEMPORARY = re.compile(r"\.(?P<name>.+)\.(?P<pid>\d{1,10})\.(?P<ending>tmp|old)")  # see atomic.replacing
INHERITED = (
    "FINETUNE_LOCK_FD"  # environment variable: the file descriptor of a lock that the parent process holds
)
ATTEMPTS = 10
RECORD_BYTES = 1000
SHARED = (
    *("nfs", "cifs", "smb", "lustre", "gpfs", "beegfs", "ceph"),
    *("gluster", "9p", "virtiofs", "fuse", "afs", "pvfs", "orangefs"),
)  # first letters of types of file systems that several machines may share
UNSUPPORTED = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
_held: set[int] = set()


def _close_held_locks() -> None:
    """Drop the locks in a forked process, such as a data loader's worker, which may outlive the holder."""
    for handle in _held:
        os.close(handle)
    _held.clear()


os.register_at_fork(after_in_child=_close_held_locks)


def try_lock(folder: Path) -> int | None:
    """Take the lock without waiting; return an open file, or ``None`` if another process holds it.

    ``release_lock`` takes the file back. Without ``flock`` support, trust the process and the host recorded
    in the file. Raises ``OSError`` if the file cannot be made.
    """
    for attempt in range(1, ATTEMPTS + 1):
        handle = os.open(folder / NAME, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            return None
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                os.close(handle)
                raise
            record = _read_record(folder)
            if record and record["host"] == socket.gethostname() and _is_alive(record["pid"]):
                os.close(handle)
                return None
            return handle
        if _is_lock_of(handle, folder):
            return handle
        if attempt == ATTEMPTS:  # some file systems report another inode number at every call
            return handle
        os.close(handle)  # the file was removed after it was opened, so this lock would exclude no process
    return None


def sign_lock(handle: int, pid: int) -> None:
    """Record process ``pid`` of this host as the holder in a lock file that is held."""
    record = {"pid": pid, "host": socket.gethostname(), "started": time.time()}
    try:
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps(record).encode(), 0)
    except OSError:
        pass  # a full disk: the lock itself holds without the record


def release_lock(handle: int) -> None:
    """Release a lock. Its record keeps only the time at which it was taken, to tell how long a run took."""
    try:
        record = json.loads(os.pread(handle, RECORD_BYTES, 0))
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps({"started": record["started"]}).encode(), 0)
    except (OSError, ValueError, KeyError, TypeError):
        pass  # a full disk, or no record
    finally:
        os.close(handle)


def lock_holder(folder: Path) -> str:
    """Return the holder that a run folder's lock records, as ``process 12 on host``; empty if none."""
    record = _read_record(folder)
    return f"process {record['pid']} on {record['host']}" if record else ""


def refuse_if_locked(folder: Path) -> None:
    """Raise ``ConfigError`` if another process holds the lock now.

    This does not take the lock, so ``holding_lock`` may still fail later. The check saves slow work that
    would be lost.
    """
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
def holding_lock(folder: Path) -> Iterator[None]:
    """Hold the lock of ``folder``, which is made if needed.

    A lock that the parent process handed down is used as it is. Raises ``ConfigError`` if the lock cannot be
    made, or if another process holds it (the message names the holder). Raises ``FileNotFoundError`` at the
    end of the block if the folder has vanished meanwhile.
    """
    inherited = os.environ.get(INHERITED, "")
    is_ours = not (inherited.isdecimal() and _is_lock_of(int(inherited), folder))
    handle = _take(folder) if is_ours else int(inherited)
    _held.add(handle)
    try:
        for place in (folder, folder / "checkpoints"):
            recover(place)
        yield
        if not (folder / NAME).exists() and not (folder / "config.yaml").exists():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder / NAME))
    finally:
        _held.discard(handle)
        if is_ours:
            release_lock(handle)


def recover(folder: Path) -> None:
    """Restore what a killed process had moved aside, and remove its temporary files.

    The caller must hold the lock.
    """
    if not folder.is_dir():
        return
    for file in list(folder.iterdir()):
        match = TEMPORARY.fullmatch(file.name)
        if match is None:
            continue
        place, writer = file.with_name(match["name"]), int(match["pid"])
        if match["ending"] == "old" and not place.exists():
            file.replace(place)
        elif writer != os.getpid() and _is_alive(writer):
            continue
        elif file.is_dir() and not file.is_symlink():
            shutil.rmtree(file)
        else:
            file.unlink()


def _is_alive(pid: int) -> bool:
    """Tell whether a process with the number ``pid`` runs on this machine."""
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
        handle = try_lock(folder)
    except OSError as error:
        raise ConfigError(
            f"The run folder {folder} cannot be written: {error.strerror}. "
            "Run the command in a folder where you may write and where there is free space."
        ) from error
    if handle is None:
        raise ConfigError(_in_use(folder))
    record = _read_record(folder)
    if record and record["host"] != socket.gethostname() and _file_system(folder).startswith(SHARED):
        os.close(handle)
        raise ConfigError(
            f"{folder} was last used by {lock_holder(folder)}, which did not report its end, and this "
            f"machine cannot see whether it still runs. If it does not, remove {folder / NAME}; "
            "then the same command continues."
        )
    sign_lock(handle, os.getpid())
    return handle


def _in_use(folder: Path) -> str:
    user = lock_holder(folder) or "another process"
    return f"{folder} is in use by {user}. Wait for it, or end it; then the same command continues."


def _is_lock_of(handle: int, folder: Path) -> bool:
    """Return whether an open file is the lock file that lies in ``folder`` now."""
    try:
        return os.path.samestat(os.fstat(handle), (folder / NAME).lstat())
    except OSError:
        return False


def _read_record(folder: Path) -> dict[str, Any]:
    """Return ``pid`` and ``host`` of the holder that a lock file records; empty if it records none."""
    try:
        record: dict[str, Any] = safe.read_json(folder / NAME, {"pid": int, "host": str}, most=RECORD_BYTES)
        return record
    except (OSError, ValueError):
        return {}


def _file_system(folder: Path) -> str:
    """Return Linux's name for the type of the folder's file system, such as ``ext4``; empty if unknown."""
    try:
        lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    place, longest, found = f"{folder.resolve()}/", "", ""
    for line in lines:
        before, _, after = line.partition(" - ")
        mount = before.split()[4].replace("\\040", " ")
        if len(mount) >= len(longest) and place.startswith(f"{mount.rstrip('/')}/"):
            longest, found = mount, after.split()[0]
    return found
