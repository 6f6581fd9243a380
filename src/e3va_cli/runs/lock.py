"""A lock by which one process at a time writes to a run folder; the system releases it when the process ends."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from pathlib import Path

from e3va_cli.errors import UserError
from e3va_cli.runs.folder import LOCK
from e3va_cli.utils.files import UnwritableError
from e3va_cli.utils.output import log

HELD = (errno.EACCES, errno.EAGAIN)
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # the file system has no locks

_held: dict[tuple[int, int], int] = {}  # descriptors by device and inode


def lock_folder(folder: Path) -> None:
    """Lock a run folder until this process ends; do nothing if this process has locked it already.

    The lock is of `fcntl`, not `flock`: loader processes do not inherit it, so that a killed run can be resumed while
    they are still exiting. The lock file stays, with the host and the process that locked it last.

    Raises:
        UserError: another process has locked the folder, or it cannot be written.
    """
    path = folder / LOCK
    try:
        if path.exists() and _identity(path) in _held:
            return  # opening and closing the file again would release the lock
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror}") from None
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.pread(descriptor, 1000, 0).decode(errors="replace").strip() or "another process"
        os.close(descriptor)
        if error.errno in HELD:
            raise UserError(f"{folder}: {holder} is writing to this run; wait until it ends, or stop it") from None
        if error.errno not in NO_LOCKS:
            raise
        log.info(f"{folder}: no locks on this file system; do not resume a run twice at the same time")
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
