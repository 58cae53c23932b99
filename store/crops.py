"""Random crops stored as views of a latent store: where each lies is a function of (seed, source shard, sample, view).

`boxes.npy` beside the latents records it: int32 [N, V, 4] by slot and view, the left, top, right and bottom edge in
pixels of the upright image scaled so that its shorter side is `encode.resize_size`; -1 where there is no latent.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rae.store.errors import CorruptData, MissingInput
from rae.store.latents_index import INDEX_FILE, INDEX_SCHEMA, open_table
from rae.store.layout import LatentLayout, Part
from rae.store.order import draw
from rae.store.publish import publish_file, temporary_name
from rae.store.zarr_shard import file_sha256

BOXES_FILE = "boxes.npy"
Boxes = npt.NDArray[np.int32]


@dataclass(frozen=True)
class CropLaw:
    """How crops are drawn: squares of `image_size` pixels in images whose shorter side is scaled to `resize_size`."""

    seed: int
    resize_size: int
    image_size: int

    def boxes(self, shard: str, samples: npt.ArrayLike, sizes: npt.ArrayLike, views: int) -> Boxes:
        """Where crops lie, [n, V, 4]; every position is equally likely.

        `samples` [n] are places in the source shard with the sha256 `shard`, `sizes` [n, 2] widths and heights.
        """
        samples, sizes = np.asarray(samples, np.int64), np.asarray(sizes, np.int64)
        room = self.resize_size * sizes // sizes.min(axis=1, keepdims=True) - self.image_size + 1
        drawn = [[draw(self.seed, f"{shard} crop_{axis}", view, samples) for axis in "xy"] for view in range(views)]
        corners = (np.asarray(drawn).transpose(2, 0, 1) * room[:, None]).astype(np.int32)  # [n, V, 2]
        return np.concatenate([corners, corners + self.image_size], axis=2, dtype=np.int32)


def record_boxes(
    folder: Path, layout: LatentLayout, parts: Sequence[Part], shards: Sequence[str], law: CropLaw, into: Path
) -> Path:
    """Write the `boxes.npy` of the finished store at `folder` into the folder `into`, a part at a time.

    `shards` are the digests of the source shards. `CorruptData` if other boxes are there.
    """
    path = into / BOXES_FILE
    temporary = temporary_name(path)
    shape = (len(parts) * layout.rows_per_part, layout.views, 4)
    try:
        boxes: Any = np.lib.format.open_memmap(temporary, "w+", dtype=np.int32, shape=shape)
        index = open_table(folder / INDEX_FILE, INDEX_SCHEMA).iter_batches(
            batch_size=layout.rows_per_part, columns=["width", "height", "valid"]
        )
        for part, lines in zip(parts, index, strict=True):
            here = boxes[part.first_slot : part.first_slot + layout.rows_per_part]
            here[:] = -1
            valid = np.flatnonzero(lines["valid"].to_numpy(zero_copy_only=False))
            sizes = np.stack([lines[name].to_numpy(zero_copy_only=False) for name in ("width", "height")], axis=1)
            of = shards[part.source_shard], part.first_sample + valid, sizes[valid]
            here[valid] = law.boxes(*of, layout.views)
        boxes.flush()
        if not publish_file(temporary, path) and file_sha256(path) != file_sha256(temporary):
            raise CorruptData(f"{path} is there already and belongs to other latents than the parts beside it")
    finally:
        temporary.unlink(missing_ok=True)
    return path


def open_boxes(folder: Path, layout: LatentLayout, slots: int) -> Boxes:
    """The recorded boxes of a store, mapped; `MissingInput` or `CorruptData` names the file."""
    path = folder / BOXES_FILE
    try:
        boxes: Boxes = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError as error:
        raise MissingInput(f"the boxes of the crops, {path}, are missing") from error
    except (ValueError, EOFError, OSError) as error:
        raise CorruptData(f"the boxes of the crops, {path}, cannot be read ({error})") from error
    if boxes.shape != (slots, layout.views, 4) or boxes.dtype != np.int32:
        raise CorruptData(f"{path} holds {boxes.dtype} {boxes.shape}, not a box for {slots} x {layout.views} views")
    return boxes
