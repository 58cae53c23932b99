"""The record of a finished part, `parts/NNNNNN.json`: written last, so that a part is done exactly if it exists.

The rows are kept by column. `row_crc32c` holds, per row, the crc32c of each view's bytes before compression (of int8
latents the codes, then the scales), or null for a row that has no latent; `index.reason` says why.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypedDict

from rae.store.errors import CorruptData, MissingInput, StaleInput
from rae.store.json_data import parse_json
from rae.store.layout import LatentLayout, Part
from rae.store.manifest import canonical

SCHEMA = 2
FOLDER = "parts"
COLUMNS = {"key": str, "label": int, "image_sha256": str, "width": int, "height": int, "reason": str}


class IndexRow(TypedDict):
    """What the index keeps of an image besides its latent.

    `label` is None where the source has none, `sha256` (hex, of the encoded image's bytes) where they could not be
    read, `width` and `height` (pixels, as decoded) where they could not be decoded.
    """

    key: str
    label: int | None
    sha256: str | None
    width: int | None
    height: int | None


def content_digest(layout: LatentLayout, part_contents: Sequence[str]) -> str:
    """A store's logical digest, over shape, dtype and the digests of its parts' decoded rows and index rows, in order.

    Neither compression nor the layout of bytes in files shows in it.
    """
    shape = [len(part_contents) * layout.rows_per_part, *layout.row_shape]
    value = {"dtype": layout.dtype, "shape": shape, "parts": list(part_contents)}
    return hashlib.sha256(canonical(value)).hexdigest()


def record_path(folder: Path, number: int) -> Path:
    """Where the record of a part lies below a store's folder."""
    return folder / FOLDER / f"{number:06d}.json"


def part_of(path: str) -> int | None:
    """The number of the part that a file belongs to, by its path below a store's folder; None if it is of none."""
    match = re.fullmatch(rf"(?:{FOLDER}/0*|[a-z]+/c/)(\d+)(?:\.(?:json|npz)|(?:/0){{4}})", path)
    return int(match[1]) if match else None


def is_recorded(folder: Path, number: int) -> bool:
    """Whether a part is done."""
    return record_path(folder, number).exists()


def moments_path(folder: Path, number: int) -> Path:
    """Where the (count, mean, M2) of a part lie below a store's folder."""
    return folder / FOLDER / f"{number:06d}.npz"


@dataclass(frozen=True)
class PartRecord:
    """A part's place, the digests of its files, and its rows."""

    part: int
    source_shard: int
    first_sample: int
    slots: int
    shard_key: str
    bytes: int
    sha256: str
    scales_bytes: int | None  # of int8 latents alone
    scales_sha256: str | None
    compressor: str
    statistics: str  # file of the part's moments, below the store's folder
    statistics_sha256: str
    row_crc32c: list[list[int] | None]
    index: dict[str, list[Any]]

    @property
    def rows(self) -> int:
        """How many rows have a latent."""
        return sum(checksums is not None for checksums in self.row_crc32c)

    @property
    def shards(self) -> tuple[tuple[int, str], ...]:
        """Bytes and sha256 of the part's shard in each array."""
        latents = (self.bytes, self.sha256)
        if self.scales_bytes is None or self.scales_sha256 is None:
            return (latents,)
        return (latents, (self.scales_bytes, self.scales_sha256))

    def content(self) -> str:
        """Digest of what a reader sees of the part: index rows and checksums of decoded latents, not files."""
        return hashlib.sha256(canonical({"index": self.index, "row_crc32c": self.row_crc32c})).hexdigest()

    def to_json(self) -> str:
        return canonical({"schema": SCHEMA, **vars(self)}).decode() + "\n"

    @classmethod
    def load(cls, folder: Path, layout: LatentLayout, part: Part) -> Self:
        """Read a part's record and hold it against the plan.

        `MissingInput` if there is none; `CorruptData`, naming it, if it is damaged or records another part;
        `StaleInput` if the part is compressed in another way.
        """
        path = record_path(folder, part.number)
        try:
            value = parse_json(path.read_bytes(), f"the record {path}")
        except FileNotFoundError as error:
            raise MissingInput(f"part {part.number} of {folder} is not finished: {path} is missing") from error
        if not isinstance(value, dict) or value.pop("schema", None) != SCHEMA or set(value) != set(cls.__annotations__):
            raise CorruptData(f"{path} is not the record of a part that this version of rae reads")
        expected = {
            "part": part.number,
            "source_shard": part.source_shard,
            "first_sample": part.first_sample,
            "slots": part.count,
            "shard_key": layout.shard_key(part.number),
            "statistics": str(moments_path(Path(), part.number)),
        }
        differing = [f"{key}: {value[key]!r}, planned {plan!r}" for key, plan in expected.items() if value[key] != plan]
        if differing:
            raise CorruptData(f"{path} records another part than planned ({'; '.join(differing)})")
        _check_rows(value, layout.views, path)
        record = cls(**value)
        if record.compressor != layout.compressor:
            raise StaleInput(
                f"{path} records a part compressed with `{record.compressor}`, and `{layout.compressor}` is asked for;"
                " `encode.compressor` can't change while an encode is unfinished"
            )
        if len(record.shards) != len(layout.arrays):
            raise CorruptData(f"{path} lists {len(record.shards)} shards, and {layout.dtype} latents have others")
        return record


def _check_rows(value: Mapping[str, Any], views: int, path: Path) -> None:
    index, row_crc32c = value["index"], value["row_crc32c"]
    if not (isinstance(index, dict) and set(index) == set(COLUMNS) and isinstance(row_crc32c, list)):
        raise CorruptData(f"the rows in {path} are damaged: their columns must be {', '.join(COLUMNS)}")
    good = (
        isinstance(value["bytes"], int)
        and isinstance(value["sha256"], str)
        and isinstance(value["scales_bytes"], int | None)
        and isinstance(value["scales_sha256"], str | None)
        and all(isinstance(index[name], list) and len(index[name]) == len(row_crc32c) for name in COLUMNS)
        and all(one is None or type(one) is kind for name, kind in COLUMNS.items() for one in index[name])
        and all(
            row is None or (isinstance(row, list) and [type(one) for one in row] == [int] * views) for row in row_crc32c
        )
        and [row is None for row in row_crc32c] == [reason is not None for reason in index["reason"]]
        and len(row_crc32c) == value["slots"]
    )
    if not good:
        raise CorruptData(f"the rows in {path} are damaged: their columns do not fit each other or their types")
