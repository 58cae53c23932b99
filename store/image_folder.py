"""A folder of images, or of class folders, as a source: each file keeps its place and is read from it."""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rae.store import index_cache
from rae.store.errors import ConfigError, CorruptData, MissingInput, StaleInput
from rae.store.source import Keys, Source, SourceShard

# The files of a folder that are images. Everything else (notes, thumbnails' databases, dot files) is passed over.
_IMAGE_NAME = re.compile(r".\.(jpe?g|jpe|jfif|png|webp|gif|bmp|tiff?|p[bgpn]m|avif|jp2)$", re.IGNORECASE)
_BATCH = 1024


def open_image_folder(
    root: Path,
    classes: Sequence[str] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Source:
    """Open a folder of images (no labels), or of class folders (labels by sorted name, or as `classes` has it).

    A class folder is one shard; its images lie at any depth. Files are taken in sorted order and hashed once. Raises
    `MissingInput` without any image, `ConfigError` for images both beside and inside class folders, or for a class
    folder that `classes` lacks.
    """
    files = _image_files(root)
    if not files:
        raise MissingInput(f"{root} holds no images (jpg, png, webp, gif, bmp, tiff, avif, ...)")
    folders = sorted({name.partition("/")[0] if "/" in name else "" for name in files})
    if folders == [""]:
        return _FolderSource(root, {"": (-1, files)}, classes, progress)
    if folders[0] == "":
        loose = next(name for name in files if "/" not in name)
        raise ConfigError(f"{root} holds images ({loose}) beside class folders ({folders[1]}): move one or the other")
    if "train" in folders and not set(folders) - {"train", "val", "valid", "validation", "test"}:
        raise ConfigError(f"{root} holds several sets ({', '.join(folders)}), not classes: name one, {root / 'train'}")
    names = tuple(classes) if classes is not None else tuple(map(printable, folders))
    unknown = [folder for folder in folders if printable(folder) not in names]
    if unknown:
        raise ConfigError(f"{root / unknown[0]} is not one of the {len(names)} classes ({', '.join(names[:5])}, ...)")
    groups = {folder: (names.index(printable(folder)), list[str]()) for folder in folders}
    for name in files:
        groups[name.partition("/")[0]][1].append(name)
    return _FolderSource(root, groups, names, progress)


def hash_files(
    root: Path, names: Sequence[str], progress: Callable[[int, int], None] = lambda done, total: None
) -> NDArray[np.uint8]:
    """The sha256 of each file `root/name`, uint8 [N, 32], in order; files unchanged since the last time are not read.

    Raises `MissingInput` for a file that can't be read.
    """
    cache_name = f"files of {root.resolve()}"
    remembered = index_cache.load(cache_name)
    remembered = remembered if isinstance(remembered, dict) else {}

    def digest(name: str) -> tuple[list[object], bool]:
        try:
            stamp = index_cache.stamp(root / name)
            hint = remembered.get(name)
            if isinstance(hint, list) and len(hint) == 3 and tuple(hint[:2]) == stamp and _is_digest(hint[2]):
                return hint, False
            with (root / name).open("rb") as file:
                return [*stamp, hashlib.file_digest(file, "sha256").hexdigest()], True
        except OSError as error:
            raise MissingInput(f"{root / name} can't be read: {error.strerror}") from error

    digests = np.empty((len(names), 32), np.uint8)
    news = {}
    with ThreadPoolExecutor(8) as pool:  # a folder of small files waits for the disk, not for the processor
        for start in range(0, len(names), _BATCH):  # in batches, since `map` queues all it is given
            batch = names[start : start + _BATCH]
            for row, (name, (entry, is_new)) in enumerate(zip(batch, pool.map(digest, batch), strict=True), start):
                digests[row] = np.frombuffer(bytes.fromhex(str(entry[2])), np.uint8)
                if is_new:
                    news[name] = entry
            progress(start + len(batch), len(names))
    if news:
        index_cache.save(cache_name, remembered | news)
    return digests


def printable(name: str) -> str:
    """A file name as text that JSON and parquet can hold: bytes that are no UTF-8 are written as `\\xff`."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


class _FolderSource(Source):
    """Images in files of their own, compared with their digests as they are read."""

    def __init__(
        self,
        root: Path,
        groups: dict[str, tuple[int, list[str]]],
        classes: Sequence[str] | None,
        progress: Callable[[int, int], None],
    ) -> None:
        files = [name for _, names in groups.values() for name in names]
        self._root = root
        self._files = Keys.of(json.dumps(name) for name in files)  # JSON holds file names that are no UTF-8
        self._digests = hash_files(root, files, progress)
        shards: list[SourceShard] = []
        first = 0
        for folder, (label, names) in groups.items():
            digest = _folder_digest(label, names, self._digests[first : first + len(names)])
            name = printable(folder or root.resolve().name)
            shards.append(SourceShard(name, root / folder, digest, len(names), first))
            first += len(names)
        labels = np.repeat([label for label, _ in groups.values()], [len(names) for _, names in groups.values()])
        reasons = np.zeros(len(files), np.uint8)
        super().__init__(shards, _keys(files), labels.astype(np.int64), reasons, classes)

    def read(self, row: int) -> bytes:
        path = self._root / str(json.loads(self._files[row]))
        try:
            data = path.read_bytes()
        except OSError as error:
            raise MissingInput(f"{path} can't be read any more: {error.strerror}") from error
        if hashlib.sha256(data).digest() != self._digests[row].tobytes():
            raise StaleInput(f"{path} has changed since its folder was opened: start again")
        return data

    def verify(self, shard: SourceShard) -> None:
        for row in range(shard.first, shard.first + shard.samples):
            try:
                self.read(row)
            except StaleInput as error:
                raise CorruptData(error.message) from error


def _image_files(root: Path) -> list[str]:
    """Paths of the images below `root`, relative to it, with forward slashes, sorted; links are followed once."""

    def walk(folder: Path, prefix: str, above: frozenset[tuple[int, int]]) -> Iterator[str]:
        status = folder.stat()
        here = (status.st_dev, status.st_ino)
        if here in above:
            return  # a link back to a folder that we are in
        for entry in os.scandir(folder):
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                yield from walk(Path(entry.path), f"{prefix}{entry.name}/", above | {here})
            elif _IMAGE_NAME.search(entry.name):
                yield prefix + entry.name

    try:
        return sorted(walk(root, "", frozenset()))
    except OSError as error:
        raise MissingInput(f"{error.filename} can't be read: {error.strerror}") from error


def _keys(files: Sequence[str]) -> Keys:
    """A webdataset key for each file: its path without the suffix, with the base name's dots escaped.

    Where files differ in their suffix alone, the suffix stays in the key.
    """
    stems = [os.path.splitext(name)[0] for name in files]
    times = Counter(stems)
    names = (name if times[stem] > 1 else stem for name, stem in zip(files, stems, strict=True))
    return Keys.of(_without_dots(printable(name)) for name in names)


def _without_dots(path: str) -> str:
    folder, slash, name = path.rpartition("/")
    return folder + slash + name.replace("%", "%25").replace(".", "%2E")


def _folder_digest(label: int, names: Sequence[str], digests: NDArray[np.uint8]) -> str:
    lines = hashlib.sha256(f"{label}\n".encode())
    for name, digest in zip(names, digests, strict=True):
        lines.update(f"{json.dumps(name)} {digest.tobytes().hex()}\n".encode())
    return lines.hexdigest()


def _is_digest(text: object) -> bool:
    return isinstance(text, str) and len(text) == 64 and not set(text) - set("0123456789abcdef")
