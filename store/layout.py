"""Where every latent lies: parts, slots and the Zarr metadata that tells any reader of them. Arithmetic alone.

A *part* covers consecutive samples of one source shard and is one Zarr shard of shape [R, V, C, H, W]. The array
`latents` has shape [N, V, C, H, W], where N counts *slots*, R for every part: sample `i` of a part has the slot
`number * R + i`, and the slots behind the last sample are padding. The layout follows from the numbers of samples in
the ordered source shards and R, so whoever takes a part knows its place without asking anyone.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self, cast, get_args

import numpy as np

from rae.store.errors import ConfigError, CorruptData

Dtype = Literal["float16", "float32"]

GROUP_FILE = "zarr.json"
ARRAY_FILE = "latents/zarr.json"
STATS_FILE = "stats.npz"

LATENTS_PER_PART = 1024  # views included: 400 MB at 384 KiB, 1,250 files for ImageNet
GROUP_METADATA: dict[str, Any] = {"zarr_format": 3, "node_type": "group", "attributes": {}}


@dataclass(frozen=True)
class Part:
    """`count` consecutive samples of one source shard, the unit of work; its slots begin at `first_slot`."""

    number: int
    source_shard: int
    first_sample: int
    count: int
    first_slot: int


def plan_parts(samples_per_shard: Sequence[int], rows_per_part: int) -> list[Part]:
    """Cut source shards into parts of at most `rows_per_part` samples, in order; each shard opens a new part."""
    if rows_per_part < 1:
        raise ConfigError(f"`rows_per_part` must be at least 1, got {rows_per_part}")
    parts: list[Part] = []
    for source_shard, samples in enumerate(samples_per_shard):
        for first in range(0, samples, rows_per_part):
            count = min(rows_per_part, samples - first)
            parts.append(Part(len(parts), source_shard, first, count, first_slot=len(parts) * rows_per_part))
    return parts


@dataclass(frozen=True)
class LatentLayout:
    """Shape and number format of a latent store: V views of C x H x W numbers a sample, R samples a part."""

    views: int
    channels: int
    height: int
    width: int
    rows_per_part: int
    dtype: Dtype = "float16"

    def __post_init__(self) -> None:
        sizes = (self.views, *self.latent_shape, self.rows_per_part)
        if min(sizes) < 1:
            raise ConfigError(f"latents need positive sizes, got views, C, H, W, rows per part = {sizes}")
        if self.dtype not in get_args(Dtype):
            raise ConfigError(f"latents are stored as {' or '.join(get_args(Dtype))}, not as {self.dtype}")

    @staticmethod
    def default_rows_per_part(views: int) -> int:
        """As many rows as have 1024 latents between them."""
        return max(1, LATENTS_PER_PART // views)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return (self.channels, self.height, self.width)

    @property
    def row_shape(self) -> tuple[int, int, int, int]:
        """(V, C, H, W)."""
        return (self.views, *self.latent_shape)

    @property
    def stored_dtype(self) -> np.dtype[Any]:
        """Little-endian, whatever the machine."""
        return np.dtype(self.dtype).newbyteorder("<")

    @property
    def latent_bytes(self) -> int:
        """Size of one view of one sample."""
        return self.channels * self.height * self.width * self.stored_dtype.itemsize

    def shard_key(self, number: int) -> str:
        """Path of a part's Zarr shard below the store's folder."""
        return f"latents/c/{number}/0/0/0/0"

    def array_metadata(self, slots: int) -> dict[str, Any]:
        """`latents/zarr.json`: a Zarr v3 array of `slots` rows, sharded by part, one inner chunk per latent.

        The fill value is NaN, so that nothing missing reads as zeros.
        """
        little_endian = {"name": "bytes", "configuration": {"endian": "little"}}
        sharding = {
            "chunk_shape": [1, 1, *self.latent_shape],
            "codecs": [little_endian],
            "index_codecs": [little_endian, {"name": "crc32c"}],
            "index_location": "end",
        }
        return {
            "zarr_format": 3,
            "node_type": "array",
            "shape": [slots, *self.row_shape],
            "data_type": self.dtype,
            "chunk_grid": {
                "name": "regular",
                "configuration": {"chunk_shape": [self.rows_per_part, *self.row_shape]},
            },
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": "NaN",
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
            "dimension_names": ["slot", "view", "channel", "height", "width"],
            "attributes": {},
        }

    def metadata_files(self, slots: int) -> dict[str, bytes]:
        """The Zarr metadata of a store of `slots` rows, by path below its folder."""
        metadata = {GROUP_FILE: GROUP_METADATA, ARRAY_FILE: self.array_metadata(slots)}
        return {path: (json.dumps(value, indent=1) + "\n").encode() for path, value in metadata.items()}

    @classmethod
    def from_array_metadata(cls, metadata: Mapping[str, Any], where: str) -> tuple[Self, int]:
        """The layout and the number of slots that `array_metadata` wrote; `CorruptData` for any other array."""
        try:
            slots, *row_shape = (int(size) for size in metadata["shape"])
            rows_per_part = int(metadata["chunk_grid"]["configuration"]["chunk_shape"][0])
            views, channels, height, width = row_shape
            layout = cls(views, channels, height, width, rows_per_part, cast(Dtype, metadata["data_type"]))
        except (KeyError, TypeError, ValueError, IndexError, ConfigError) as error:
            raise CorruptData(f"{where} does not describe a latent store ({type(error).__name__}: {error})") from error
        expected = layout.array_metadata(slots)
        foreign = [key for key in expected if key != "attributes" and metadata.get(key) != expected[key]]
        if foreign:
            raise CorruptData(f"{where} describes an array that rae did not lay out: its {', '.join(foreign)} differ")
        return layout, slots
