"""A vector for each image, beside the latents: what a transformer can be conditioned on instead of labels.

conditioning.npy    float32 [N, D]; N counts slots, as in the latents, and slots without an image hold NaN
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rae.store.errors import ConfigError, CorruptData, MissingInput
from rae.store.layout import LatentLayout, Part
from rae.store.publish import publish_file, temporary_name
from rae.store.zarr_shard import file_sha256

CONDITIONING_FILE = "conditioning.npy"

Vectors = NDArray[np.float32]


def read_vectors(path: Path) -> Vectors:
    """The vectors of a file [N, D], without rows of NaN, such as a store's own has; what they are is checked.

    Raises `MissingInput` for no file, `ConfigError` for anything but finite numbers [N, D].
    """
    vectors = _mapped(path)
    if vectors.ndim != 2 or not vectors.size or vectors.dtype.kind not in "fiu":
        raise ConfigError(f"{path} holds {vectors.dtype} {vectors.shape}, and conditioning takes numbers [N, D]")
    kept = np.asarray(vectors[~np.isnan(vectors).all(axis=1)], np.float32)
    if not len(kept) or not np.isfinite(kept).all():
        raise ConfigError(f"{path} holds numbers that are not finite")
    return kept


def record_vectors(
    vectors: Vectors, layout: LatentLayout, parts: Sequence[Part], first_rows: Sequence[int], into: Path
) -> Path:
    """Write the vectors [N, D] of a source's samples to the slots of their latents; returns the file.

    `first_rows` are the rows at which the source's shards begin. `CorruptData` if another file is there.
    """
    path = into / CONDITIONING_FILE
    temporary = temporary_name(path)
    shape = (len(parts) * layout.rows_per_part, vectors.shape[1])
    try:
        stored: Any = np.lib.format.open_memmap(temporary, "w+", dtype=np.float32, shape=shape)
        stored[:] = np.nan
        for part in parts:
            first = first_rows[part.source_shard] + part.first_sample
            stored[part.first_slot : part.first_slot + part.count] = vectors[first : first + part.count]
        stored.flush()
        if not publish_file(temporary, path) and file_sha256(path) != file_sha256(temporary):
            raise CorruptData(f"{path} is there already and holds other vectors")
    finally:
        temporary.unlink(missing_ok=True)
    return path


def open_vectors(folder: Path, slots: int) -> Vectors:
    """A store's vectors [slots, D], mapped; `MissingInput` or `CorruptData` names the file."""
    vectors = _mapped(folder / CONDITIONING_FILE, "; encode with `encode.conditioning` to have them")
    if vectors.ndim != 2 or len(vectors) != slots or vectors.dtype != np.float32:
        raise CorruptData(f"{folder / CONDITIONING_FILE} holds {vectors.dtype} {vectors.shape} for {slots} slots")
    return vectors


def _mapped(path: Path, hint: str = "") -> NDArray[Any]:
    try:
        return np.asanyarray(np.load(path, mmap_mode="r", allow_pickle=False))
    except FileNotFoundError as error:
        raise MissingInput(f"the conditioning vectors, {path}, are not there{hint}") from error
    except (ValueError, EOFError, OSError) as error:
        raise CorruptData(f"the conditioning vectors, {path}, cannot be read ({error})") from error
