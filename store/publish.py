"""Create-if-absent and replace, durable, on a local or network file system.

Publication rests on `link(2)`, which fails when the name exists, never on a lock: flock lies on Lustre, GPFS and some
NFS servers. Every file is flushed to the disk before its name appears.
"""

import ctypes
import errno
import os
import secrets
from pathlib import Path

from rae.store.errors import RaeError

_RENAME_NOREPLACE = 1
_AT_FDCWD = -100
# What file systems without hard links answer, and what a C library or file system without renameat2's flag does.
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
_NO_NOREPLACE = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}


def temporary_name(path: Path) -> Path:
    """A name beside `path` that no other writer takes and no reader looks at."""
    return path.with_name(f".{path.name}.{secrets.token_hex(6)}.partial")


def fsync_folder(folder: Path) -> None:
    """Make the names in `folder` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(folder: Path) -> None:
    """Create a folder and its parents, durably."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        fsync_folder(folder.parent)


def write_durably(path: Path, data: bytes) -> None:
    """Write a new file and flush it to the disk; `path` must be a temporary name."""
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def publish_file(temporary: Path, path: Path) -> bool:
    """Give the finished file `temporary` the name `path` unless that name is taken.

    Returns whether this call created `path`; the temporary name is gone either way.
    """
    try:
        created = _link(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_folder(path.parent)
    return created


def _link(temporary: Path, path: Path) -> bool:
    try:
        os.link(temporary, path)
    except FileExistsError:
        # A link retried over NFS reports its own success as a failure: the inode tells whose file it is.
        return os.path.samestat(os.stat(temporary), os.stat(path))
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        return _rename_without_replacing(temporary, path)
    return True


def _rename_without_replacing(temporary: Path, path: Path) -> bool:
    """For file systems without hard links (exFAT, some FUSE mounts)."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    names = (_AT_FDCWD, os.fsencode(temporary), _AT_FDCWD, os.fsencode(path))
    if renameat2 is not None and renameat2(*names, _RENAME_NOREPLACE) == 0:
        return True
    code = ctypes.get_errno() if renameat2 is not None else errno.ENOSYS
    if code == errno.EEXIST:
        return False
    if code in _NO_NOREPLACE:
        raise RaeError(f"{path.parent} offers neither hard links nor renameat2: nothing can be published safely there")
    raise OSError(code, os.strerror(code), str(path))


def publish_bytes(path: Path, data: bytes) -> bool:
    """Create `path` with `data` unless it exists; returns whether this call created it."""
    temporary = temporary_name(path)
    try:
        write_durably(temporary, data)
        return publish_file(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def replace_bytes(path: Path, data: bytes) -> None:
    """Write `path` anew, atomically: a reader sees the old bytes or the new ones."""
    temporary = temporary_name(path)
    try:
        write_durably(temporary, data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_folder(path.parent)
