"""One writer for each run folder: a lock that ends with its process, however that ends."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import sys
from pathlib import Path

from e3va_cli.errors import UserError
from e3va_cli.runs.folder import LOCK
from e3va_cli.utils.files import UnwritableError

HELD_ELSEWHERE = (errno.EACCES, errno.EAGAIN)
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # a file system or its server has none

_held: dict[tuple[int, int], int] = {}  # device and inode of each lock file of this process, and its descriptor


def lock_folder(folder: Path) -> None:
    """Make this process the only one that writes to a run folder, until it ends; again for the same folder is nothing.

    The lock is `fcntl`'s of a record, not `flock`'s: loader processes do not inherit it, so that a killed run can be
    resumed while they still end. The file stays, with the host and the process that held it last.

    Raises:
        UserError: another process writes there, or nobody can.
    """
    path = folder / LOCK
    try:
        if path.exists() and _identity(path) in _held:
            return  # to open and close the file once more would release the lock
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror}") from None
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.pread(descriptor, 1000, 0).decode(errors="replace").strip() or "another process"
        os.close(descriptor)
        if error.errno in HELD_ELSEWHERE:
            raise UserError(f"{folder}: {holder} is writing to this run; wait for it to end, or stop it") from None
        if error.errno not in NO_LOCKS:
            raise
        print(f"e3va: note: {folder}: no locks on this file system; never resume a run twice at once", file=sys.stderr)
        return
    _held[_identity(path)] = descriptor
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    except OSError as error:
        raise UnwritableError(path, error) from None


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino
