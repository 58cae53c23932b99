"""Features of a set of images, taken in fixed blocks in the order of the index: resumable, by any number of ranks.

Blocks of `BLOCK_SIZE` rows pass the network together, the last one padded, and a row that cannot be used leaves a black
image in its block: so the features of a row depend on the set alone, not on who computed which rows when. A chunk of
blocks is a file; memory holds one, however many images there are.
"""

import hashlib
import io
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rae.stages.job import Progress, never, silent
from rae.stages.scoring.extractors import BLOCK_SIZE, Extractor
from rae.stages.scoring.feature_rows import CHUNK_ROWS
from rae.stages.scoring.image_sets import ImageSet
from rae.stages.training.ranks import Ranks
from rae.store.errors import CorruptData
from rae.store.manifest import canonical
from rae.store.publish import replace_bytes


class Features:
    """Features float32 [N, D] of the usable images of a set, in index order, read from the disk as they are needed.

    `labels` [N] are theirs, `rows` [N] their rows in the set, `paths` the chunks' files. Iterating gives the chunks.
    """

    def __init__(self, paths: Sequence[Path], labels: NDArray[np.integer], dim: int) -> None:
        self.paths, self.dim = tuple(paths), dim
        chunks = [_opened(path) for path in self.paths]
        if strange := [path for path, chunk in zip(self.paths, chunks, strict=True) if chunk.dtype != _row(dim)]:
            raise CorruptData(f"{strange[0]} does not hold {dim} features an image")
        if sum(map(len, chunks)) != len(labels):
            raise CorruptData(
                f"{self.paths[0].parent} holds features of {sum(map(len, chunks))} images, and not of {len(labels)}"
            )
        usable = [chunk["usable"] != 0 for chunk in chunks]
        self._ends = np.cumsum([0, *(int(kept.sum()) for kept in usable)])
        self.rows: NDArray[np.intp] = np.flatnonzero(np.concatenate([*usable, np.empty(0, np.bool_)]))
        self.labels: NDArray[np.integer] = labels[self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[NDArray[np.float32]]:
        for path in self.paths:
            chunk = _opened(path)
            yield np.ascontiguousarray(chunk["features"][chunk["usable"] != 0])

    def take(self, rows: NDArray[np.integer]) -> NDArray[np.float32]:
        """Those of `rows`, of which 0 is the first usable image: [len(rows), D]."""
        out = np.empty((len(rows), self.dim), np.float32)
        chunks = np.searchsorted(self._ends, rows, side="right") - 1
        for number in np.unique(chunks):
            chunk = _opened(self.paths[number])
            places = np.flatnonzero(chunk["usable"])[rows[chunks == number] - self._ends[number]]
            out[chunks == number] = chunk["features"][places]
        return out


def extract(
    extractor: Extractor,
    images: ImageSet,
    folder: Path,
    *,
    earlier: Sequence[Path] = (),
    ranks: Ranks | None = None,
    progress: Progress = silent,
    check_stop: Callable[[], None] = never,
) -> Features:
    """Features of all images, in files of `folder`; chunks that are there already, or in `earlier`, are taken over.

    Every rank calls this and takes every world-size-th chunk; all of them return the features of all. `check_stop` is
    called after each chunk, when nothing would be lost. Raises what reading the images raises, CorruptData for features
    that are not finite.
    """
    ranks = ranks or Ranks()
    count = len(images.labels)
    starts = range(0, count, CHUNK_ROWS)
    identity = hashlib.sha256(canonical([extractor.protocol(), images.digest, count])).hexdigest()[:16]
    paths = [folder / f"features-{identity}-{number:06d}.npy" for number in range(len(starts))]
    folder.mkdir(parents=True, exist_ok=True)
    mine = list(zip(paths, starts, strict=True))[ranks.rank :: ranks.world_size]
    for path, start in mine:
        stop = min(start + CHUNK_ROWS, count)
        if not any(_take_over(place / path.name, path, extractor.dim, stop - start) for place in (folder, *earlier)):
            features, usable = _chunk(extractor, images, range(start, stop))
            _save(path, features, usable)
        progress(stop, count, "images scored")
        check_stop()
    ranks.barrier()
    return Features(paths, images.labels, extractor.dim)


def _chunk(extractor: Extractor, images: ImageSet, rows: range) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Features [len(rows), D] and which rows are usable; the next block is read while the network has this one."""
    blocks = [rows[first : first + BLOCK_SIZE] for first in range(0, len(rows), BLOCK_SIZE)]
    features, usable = [], []
    with ThreadPoolExecutor(1) as reader:
        waiting = reader.submit(images.read, blocks[0])
        for block, following in zip(blocks, [*blocks[1:], None], strict=True):
            pixels, kept = waiting.result()
            if following is not None:
                waiting = reader.submit(images.read, following)
            found = extractor.block(pixels)
            finite = np.isfinite(found).all(axis=1) | ~kept
            if not finite.all():
                raise CorruptData(f"The features of image {block[int(np.argmin(finite))]} are not finite (from 0).")
            features.append(found)
            usable.append(kept)
    return np.concatenate(features), np.concatenate(usable)


def _take_over(found: Path, path: Path, dim: int, count: int) -> bool:
    """Whether `found` holds `count` features; if it lies elsewhere than at `path`, it is copied there."""
    try:
        chunk = _opened(found)
    except CorruptData:
        return False
    if chunk.shape != (count,) or chunk.dtype != _row(dim):
        return False
    if found != path:
        replace_bytes(path, found.read_bytes())
    return True


def _save(path: Path, features: NDArray[np.float32], usable: NDArray[np.bool_]) -> None:
    """Whole or not at all: a chunk cut short by a crash must not pass for one."""
    chunk = np.empty(len(features), _row(features.shape[1]))
    chunk["features"], chunk["usable"] = features, usable
    buffer = io.BytesIO()
    np.save(buffer, chunk)
    replace_bytes(path, buffer.getvalue())


def _row(dim: int) -> np.dtype[np.void]:
    """An image in a file: its features, and 1 if it can be used, else 0."""
    return np.dtype([("features", "<f4", (dim,)), ("usable", "<u4")])


def _opened(path: Path) -> NDArray[np.void]:
    """A chunk, mapped: only what is looked at is read, and nothing of it stays in memory."""
    try:
        chunk: NDArray[np.void] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise CorruptData(f"{path} cannot be read as features: {error}") from error
    if chunk.dtype.names != ("features", "usable") or chunk.ndim != 1:
        raise CorruptData(f"{path} holds no features")
    return chunk
