"""Where each sample of a webdataset tar lies: found in one pass over the tar, or read from an index.json.

Grouping follows webdataset: consecutive members whose names agree up to the first dot of the base name are one sample,
and the rest of the name, in lower case, says what the member is.
"""

import hashlib
import json
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rae.store.errors import CorruptData
from rae.store.source import REASONS, Keys
from rae.store.tars import Tar

SCHEMA = 1
_BLOCK = 512
_CHUNK = 1 << 20
_LARGEST_LABEL = 16 << 20  # a metadata JSON beyond 16 MiB is not read for one number
_UNREADABLE = -2
#: What tarfile may raise about headers that nobody sane wrote (RecursionError: thousands of nested extensions).
_DAMAGE = (tarfile.TarError, ValueError, OverflowError, EOFError, RecursionError)


@dataclass(frozen=True)
class Selection:
    """Which members of a sample are its image and its label; earlier keys win."""

    image_keys: tuple[str, ...]
    label_keys: tuple[str, ...]
    label_field: str
    classes: tuple[str, ...] | None


@dataclass(frozen=True)
class TarIndex:
    """The samples of one tar as columns: `places` int64 [N, 3] holds offset, length and label.

    Offset and length are those of the image file in the tar, -1 and 0 without one; a label is -1 without one.
    `reasons` uint8 [N] are positions in `REASONS`. `sha256` and `size` in bytes are the tar's own.
    """

    sha256: str
    size: int
    keys: Keys
    places: NDArray[np.int64]
    reasons: NDArray[np.uint8]

    def to_json(self, name: str) -> dict[str, Any]:
        entry: dict[str, Any] = {"name": name, "sha256": self.sha256, "bytes": self.size, "samples": len(self.keys)}
        entry |= {"keys": list(self.keys), "offsets": self.places.tolist()}
        bad = {str(row): REASONS[self.reasons[row]] for row in np.flatnonzero(self.reasons).tolist()}
        return entry | ({"reasons": bad} if bad else {})

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> "TarIndex":
        """Raises ValueError, KeyError or TypeError for an entry that describes no tar."""
        sha256, size, samples = entry["sha256"], entry["bytes"], entry["samples"]
        places = np.array(entry["offsets"], np.int64).reshape(-1, 3)
        keys = Keys.of(entry["keys"])
        reasons = np.zeros(len(places), np.uint8)
        for row, reason in entry.get("reasons", {}).items():
            reasons[int(row)] = REASONS.index(reason)
        offsets, lengths, labels = places.T
        absent = (offsets == -1) & (lengths == 0)
        inside = (offsets >= _BLOCK) & (lengths >= 0) & (lengths <= size - offsets)
        if not (len(keys) == len(places) == samples and (absent | inside).all() and (labels >= -1).all()):
            raise ValueError("offsets do not describe a tar of this size")
        if not re.fullmatch("[0-9a-f]{64}", sha256):
            raise ValueError("sha256 is not 64 hexadecimal digits")
        return cls(sha256, size, keys, places, reasons)


def read_index(path: Path) -> tuple[tuple[str, ...] | None, dict[str, TarIndex]]:
    """What `parse_index` finds in a file; nothing if there is none."""
    try:
        return parse_index(path.read_bytes(), str(path))
    except FileNotFoundError:
        return None, {}


def parse_index(data: bytes, where: str) -> tuple[tuple[str, ...] | None, dict[str, TarIndex]]:
    """The class names and the tars (by name) of an index.json of `rae shards`; nothing for another tool's file.

    Raises `CorruptData` if the file, which lies at `where`, is ours and can't be right.
    """

    def compact(node: dict[str, Any]) -> Any:
        # Called for every object as it is parsed, so that the lists of one tar at a time are in memory.
        return (node["name"], TarIndex.from_json(node)) if "offsets" in node and "sha256" in node else node

    try:
        document = json.loads(data, object_hook=compact)
        if not isinstance(document, dict) or document.get("schema") != SCHEMA:
            return None, {}
        classes, shards = document["classes"], dict(document["shards"])
        if not all(isinstance(index, TarIndex) for index in shards.values()):
            raise TypeError("an entry of `shards` lists no offsets")
        return tuple(map(str, classes)) if classes is not None else None, shards
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError) as error:
        raise CorruptData(f"{where} is not a readable index of shards: {error}", f"rm {where}") from error


def scan_tar(tar: Tar, selection: Selection) -> TarIndex:
    """Read a tar once, front to back: its digest, its samples, their labels.

    A tar that ends early, or whose headers turn to noise, gives the samples before that point; exactly one row, the
    sample that was cut or else one under the tar's own name, then says "truncated tar" or "damaged tar". Raises
    `CorruptData` for a file that is no tar at all.
    """
    size, opened = tar.stamp()[0], tar.open()
    stream, groups = _HashedReader(opened.blocks()), _Groups(selection, size)
    end, is_clean = 0, True
    if size >= _BLOCK:
        try:
            # As a stream, so that hashing costs no second read and no header can send us backwards.
            with tarfile.open(fileobj=stream, mode="r|", bufsize=_CHUNK) as archive:  # type: ignore[call-overload]
                end, is_clean = _walk(archive, size, groups)
        except _DAMAGE as error:
            raise CorruptData(f"{tar} is not a tar file: {error}") from error
    stream.drain()
    tail = opened.read_at(min(end, size), _BLOCK)
    broken = "" if is_clean and tail == bytes(_BLOCK) else "damaged tar" if len(tail) == _BLOCK else "truncated tar"
    return groups.finish(tar.name, stream.digest.hexdigest(), broken)


def member_suffixes(tar: Tar, limit: int = 100) -> list[str]:
    """What the first members of a tar are (`jpg`, `json`): to say in a message what was found instead."""
    stream = _HashedReader(tar.open().blocks())
    with tarfile.open(fileobj=stream, mode="r|") as archive:  # type: ignore[call-overload]
        members = islice(_regular(archive, tar.stamp()[0]), limit)
        return sorted({split[1] for split in map(_split, members) if split is not None})


def parse_number(text: bytes | str, classes: Sequence[str] | None) -> int:
    """A label written as a number, or else as one of the class names; -2 if it is neither."""
    word = (text.decode("utf-8", "replace") if isinstance(text, bytes) else text).strip()
    try:
        number = int(word)
    except ValueError:
        return classes.index(word) if classes is not None and word in classes else _UNREADABLE
    return number if -1 <= number < 1 << 63 else _UNREADABLE


class _HashedReader:
    """Blocks read once, front to back, and hashed on the way."""

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self._blocks, self._rest = blocks, b""
        self.digest = hashlib.sha256()

    def read(self, size: int) -> bytes:
        while len(self._rest) < size and (block := next(self._blocks, None)) is not None:
            self.digest.update(block)
            self._rest += block
        data, self._rest = self._rest[:size], self._rest[size:]
        return data

    def drain(self) -> None:
        """See the rest."""
        for block in self._blocks:
            self.digest.update(block)


def _split(member: tarfile.TarInfo) -> tuple[str, str] | None:
    """(key, suffix) of a member, as webdataset splits its name; None for a name without a suffix, or metadata."""
    match = re.match(r"^((?:.*/|)[^./]+)\.([^/]*)$", member.name, re.DOTALL)
    if match is None or re.match(r"__[^/]*__($|/)", member.name):
        return None
    # Bytes that are no UTF-8 arrive as surrogates, which neither JSON nor parquet can hold.
    key = os.fsencode(match[1]).decode("utf-8", "backslashreplace")
    return key, match[2].lower()


def _regular(archive: tarfile.TarFile, size: int) -> Iterator[tarfile.TarInfo]:
    """The files in a tar of `size` bytes. `_DAMAGE` for headers that make no sense."""
    # Beyond the end there is nothing to find, and tarfile would take hours to skip what a broken header announces.
    while archive.offset <= size and (member := archive.next()) is not None:
        if member.size < 0:
            raise tarfile.ReadError("negative size")
        archive.members = []  # type: ignore[attr-defined]  # tarfile would remember every one
        if member.isreg() and not member.issparse():
            yield member


def _walk(archive: tarfile.TarFile, size: int, groups: "_Groups") -> tuple[int, bool]:
    """Hand every member to `groups`; returns the offset at which that ended, and False if a header made no sense."""
    try:
        for member in _regular(archive, size):
            if (split := _split(member)) is not None:
                groups.add(archive, member, *split)
    except _DAMAGE:
        return archive.offset, False
    return archive.offset, True


@dataclass
class _Group:
    """The sample whose members are being read. Ranks are positions in the selection's keys; lower wins."""

    key: str
    suffixes: set[str] = field(default_factory=set)
    image_rank: int = 1 << 30
    place: tuple[int, int] = (-1, 0)
    label_rank: int = 1 << 30
    label: int = -1


class _Groups:
    """Gathers members into samples, in the order of the tar."""

    def __init__(self, selection: Selection, size: int) -> None:
        self._selection = selection
        self._size = size
        self._group: _Group | None = None
        self._seen: set[str] = set()
        self._rows: list[tuple[str, int, int, int, int]] = []  # key, offset, length, label, reason

    def add(self, archive: tarfile.TarFile, member: tarfile.TarInfo, key: str, suffix: str) -> None:
        if self._group is None or self._group.key != key or suffix in self._group.suffixes:
            self._flush()
            self._group = _Group(key)
        group = self._group
        group.suffixes.add(suffix)
        if member.offset_data + member.size > self._size:
            return  # cut off
        if suffix in self._selection.image_keys:
            rank = self._selection.image_keys.index(suffix)
            if rank < group.image_rank:
                group.image_rank, group.place = rank, (member.offset_data, member.size)
        if suffix in self._selection.label_keys:
            rank = self._selection.label_keys.index(suffix)
            if rank < group.label_rank and (label := self._label(archive, member, suffix)) is not None:
                group.label_rank, group.label = rank, label

    def _label(self, archive: tarfile.TarFile, member: tarfile.TarInfo, suffix: str) -> int | None:
        if member.size > _LARGEST_LABEL:
            return _UNREADABLE
        reader = archive.extractfile(member)
        text: Any = reader.read() if reader is not None else b""
        if suffix.rpartition(".")[2] == "json":
            try:
                text = json.loads(text).get(self._selection.label_field)
            except (ValueError, AttributeError, RecursionError):
                return _UNREADABLE
            if text is None:
                return None
            if not isinstance(text, str):
                text = str(text) if type(text) is int else ""
        return parse_number(text, self._selection.classes)

    def _flush(self, broken: str = "") -> None:
        group, self._group = self._group, None
        if group is None:
            return
        if broken:
            reason = broken
        elif group.key in self._seen:
            reason = "duplicate key"
        elif group.place[0] < 0:
            reason = "missing image"
        else:
            reason = "unreadable label" if group.label == _UNREADABLE else ""
        self._seen.add(group.key)
        self._rows.append((group.key, *group.place, max(group.label, -1), REASONS.index(reason)))

    def finish(self, name: str, sha256: str, broken: str) -> TarIndex:
        """The columns. With `broken`, one row carries it: the last sample if it is incomplete, else one more."""
        if broken:
            labelled = any(label >= 0 for *_, label, _ in self._rows)
            group = self._group
            if group is None or (group.place[0] >= 0 and (group.label >= 0 or not labelled)):
                self._flush()
                self._group = _Group(name)
        self._flush(broken)
        rows = self._rows
        return TarIndex(
            sha256=sha256,
            size=self._size,
            keys=Keys.of(row[0] for row in rows),
            places=np.array([row[1:4] for row in rows], np.int64).reshape(-1, 3),
            reasons=np.array([row[4] for row in rows], np.uint8),
        )
