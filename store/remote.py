"""Where artifacts lie: a local folder, or a bucket of S3, GCS or Azure (`rae.store.bucket`), behind one interface.

An object appears whole or not at all, and `create` lets the first of several writers win. On S3 and its like that is
`If-None-Match: *`; in a local folder it is `link(2)`, after a flush to the disk (`rae.store.publish`), which no library
does. Credentials come from the environment as each provider names them (AWS_*, GOOGLE_*, AZURE_*), and stand in nothing
that is written or said.
"""

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG
from typing import Any, NamedTuple, Protocol
from urllib.parse import SplitResult, urlsplit

from rae.store.errors import ConfigError, CorruptData, StaleInput
from rae.store.publish import make_folder, publish_bytes, publish_file, replace_bytes, temporary_name
from rae.store.zarr_shard import file_sha256

BLOCK_BYTES = 1 << 24
SCHEMES = ("s3", "s3a", "gs", "az", "abfs", "abfss")


class Stored(NamedTuple):
    """An object: its key, a path with `/` below the place, its size, and when it was written, in seconds since 1970."""

    key: str
    bytes: int
    written: float


class ObjectStore(Protocol):
    """A place of objects; threads may share it, and it can be copied to other processes.

    Raises `MissingInput` where access is refused, and `PartialResult` where a place does not answer for a minute: what
    was done is kept, and the same command continues.
    """

    @property
    def place(self) -> str:
        """The folder or the URL."""

    def create(self, key: str, data: bytes) -> bool:
        """Store `data` under `key` unless something is there; returns whether this call did."""

    def replace(self, key: str, data: bytes) -> None:
        """Store `data` under `key`: a reader sees the old bytes or the new ones."""

    def read(self, key: str) -> bytes | None:
        """All of an object; None if there is none."""

    def read_ranges(self, key: str, starts: Sequence[int], sizes: Sequence[int]) -> list[Any]:
        """Bytes of an object from each of `starts`, as many as `sizes` says; neighbours are read together."""

    def stream(self, key: str) -> Iterator[bytes]:
        """An object, block by block."""

    def write(self, key: str, blocks: Iterable[bytes], size: int, sha256: str) -> None:
        """Store an object unless it is there.

        Nothing appears, and `CorruptData` is raised, if the blocks are not of this size and digest; `StaleInput` if
        another content has the key.
        """

    def below(self, prefix: str) -> Iterator[Stored]:
        """Every object below a folder."""

    def folders(self, prefix: str) -> list[str]:
        """Names of the folders directly below a folder, sorted."""

    def digest(self, key: str) -> str | None:
        """The sha256 of an object; None if there is none."""

    def written(self, key: str) -> float | None:
        """When an object was written, in seconds since 1970; None if there is none."""

    def remove(self, key: str) -> None:
        """Remove an object, or all below a folder, if it is there."""


def is_url(place: str | Path) -> bool:
    """Whether a place is a URL rather than a path."""
    return "://" in str(place)


def open_objects(place: str | Path) -> ObjectStore:
    """The folder or bucket at a path or a URL; `ConfigError` for a URL of another kind, or with credentials in it."""
    if not is_url(place):
        return LocalFolder(Path(place))
    url = check_url(str(place))
    if url.scheme == "file":
        return LocalFolder(Path(url.path))
    if url.scheme not in SCHEMES or not url.netloc:
        known = ", ".join(f"{scheme}://" for scheme in SCHEMES)
        raise ConfigError(f"{place} is no place that artifacts can lie in: known are folders and {known}")
    from rae.store.bucket import Bucket  # which costs nothing to those who use none

    return Bucket(str(place).rstrip("/"))


def check_url(text: str) -> SplitResult:
    """The parts of a URL; `ConfigError`, which does not repeat them, if there are credentials or a query in it."""
    url = urlsplit(text)
    if url.username or url.password or url.query:
        raise ConfigError(
            f"the URL {url.scheme}://{url.hostname}{url.path} carries credentials or a query; credentials come from the"
            " environment (AWS_ACCESS_KEY_ID, ...)"
        )
    return url


@dataclass(frozen=True)
class LocalFolder:
    """A folder of this machine, or of a file system that is mounted here."""

    root: Path

    @property
    def place(self) -> str:
        return str(self.root)

    def create(self, key: str, data: bytes) -> bool:
        make_folder((self.root / key).parent)
        return publish_bytes(self.root / key, data)

    def replace(self, key: str, data: bytes) -> None:
        make_folder((self.root / key).parent)
        replace_bytes(self.root / key, data)

    def read(self, key: str) -> bytes | None:
        try:
            return (self.root / key).read_bytes()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None

    def read_ranges(self, key: str, starts: Sequence[int], sizes: Sequence[int]) -> list[Any]:
        with open(self.root / key, "rb", buffering=0) as file:
            return [os.pread(file.fileno(), size, start) for start, size in zip(starts, sizes, strict=True)]

    def stream(self, key: str) -> Iterator[bytes]:
        with open(self.root / key, "rb", buffering=0) as file:
            while block := file.read(BLOCK_BYTES):
                yield block

    def write(self, key: str, blocks: Iterable[bytes], size: int, sha256: str) -> None:
        path = self.root / key
        make_folder(path.parent)
        temporary = temporary_name(path)
        try:
            with open(temporary, "xb") as file:
                for block in checked(blocks, size, sha256, str(path)):
                    file.write(block)
                file.flush()
                os.fsync(file.fileno())
            created = publish_file(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        if not created:
            check_same(self, key, sha256)

    def below(self, prefix: str) -> Iterator[Stored]:
        for folder, _, names in os.walk(self.root / prefix):
            for name in sorted(names):
                path = Path(folder, name)
                with contextlib.suppress(FileNotFoundError):  # removed just now
                    stat = path.stat()
                    if not name.endswith(".partial") and S_ISREG(stat.st_mode):
                        yield Stored(path.relative_to(self.root).as_posix(), stat.st_size, stat.st_mtime)

    def folders(self, prefix: str) -> list[str]:
        try:
            entries = list(os.scandir(self.root / prefix))
            return sorted(one.name for one in entries if one.is_dir() and not one.name.endswith(".partial"))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def digest(self, key: str) -> str | None:
        path = self.root / key
        return file_sha256(path) if path.is_file() else None

    def written(self, key: str) -> float | None:
        try:
            return (self.root / key).lstat().st_mtime
        except (FileNotFoundError, NotADirectoryError):
            return None

    def remove(self, key: str) -> None:
        path = self.root / key
        # Its name goes first: whoever begins the same work now begins it anew.
        aside = path if path.name.endswith(".partial") else temporary_name(path)
        with contextlib.suppress(FileNotFoundError):  # somebody else was faster
            if aside != path:
                path.rename(aside)
            if aside.is_dir() and not aside.is_symlink():
                shutil.rmtree(aside)
            else:
                aside.unlink()


def checked(blocks: Iterable[bytes], size: int, sha256: str, what: str) -> Iterator[bytes]:
    """The blocks, and in the end `CorruptData` unless they had this size and digest: nothing is to be kept of them."""
    digest, passed = hashlib.sha256(), 0
    for block in blocks:
        digest.update(block)
        passed += len(block)
        yield block
    if passed != size:
        raise CorruptData(f"{what} has {passed} bytes, and {size} were announced")
    if digest.hexdigest() != sha256:
        raise CorruptData(f"{what} does not match its digest")


def check_same(objects: ObjectStore, key: str, sha256: str) -> None:
    """`StaleInput` unless the object under `key` has this digest."""
    if objects.digest(key) != sha256:
        raise StaleInput(
            f"{objects.place}/{key} is there already with another content: the first content under an id stays"
        )
