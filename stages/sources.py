"""Readers of the formats that images come in: tars, folders, parquet, CIFAR-10's binary files, scikit-learn's digits.

Each knows keys and labels before it reads an image, so that a choice among millions costs no decoding. Image files pass
through unchanged; bare pixels become PNG.
"""

import hashlib
import importlib.util
import io
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rae.stages.parquet import ParquetImages, Rows
from rae.stages.sections import ShardsSection
from rae.store.errors import ConfigError, CorruptData, MissingInput
from rae.store.image_folder import hash_files
from rae.store.shards import Keys, Source, expand_files, is_shards, open_source

Split = Literal["train", "val"]

_CIFAR_RECORD = 1 + 3 * 32 * 32  # a label byte, then the red, green and blue planes
_CIFAR_CLASSES = 10
# What a file or folder of each set is called, the preferred first.
_SET_NAMES: dict[Split, tuple[str, ...]] = {
    "train": ("train|training|data_batch",),
    "val": ("val|valid|validation", "test|test_batch"),
}


@dataclass(frozen=True)
class Images:
    """The images of a source: `keys` and `labels` int64 (-1: none) of all of them, `classes` if they have names.

    `read(rows)` gives the image files' bytes in the order of `rows`, which must ascend unless `any_order`. `skipped`
    counts samples of the source that hold no image of their own.
    """

    keys: Sequence[str]
    labels: NDArray[np.int64]
    classes: tuple[str, ...] | None
    read: Callable[[Rows], Iterator[bytes]]
    any_order: bool = True
    skipped: int = 0


def open_images(spec: str, split: Split, config: ShardsSection, classes: Sequence[str] | None) -> Images:
    """Open what `spec` names: `digits`, tars, parquet, CIFAR-10 files or a folder of images.

    Where a folder holds several sets (`train-*.parquet`, `data_batch_*.bin`, `test_batch.bin`), `split` picks one.
    `classes` are the names that labels refer to, if they are known already. Raises `MissingInput`, `ConfigError` and
    `CorruptData` as `open_source` does.
    """
    kind, files = _locate(spec, split)
    if kind == "digits":
        return _digits(classes)
    if kind == "parquet":
        table = ParquetImages(files, config.label_field, classes)
        keys = Keys.of(f"{row:09d}" for row in range(len(table.labels)))
        return Images(keys, table.labels, table.classes, table.read, any_order=False)
    if kind == "cifar10":
        return _cifar10(files, classes)
    return _from_source(_open_source(spec, config, classes))


def digest(spec: str, split: Split, config: ShardsSection) -> str:
    """What identifies the files that `spec` names: sha256 over their names and sha256s (for shards, the digests)."""
    kind, files = _locate(spec, split)
    if kind == "digits":
        files = [_digits_file()]
    if kind in ("tars", "folder"):
        lines = _open_source(spec, config, config.classes).digests
    else:
        root = Path(os.path.commonpath([path.resolve().parent for path in files]))
        names = [path.resolve().relative_to(root).as_posix() for path in files]
        hashes = hash_files(root, names)
        lines = [f"{json.dumps(name)} {row.tobytes().hex()}" for name, row in zip(names, hashes, strict=True)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _locate(spec: str, split: Split) -> tuple[str, list[Path]]:
    """The kind of source, and its files where it is made of a few large ones."""
    if spec == "digits":
        return "digits", []
    if is_shards(spec):
        return "tars", []
    root = Path(spec)
    if not root.is_dir():
        files = expand_files(spec)
        for suffix, kind in ((".parquet", "parquet"), (".bin", "cifar10")):
            if all(path.suffix == suffix for path in files):
                return kind, files
        raise ConfigError(
            f"{spec} is no source of images: give `digits`, a folder of images, .parquet files, CIFAR-10's .bin files"
            " or .tar shards"
        )
    if parquet := sorted(root.rglob("*.parquet")):
        return "parquet", _of_split(root, parquet, split)
    if cifar := sorted([*root.glob("data_batch_*.bin"), *root.glob("test_batch.bin")]):
        return "cifar10", _of_split(root, cifar, split)
    return "folder", []


def _of_split(root: Path, files: list[Path], split: Split) -> list[Path]:
    """Those of `files` whose name, or folder, says that they belong to `split`; all of them if none says anything."""

    def named(names: str) -> list[Path]:
        name = re.compile(rf"({names})([-_.]|$)")
        return [path for path in files if any(map(name.match, path.relative_to(root).parts))]

    for names in _SET_NAMES[split]:
        if found := named(names):
            return found
    if any(named(names) for names in _SET_NAMES["train"] + _SET_NAMES["val"]):
        raise MissingInput(f"{root} holds no {split} files: it has {', '.join(path.name for path in files[:5])}")
    return files


def _open_source(spec: str, config: ShardsSection, classes: Sequence[str] | None) -> Source:
    return open_source(
        spec,
        image_key=config.image_key,
        label_key=config.label_key,
        label_field=config.label_field,
        classes=classes,
    )


def _from_source(source: Source) -> Images:
    """Tars or a folder. A sample without a (readable) label still has an image and is taken along without a label."""
    kept = np.flatnonzero(
        [source.reason(row) in (None, "missing label", "unreadable label") for row in range(len(source))]
    )
    keys = [source.keys[row] for row in kept.tolist()]
    if len(set(keys)) < len(keys):  # many sets of tars count from 0 in each
        shard_of = {shard.name: number for number, shard in enumerate(source.shards)}
        keys = [
            f"{shard_of[source.shard_of(row).name]:05d}/{key}" for row, key in zip(kept.tolist(), keys, strict=True)
        ]

    def read(rows: Rows) -> Iterator[bytes]:
        return (source.read(int(kept[row])) for row in rows)

    return Images(keys, source.labels[kept], source.classes, read, skipped=len(source) - len(kept))


def _digits_file() -> Path:
    """The file of scikit-learn's digits, found without importing scikit-learn."""
    found = importlib.util.find_spec("sklearn")
    if found is None or found.origin is None:
        raise MissingInput("`digits` needs scikit-learn", "pip install scikit-learn")
    return Path(found.origin).parent / "datasets" / "data" / "digits.csv.gz"


def _digits(classes: Sequence[str] | None) -> Images:
    """1,797 handwritten digits of 8 x 8 pixels with 17 grey levels."""
    from sklearn.datasets import load_digits  # a second's import, for this source alone

    bunch = load_digits()
    pixels = np.rint(bunch.images * (255 / 16)).astype(np.uint8)  # [1797, 8, 8], 0..16 to 0..255

    def read(rows: Rows) -> Iterator[bytes]:
        return (_png(pixels[row]) for row in rows)

    labels = np.asarray(bunch.target, np.int64)
    return Images([f"{row:04d}" for row in range(len(labels))], labels, tuple(classes or "0123456789"), read)


def _cifar10(files: Sequence[Path], classes: Sequence[str] | None) -> Images:
    """Records of a label byte and 32 x 32 RGB planes; names from batches.meta.txt if it is there."""
    counts = []
    for path in files:
        count, rest = divmod(path.stat().st_size, _CIFAR_RECORD)
        if rest or not count:
            raise CorruptData(f"{path} is not made of CIFAR-10's records of {_CIFAR_RECORD} bytes")
        counts.append(count)
    records = [np.memmap(path, np.uint8, "r").reshape(-1, _CIFAR_RECORD) for path in files]
    firsts = np.cumsum([0, *counts])

    def read(rows: Rows) -> Iterator[bytes]:
        for row in rows:
            file = int(np.searchsorted(firsts, row, side="right")) - 1
            planes = records[file][row - firsts[file], 1:].reshape(3, 32, 32)
            yield _png(np.ascontiguousarray(planes.transpose(1, 2, 0)))

    meta = files[0].parent / "batches.meta.txt"
    names = meta.read_text("utf-8", "replace").split() if meta.is_file() else list(map(str, range(_CIFAR_CLASSES)))
    keys = [f"{path.stem}-{place:05d}" for path, count in zip(files, counts, strict=True) for place in range(count)]
    labels = np.concatenate([batch[:, 0] for batch in records]).astype(np.int64)
    return Images(keys, labels, tuple(classes or names), read)


def _png(pixels: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()
