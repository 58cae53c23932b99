"""Webdataset shards and image folders as one ordered set of images that is read by address.

Tars are files, or lie in a bucket or on a web server (`rae.store.remote_tar`). Each is scanned once, and never
extracted. What the scan found is remembered: for tars of `rae shards` in the index.json beside them, for others in the
user's cache (see `index_cache`). Either is used only while it fits the file's size (and, for the cache, its
modification time or its ETag), and neither is believed blindly: every read takes the image's tar header along and
compares checksum, name and length with the index, and `Source.verify` hashes a whole shard again.
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
from rae.store.classes import parse_classes
from rae.store.errors import ConfigError, CorruptData, MissingInput
from rae.store.image_folder import open_image_folder
from rae.store.remote import is_url
from rae.store.source import Keys, Source, SourceShard, check_labels
from rae.store.tar_index import Selection, TarIndex, member_suffixes, parse_index, scan_tar
from rae.store.tars import LocalTar, OpenTar, Tar

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
    numbers; without them, those of index.json or classes.json beside the tars, or the folder's own, are taken. Tars may
    be URLs: of S3, GCS or Azure (`s3://BUCKET/train-*.tar`), or of a web server (`https://`) that answers ranges.
    `progress(done, total)` counts tars, or images in a folder.

    Raises `MissingInput` for missing files and for an empty set, `ConfigError` for a spec or labels that can't be
    meant, `CorruptData` for a file that is no tar.
    """
    if Path(spec).is_dir() and not is_shards(spec):
        return open_image_folder(Path(spec), classes, progress)
    tars = _tars(str(spec))
    indexes, names = _index_all(tars, image_key, label_key, label_field, classes, progress)
    source = _TarSource(tars, indexes, names)
    _check_usable(source, str(spec), image_key, label_key)
    return source


class _TarSource(Source):
    """Images in tars, read from their offsets."""

    def __init__(self, tars: Sequence[Tar], indexes: Sequence[TarIndex], classes: Sequence[str] | None) -> None:
        firsts = np.cumsum([0, *(len(index.keys) for index in indexes)]).tolist()
        places = np.concatenate([index.places for index in indexes])
        self._offsets = places[:, 0].copy()
        self._lengths = places[:, 1].copy()
        self._open = lru_cache(_OPEN_FILES)(_opened)
        super().__init__(
            shards=[
                SourceShard(tar.name, _place(tar), index.sha256, len(index.keys), first)
                for tar, index, first in zip(tars, indexes, firsts[:-1], strict=True)
            ],
            keys=Keys.concatenate([index.keys for index in indexes]),
            labels=places[:, 2].copy(),
            reasons=np.concatenate([index.reasons for index in indexes]),
            classes=classes,
        )
        self.tars = dict(zip(self.shards, tars, strict=True))

    def read(self, row: int) -> bytes:
        shard, offset, length = self.shard_of(row), int(self._offsets[row]), int(self._lengths[row])
        if offset < 0:
            raise CorruptData(f"sample `{self.keys[row]}` of {shard.path} has no image: {self.reason(row)}")
        tar = self.tars[shard]
        data = self._open(tar).read_at(offset - _BLOCK, _BLOCK + length)
        if len(data) != _BLOCK + length or not _announces(data[:_BLOCK], self.keys[row], length):
            raise CorruptData(
                f"{tar} does not hold `{self.keys[row]}` at byte {offset}: the tar or its index has changed",
                f"rm {Path(tar.folder) / 'index.json'}" if isinstance(tar, LocalTar) else None,
            )
        return data[_BLOCK:]

    def verify(self, shard: SourceShard) -> None:
        digest = hashlib.sha256()
        for block in self._open(self.tars[shard]).blocks():
            digest.update(block)
        if (found := digest.hexdigest()) != shard.sha256:
            raise CorruptData(f"{shard.path} has sha256 {found[:16]}..., recorded was {shard.sha256[:16]}...")

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_open"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open = lru_cache(_OPEN_FILES)(_opened)


def _place(tar: Tar) -> Path | str:
    return tar.path if isinstance(tar, LocalTar) else str(tar)


def _opened(tar: Tar) -> OpenTar:
    try:
        return tar.open()
    except OSError as error:
        raise MissingInput(f"{tar} can't be opened any more: {error.strerror}") from error


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
    patterns = _without_braces(spec)
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


def _without_braces(spec: str) -> list[str]:
    try:
        return list(braceexpand(spec, escape=False))
    except ValueError as error:
        raise ConfigError(f"the braces of {spec} don't match") from error


def _tars(spec: str) -> list[Tar]:
    if spec.endswith(_COMPRESSED):
        raise ConfigError(f"{spec}: a compressed tar can't be read by address", "gunzip the tars, then name them")
    if is_url(spec):
        if not spec.endswith(".tar"):
            raise ConfigError(f"{spec} is a URL of something else than tars: give URL/train-{{0000..0099}}.tar")
        from rae.store.remote_tar import remote_tars  # which costs nothing to those who use none

        return list(remote_tars(_without_braces(spec)))
    if Path(spec).is_dir():
        paths = sorted(Path(spec).glob("*.tar"))
        prefixes = sorted({path.name.rpartition("-")[0] for path in paths})
        if {"train", "val"} <= set(prefixes):
            raise ConfigError(
                f"{spec} holds several sets of shards ({', '.join(prefixes)}): name one, {spec}/train-*.tar"
            )
        return [LocalTar(path) for path in paths]
    return [LocalTar(path) for path in expand_files(spec)]


def _index_all(
    tars: Sequence[Tar],
    image_key: str,
    label_key: str,
    label_field: str,
    classes: Sequence[str] | None,
    progress: Callable[[int, int], None],
) -> tuple[list[TarIndex], tuple[str, ...] | None]:
    """The index of every tar, and the class names that hold for all of them."""
    known: dict[tuple[str, str], TarIndex] = {}
    given = tuple(classes) if classes is not None else None
    for folder, tar in {tar.folder: tar for tar in tars}.items():
        where, data = f"{folder}/index.json", tar.beside("index.json")
        beside, indexes = parse_index(data, where) if data is not None else (None, {})
        known |= {(folder, name): index for name, index in indexes.items()}
        if given is None:
            names = tar.beside("classes.json") if beside is None else None
            given = parse_classes(names, f"{folder}/classes.json") if names is not None else beside
        elif beside is not None and beside != given and set(beside) == set(given):
            raise ConfigError(f"`classes` has the names of {where} in another order than its labels")
    selection = Selection(tuple(image_key.lower().split(";")), tuple(label_key.lower().split(";")), label_field, given)
    indexes_in_order = []
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing releases the interpreter lock
        found = pool.map(lambda tar: _index(tar, known.get((tar.folder, tar.name)), selection), tars)
        for done, index in enumerate(found, start=1):
            indexes_in_order.append(index)
            progress(done, len(tars))
    return indexes_in_order, given


def _index(tar: Tar, known: TarIndex | None, selection: Selection) -> TarIndex:
    """The index of one tar: the known one if it fits the file, the remembered one if it does, or a new one."""
    try:
        stamp = tar.stamp()
        if known is not None and known.size == stamp[0]:
            return known
        name = f"{tar.path.resolve() if isinstance(tar, LocalTar) else tar} {selection}"
        hint = index_cache.load(name)
        if isinstance(hint, dict) and hint.get("stamp") == list(stamp):
            try:
                return TarIndex.from_json(hint["tar"])
            except (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError):
                pass  # only a hint
        index = scan_tar(tar, selection)
    except OSError as error:
        raise MissingInput(f"{tar} can't be read: {error.strerror}") from error
    index_cache.save(name, {"stamp": stamp, "tar": index.to_json(tar.name)})
    return index


def _check_usable(source: _TarSource, spec: str, image_key: str, label_key: str) -> None:
    """Refuse a set that holds nothing, or whose images or labels are all under other names."""

    def all_are(reason: str) -> bool:
        return all(source.reason(row) == reason for row in range(len(source)))

    if len(source) == 0:
        raise MissingInput(f"{spec} holds no images: {len(source.shards)} tars without a sample")
    if (source.reasons == 0).any():
        return
    if all_are("missing image"):
        found = ";".join(member_suffixes(source.tars[source.shards[0]]))
        raise MissingInput(f"no sample of {spec} has an image under `image_key` {image_key}: found {found}")
    if all_are("unreadable label"):
        raise ConfigError(f"no label of {spec} under `label_key` {label_key} is a number or one of `classes`")
    raise MissingInput(f"{spec} holds no usable image: the first is {source.reason(0)}")
