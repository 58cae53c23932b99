"""Where every latent lies: parts, slots and the Zarr metadata that tells any reader of them. Arithmetic alone.

A *part* covers consecutive samples of one source shard and is one Zarr shard of shape [R, V, C, H, W]. The array
`latents` has shape [N, V, C, H, W], where N counts *slots*, R for every part: sample `i` of a part has the slot
`number * R + i`, and the slots behind the last sample are padding. The layout follows from the numbers of samples in
the ordered source shards and R, so whoever takes a part knows its place without asking anyone. int8 latents have their
scales in a second array `scales` [N, V, C, 1, 1], laid out alike.

Views are `flips`, the centre crop of the image and its horizontal flip, or `crops` at places of their own, which
`rae.store.crops` draws and records; then the arrays have the attribute `rae_views: crops`.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, get_args

import numpy.typing as npt

from rae.store import compression, formats
from rae.store.compression import Compressor
from rae.store.errors import ConfigError, CorruptData, MissingInput
from rae.store.formats import ARRAYS, Dtype, StoredArray
from rae.store.json_data import parse_json

GROUP_FILE = "zarr.json"
ARRAY_FILE = "latents/zarr.json"
STATS_FILE = "stats.npz"

ViewKind = Literal["flips", "crops"]

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
    compressor: Compressor = "none"
    view_kind: ViewKind = "flips"

    def __post_init__(self) -> None:
        sizes = (self.views, *self.latent_shape, self.rows_per_part)
        if min(sizes) < 1:
            raise ConfigError(f"latents need positive sizes, got views, C, H, W, rows per part = {sizes}")
        for what, value, known in (
            ("stored as", self.dtype, get_args(Dtype)),
            ("compressed with", self.compressor, get_args(Compressor)),
            ("of views that are", self.view_kind, get_args(ViewKind)),
        ):
            if value not in known:
                raise ConfigError(f"latents are {what} {', '.join(known[:-1])} or {known[-1]}, not {value}")
        for array in self.arrays:
            compression.zarr_codecs(self.compressor, array)  # refuses what does not go together

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
    def arrays(self) -> tuple[StoredArray, ...]:
        """`latents`, and for int8 `scales`."""
        return ARRAYS[self.dtype]

    def chunk_shape(self, array: StoredArray) -> tuple[int, int, int]:
        """What an array holds of one latent: (C, H, W), or (C, 1, 1) for scales."""
        return (self.channels, 1, 1) if array.channelwise else self.latent_shape

    def chunk_bytes(self, array: StoredArray) -> int:
        """Size of that before compression."""
        return math.prod(self.chunk_shape(array)) * array.dtype.itemsize

    @property
    def latent_bytes(self) -> int:
        """Size of one view of one sample in all arrays, before compression."""
        return sum(self.chunk_bytes(array) for array in self.arrays)

    def encode(self, latents: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], ...] | None:
        """What is stored of float latents [..., C, H, W], per array; None if they are not finite in this format."""
        return formats.encode(self.dtype, latents)

    def decode(self, stored: tuple[npt.NDArray[Any], ...], out: npt.NDArray[Any] | None = None) -> npt.NDArray[Any]:
        """The latents [..., C, H, W] that stored arrays stand for; see `rae.store.formats.decode`."""
        return formats.decode(self.dtype, stored, out)

    @property
    def is_decoded(self) -> bool:
        """Whether latents are worked out from what is stored, rather than being it."""
        return self.dtype in ("bfloat16", "int8")

    def shard_key(self, number: int, array: str = "latents") -> str:
        """Path of a part's Zarr shard below the store's folder."""
        return f"{array}/c/{number}/0/0/0/0"

    def shard_keys(self, number: int) -> tuple[str, ...]:
        """Paths of all Zarr shards of a part, in the order of `arrays`."""
        return tuple(self.shard_key(number, array.name) for array in self.arrays)

    def array_metadata(self, slots: int, array: StoredArray | None = None) -> dict[str, Any]:
        """`zarr.json` of an array (`latents`): `slots` rows in Zarr v3, sharded by part, one inner chunk per latent."""
        array = array or self.arrays[0]
        chunk = self.chunk_shape(array)
        sharding = {
            "chunk_shape": [1, 1, *chunk],
            "codecs": compression.zarr_codecs(self.compressor, array),
            "index_codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
            "index_location": "end",
        }
        return {
            "zarr_format": 3,
            "node_type": "array",
            "shape": [slots, self.views, *chunk],
            "data_type": array.data_type,
            "chunk_grid": {
                "name": "regular",
                "configuration": {"chunk_shape": [self.rows_per_part, self.views, *chunk]},
            },
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": array.fill_value,
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
            "dimension_names": ["slot", "view", "channel", "height", "width"],
            "attributes": dict(array.attributes) | ({"rae_views": "crops"} if self.view_kind == "crops" else {}),
        }

    def metadata_files(self, slots: int) -> dict[str, bytes]:
        """The Zarr metadata of a store of `slots` rows, by path below its folder."""
        metadata = {GROUP_FILE: GROUP_METADATA}
        metadata |= {f"{array.name}/zarr.json": self.array_metadata(slots, array) for array in self.arrays}
        return {path: (json.dumps(value, indent=1) + "\n").encode() for path, value in metadata.items()}

    @classmethod
    def load(cls, folder: Path) -> tuple[Self, int]:
        """Layout and number of slots of the store in `folder`; `MissingInput` or `CorruptData` names the file."""
        path = folder / ARRAY_FILE
        try:
            metadata = parse_json(path.read_bytes(), str(path))
        except FileNotFoundError as error:
            raise MissingInput(f"{folder} holds no finished latents: {path} is missing") from error
        return cls.from_array_metadata(metadata, str(path))

    @classmethod
    def from_array_metadata(cls, metadata: Mapping[str, Any], where: str) -> tuple[Self, int]:
        """The layout and the number of slots that `array_metadata` wrote; `CorruptData` for any other array."""
        try:
            slots, *row_shape = (int(size) for size in metadata["shape"])
            rows_per_part = int(metadata["chunk_grid"]["configuration"]["chunk_shape"][0])
            codecs = metadata["codecs"][0]["configuration"]["codecs"]
            views, channels, height, width = row_shape
            dtype = metadata["attributes"].get("rae_dtype", metadata["data_type"])
            kind = metadata["attributes"].get("rae_views", "flips")
            layout = cls(views, channels, height, width, rows_per_part, dtype, _compressor(codecs), kind)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError, ConfigError) as error:
            raise CorruptData(f"{where} does not describe a latent store ({type(error).__name__}: {error})") from error
        expected = layout.array_metadata(slots)
        if foreign := [key for key in expected if metadata.get(key) != expected[key]]:
            raise CorruptData(f"{where} describes an array that rae did not lay out: its {', '.join(foreign)} differ")
        return layout, slots


def _compressor(codecs: Sequence[Mapping[str, Any]]) -> Any:
    """The compressor by its codec's name in Zarr metadata; `LatentLayout` refuses what it does not know."""
    name = str(codecs[-1]["name"])
    return "none" if name == "bytes" else name.removeprefix("numcodecs.")
