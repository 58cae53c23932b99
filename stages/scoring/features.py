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
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from rae.stages.job import Progress, never, silent
from rae.stages.scoring.extractors import BLOCK_SIZE, Extractor
from rae.stages.scoring.frechet import Moments
from rae.stages.scoring.image_sets import ImageSet
from rae.stages.training.ranks import Ranks
from rae.store.errors import CorruptData
from rae.store.manifest import canonical
from rae.store.publish import replace_bytes

CHUNK_ROWS = 64 * BLOCK_SIZE
"""Rows in a file of features: 8 MB of Inception's."""


class Features:
    """Features float32 [N, D] of the usable images of a set, in index order, chunk by chunk from the disk.

    `labels` [N] are theirs, `rows` [N] their rows in the set, `paths` the chunks' files.
    """

    def __init__(self, paths: Sequence[Path], labels: NDArray[np.integer], dim: int) -> None:
        self.paths, self.dim = tuple(paths), dim
        usable = [_read(path)[1] for path in self.paths]
        self.rows: NDArray[np.intp] = np.flatnonzero(np.concatenate([*usable, np.empty(0, np.bool_)]))
        self.labels: NDArray[np.integer] = labels[self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[NDArray[np.float32]]:
        for path in self.paths:
            features, usable, _ = _read(path)
            yield features[usable]

    def array(self) -> NDArray[np.float32]:
        """All of them [N, D]."""
        out = np.empty((len(self), self.dim), np.float32)
        first = 0
        for chunk in self:
            out[first : first + len(chunk)] = chunk
            first += len(chunk)
        return out

    def moments(self) -> Moments:
        """Their mean and covariance, in float64. Raises CorruptData for features that are not finite."""
        moments = Moments(self.dim)
        for chunk in self:
            moments.update(chunk)
        return moments


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
    called after each chunk, when nothing would be lost. Raises what reading the images raises.
    """
    ranks = ranks or Ranks()
    count = len(images.labels)
    starts = range(0, count, CHUNK_ROWS)
    identity = hashlib.sha256(canonical([extractor.protocol(), images.digest, count])).hexdigest()
    paths = [folder / f"features-{identity[:16]}-{number:06d}.npz" for number in range(len(starts))]
    folder.mkdir(parents=True, exist_ok=True)
    mine = list(zip(paths, starts, strict=True))[ranks.rank :: ranks.world_size]
    for path, start in mine:
        stop = min(start + CHUNK_ROWS, count)
        if not any(_take_over(place / path.name, path, identity, stop - start) for place in (folder, *earlier)):
            features, usable = _chunk(extractor, images, range(start, stop))
            _save(path, features, usable, identity)
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
        for following in [*blocks[1:], None]:
            pixels, kept = waiting.result()
            if following is not None:
                waiting = reader.submit(images.read, following)
            features.append(extractor.block(pixels))
            usable.append(kept)
    return np.concatenate(features), np.concatenate(usable)


def _take_over(found: Path, path: Path, identity: str, count: int) -> bool:
    """Whether `found` holds these features; if it lies elsewhere than at `path`, it is copied there."""
    try:
        features, usable, whose = _read(found)
    except CorruptData:
        return False
    if whose != identity or len(features) != count or len(usable) != count:
        return False
    if found != path:
        _save(path, features, usable, identity)
    return True


def _save(path: Path, features: NDArray[np.float32], usable: NDArray[np.bool_], identity: str) -> None:
    """Whole or not at all: a chunk cut short by a crash must not pass for one."""
    buffer = io.BytesIO()
    np.savez(buffer, features=features, usable=usable, identity=identity)
    replace_bytes(path, buffer.getvalue())


def _read(path: Path) -> tuple[NDArray[np.float32], NDArray[np.bool_], str]:
    try:
        with np.load(path, allow_pickle=False) as chunk:
            return chunk["features"], chunk["usable"], str(chunk["identity"])
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        raise CorruptData(f"{path} cannot be read as features: {error}") from error
