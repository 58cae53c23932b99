"""Webdataset shards and image folders as one ordered set of images that is read by address.

A tar is scanned once, and never extracted. What the scan found is remembered: for tars of `rae shards` in the
index.json beside them, for others in the user's cache (see `index_cache`). Either is used only while it fits the file's
size (and, for the cache, its modification time), and neither is believed blindly: every read takes the image's tar
header along and compares checksum, name and length with the index, and `Source.verify` hashes a whole shard again.
"""

import glob
import hashlib
import os
import tarfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from braceexpand import braceexpand

from rae.store import index_cache
from rae.store.classes import read_classes
from rae.store.errors import ConfigError, CorruptData, MissingInput
from rae.store.image_folder import open_image_folder
from rae.store.source import Keys, Source, SourceShard, check_labels
from rae.store.tar_index import Selection, TarIndex, member_suffixes, read_index, scan_tar

__all__ = ["Keys", "Source", "SourceShard", "check_labels", "expand_files", "is_shards", "open_source"]

_BLOCK = 512
_OPEN_FILES = 128
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


def is_shards(spec: str | Path) -> bool:
    """Whether `spec` names webdataset tars (one, a brace range, a pattern, a folder), which need no conversion."""
    text = str(spec)
    if Path(text).is_dir():
        return any(entry.suffix == ".tar" for entry in Path(text).iterdir())
    return text.endswith((".tar", *_COMPRESSED))


def open_source(
    spec: str | Path,
    *,
    image_key: str = "jpg;jpeg;png;webp",
    label_key: str = "cls;json",
    label_field: str = "label",
    classes: Sequence[str] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Source:
    """Open the images that `spec` names: `data/train-{0000..0099}.tar`, `data/*.tar`, one tar, a folder.

    A folder holds tars of one set (tars of `rae shards` for training and validation are told apart as `DIR/train-*.tar`
    and `DIR/val-*.tar`), or images, or class folders with images. `image_key` and `label_key` list the suffixes to look
    for in foreign tars, the earlier first; in a JSON, `label_field` is a number or a class name. Tars of `rae shards`
    hold one image and one label each, whatever their suffixes. `classes` are the class names in the order of their
    numbers; without them, those of index.json or classes.json beside the tars, or the folder's own, are taken.
    `progress(done, total)` counts tars, or images in a folder.

    Raises `MissingInput` for missing files and for an empty set, `ConfigError` for a spec or labels that can't be
    meant, `CorruptData` for a file that is no tar.
    """
    if Path(spec).is_dir() and not is_shards(spec):
        return open_image_folder(Path(spec), classes, progress)
    paths = _tars(str(spec))
    indexes, names = _index_all(paths, image_key, label_key, label_field, classes, progress)
    source = _TarSource(paths, indexes, names)
    _check_usable(source, str(spec), image_key, label_key)
    return source


class _TarSource(Source):
    """Images in tars, read from their offsets."""

    def __init__(self, paths: Sequence[Path], indexes: Sequence[TarIndex], classes: Sequence[str] | None) -> None:
        firsts = np.cumsum([0, *(len(index.keys) for index in indexes)]).tolist()
        places = np.concatenate([index.places for index in indexes])
        self._offsets = places[:, 0].copy()
        self._lengths = places[:, 1].copy()
        self._handles = lru_cache(_OPEN_FILES)(_Handle)
        super().__init__(
            shards=[
                SourceShard(path.name, path, index.sha256, len(index.keys), first)
                for path, index, first in zip(paths, indexes, firsts[:-1], strict=True)
            ],
            keys=Keys.concatenate([index.keys for index in indexes]),
            labels=places[:, 2].copy(),
            reasons=np.concatenate([index.reasons for index in indexes]),
            classes=classes,
        )

    def read(self, row: int) -> bytes:
        shard, offset, length = self.shard_of(row), int(self._offsets[row]), int(self._lengths[row])
        if offset < 0:
            raise CorruptData(f"sample `{self.keys[row]}` of {shard.path} has no image: {self.reason(row)}")
        try:
            handle = self._handles(shard.path)
        except OSError as error:
            raise MissingInput(f"{shard.path} can't be opened any more: {error.strerror}") from error
        data = os.pread(handle.descriptor, _BLOCK + length, offset - _BLOCK)
        if len(data) != _BLOCK + length or not _announces(data[:_BLOCK], self.keys[row], length):
            raise CorruptData(
                f"{shard.path} does not hold `{self.keys[row]}` at byte {offset}: the tar or its index has changed",
                f"rm {shard.path.parent / 'index.json'}",
            )
        return data[_BLOCK:]

    def verify(self, shard: SourceShard) -> None:
        with shard.path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != shard.sha256:
            raise CorruptData(f"{shard.path} has sha256 {found[:16]}..., recorded was {shard.sha256[:16]}...")

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_handles"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._handles = lru_cache(_OPEN_FILES)(_Handle)


class _Handle:
    """An open file, closed when the last thread that reads from it has let go of it."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


def _announces(header: bytes, key: str, length: int) -> bool:
    """Whether a tar header belongs to a file of sample `key` with `length` bytes."""
    try:
        member = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")  # compares the checksum
    except tarfile.TarError:
        return False
    start = f"{key}."[:99]  # what of a long name stands in the header itself
    return member.size == length and (not start.isascii() or "\\" in start or member.name.startswith(start))


def expand_files(spec: str) -> list[Path]:
    """The files that `spec` names, in order: one file, a brace range (`{0000..0099}`, `{a,b}`), a pattern, or both.

    Raises `MissingInput` that names every missing file, `ConfigError` for braces that don't match.
    """
    if Path(spec).is_file():
        return [Path(spec)]
    try:
        patterns = list(braceexpand(spec, escape=False))
    except ValueError as error:
        raise ConfigError(f"the braces of {spec} don't match") from error
    paths, missing = [], []
    for pattern in patterns:
        names = sorted(glob.glob(pattern, recursive=True)) if glob.has_magic(pattern) else [pattern]
        found = [Path(name) for name in names if os.path.isfile(name)]
        paths += found
        missing += [] if found else [pattern]
    if missing and len(patterns) == 1:
        raise MissingInput(f"{spec} names no file" if glob.has_magic(spec) else f"{spec} does not exist")
    if missing:
        listed = ", ".join(missing[:20]) + (f" and {len(missing) - 20} more" if len(missing) > 20 else "")
        raise MissingInput(f"{len(missing)} of {len(patterns)} files of {spec} are missing: {listed}")
    return paths


def _tars(spec: str) -> list[Path]:
    if spec.endswith(_COMPRESSED):
        raise ConfigError(f"{spec}: a compressed tar can't be read by address", "gunzip the tars, then name them")
    if Path(spec).is_dir():
        paths = sorted(Path(spec).glob("*.tar"))
        prefixes = sorted({path.name.rpartition("-")[0] for path in paths})
        if {"train", "val"} <= set(prefixes):
            raise ConfigError(
                f"{spec} holds several sets of shards ({', '.join(prefixes)}): name one, {spec}/train-*.tar"
            )
        return paths
    return expand_files(spec)


def _index_all(
    paths: Sequence[Path],
    image_key: str,
    label_key: str,
    label_field: str,
    classes: Sequence[str] | None,
    progress: Callable[[int, int], None],
) -> tuple[list[TarIndex], tuple[str, ...] | None]:
    """The index of every tar, and the class names that hold for all of them."""
    known: dict[Path, TarIndex] = {}
    given = tuple(classes) if classes is not None else None
    for folder in dict.fromkeys(path.parent for path in paths):
        beside, indexes = read_index(folder / "index.json")
        known |= {folder / name: index for name, index in indexes.items()}
        if given is None:
            given = beside if beside is not None else read_classes(folder / "classes.json")
        elif beside is not None and beside != given and set(beside) == set(given):
            raise ConfigError(f"`classes` has the names of {folder / 'index.json'} in another order than its labels")
    selection = Selection(tuple(image_key.lower().split(";")), tuple(label_key.lower().split(";")), label_field, given)
    indexes_in_order = []
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing releases the interpreter lock
        for done, index in enumerate(pool.map(lambda path: _index(path, known.get(path), selection), paths), start=1):
            indexes_in_order.append(index)
            progress(done, len(paths))
    return indexes_in_order, given


def _index(path: Path, known: TarIndex | None, selection: Selection) -> TarIndex:
    """The index of one tar: the known one if it fits the file, the remembered one if it does, or a new one."""
    try:
        size, modified = index_cache.stamp(path)
        if known is not None and known.size == size:
            return known
        name = f"{path.resolve()} {selection}"
        hint = index_cache.load(name)
        if isinstance(hint, dict) and hint.get("stamp") == [size, modified]:
            try:
                return TarIndex.from_json(hint["tar"])
            except (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError):
                pass  # only a hint
        index = scan_tar(path, selection)
    except OSError as error:
        raise MissingInput(f"{path} can't be read: {error.strerror}") from error
    index_cache.save(name, {"stamp": [size, modified], "tar": index.to_json(path.name)})
    return index


def _check_usable(source: Source, spec: str, image_key: str, label_key: str) -> None:
    """Refuse a set that holds nothing, or whose images or labels are all under other names."""

    def all_are(reason: str) -> bool:
        return all(source.reason(row) == reason for row in range(len(source)))

    if len(source) == 0:
        raise MissingInput(f"{spec} holds no images: {len(source.shards)} tars without a sample")
    if (source.reasons == 0).any():
        return
    if all_are("missing image"):
        found = ";".join(member_suffixes(source.shards[0].path))
        raise MissingInput(f"no sample of {spec} has an image under `image_key` {image_key}: found {found}")
    if all_are("unreadable label"):
        raise ConfigError(f"no label of {spec} under `label_key` {label_key} is a number or one of `classes`")
    raise MissingInput(f"{spec} holds no usable image: the first is {source.reason(0)}")
