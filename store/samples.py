"""The images of a samples artifact: `images/batch-NNNNNN.npz`, in index order.

    images        uint8 [B, S, S, 3]   255 x, rounded
    labels        int64 [B]            -1 is none
    rounded_up    uint8 [B, ceil(3 S^2 / 8)]   a bit for each value: whether rounding raised it

The bits give back what truncation would have made of the same floats, which is how the official code and ADM's
write images; they take an eighth of the images' room.
"""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from rae.store.errors import CorruptData
from rae.store.publish import replace_bytes


@dataclass(frozen=True)
class SampleBatch:
    """Images of consecutive indices, as the file holds them."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    rounded_up: NDArray[np.uint8]

    def truncated(self) -> NDArray[np.uint8]:
        """The images as truncation, floor(255 x), would have written them: uint8 [B, S, S, 3]."""
        bits = np.unpackbits(self.rounded_up, axis=1, count=self.images[0].size)
        return self.images - bits.reshape(self.images.shape)


def batch_path(folder: Path, number: int) -> Path:
    """The file of a batch below a samples artifact's payload."""
    return folder / f"images/batch-{number:06d}.npz"


def batch_paths(payload: Path) -> list[Path]:
    """Every batch of an artifact, in index order; `CorruptData` if there is none."""
    paths = sorted(payload.glob("images/batch-*.npz"))
    if not paths:
        raise CorruptData(f"{payload} holds no images")
    return paths


def write_batch(path: Path, batch: SampleBatch) -> None:
    """Whole or not at all: a batch cut short by a crash must not pass for one."""
    buffer = io.BytesIO()
    np.savez(buffer, images=batch.images, labels=batch.labels, rounded_up=batch.rounded_up)
    replace_bytes(path, buffer.getvalue())


def read_batch(path: Path) -> SampleBatch:
    """Read one batch; `CorruptData` if the file is no such thing."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            batch = SampleBatch(arrays["images"], arrays["labels"].astype(np.int64), arrays["rounded_up"])
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        raise CorruptData(f"{path} holds no batch of samples ({type(error).__name__}: {error})") from error
    images = batch.images
    fits = images.dtype == np.uint8 and images.ndim == 4 and images.shape[3] == 3 and len(images) > 0
    packed = (len(images), -(-images[0].size // 8)) if fits else None
    if not fits or batch.labels.shape != (len(images),) or batch.rounded_up.shape != packed:
        raise CorruptData(f"{path} holds arrays that do not fit together: images {images.dtype} {images.shape}")
    return batch


def read_labels(path: Path) -> NDArray[np.int64]:
    """The labels of one batch, whose images stay on the disk; `CorruptData` if the file is no such thing."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            labels: NDArray[np.int64] = arrays["labels"].astype(np.int64)
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        raise CorruptData(f"{path} holds no batch of samples ({type(error).__name__}: {error})") from error
    return labels


def read_batches(payload: Path) -> Iterator[SampleBatch]:
    """Every batch in index order, one in memory at a time; raises `CorruptData`, also for images of mixed sizes."""
    size = None
    for path in batch_paths(payload):
        batch = read_batch(path)
        size = size or batch.images.shape[1:]
        if batch.images.shape[1:] != size:
            raise CorruptData(f"{path} holds images of {batch.images.shape[1:]}, and those before it {size}")
        yield batch
