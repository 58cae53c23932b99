"""Turns recorded parts into a store that opens at once: what is done, and the metadata of the whole."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rae.store.errors import CorruptData, MissingInput
from rae.store.latents_index import (
    INDEX_FILE,
    INDEX_SCHEMA,
    PARTS_FILE,
    PARTS_SCHEMA,
    TableWriter,
    index_groups,
    parts_table,
)
from rae.store.layout import STATS_FILE, LatentLayout, Part
from rae.store.part_record import FOLDER, PartRecord, content_digest, moments_path, record_path
from rae.store.publish import make_folder, publish_bytes
from rae.store.stats import LatentStats, Moments
from rae.store.zarr_shard import check_size, file_sha256

_RECORD_NAME = re.compile(r"(\d{6,})\.json")


@dataclass(frozen=True)
class LatentsSummary:
    """A finished store: its logical digest, images with and without a latent, why some have none, bytes of latents.

    `files` are those of the whole store. The parts' own files are not among them: `parts.parquet` has their digests.
    """

    content: str
    rows: int
    invalid_rows: int
    reasons: Counter[str]
    bytes: int
    files: tuple[Path, ...]


def completed_parts(folder: Path, layout: LatentLayout, parts: Sequence[Part]) -> set[int]:
    """Numbers of the parts that are recorded; the existence of their latents alone says nothing.

    Reads names, not records. Raises `CorruptData` for the record of a part that is not planned, `MissingInput` for one
    whose file is gone.
    """
    names = [path.name for path in (folder / FOLDER).iterdir()] if (folder / FOLDER).is_dir() else []
    done = {int(match[1]) for name in names if (match := _RECORD_NAME.fullmatch(name))}
    if foreign := sorted(done - {part.number for part in parts}):
        raise CorruptData(
            f"{record_path(folder, foreign[0])} records a part that is not among the {len(parts)} planned"
        )
    for number in sorted(done):
        for key in layout.shard_keys(number):
            if not (folder / key).exists():
                raise MissingInput(f"part {number} is recorded and its file {folder / key} is missing")
    return done


def finish(
    folder: Path, layout: LatentLayout, parts: Sequence[Part], sources: Sequence[str], into: Path | None = None
) -> LatentsSummary:
    """Write `zarr.json`, `latents/zarr.json`, `index.parquet`, `parts.parquet` and `stats.npz` from the records.

    `sources` are the digests of the source shards, in order; `into` is where to write if not beside the parts. May be
    called again and by several processes at once: the result is a function of the records. Reads one record at a time;
    memory holds a row group and a line per part.
    Raises `MissingInput` if a part is not recorded, `CorruptData` if a file does not fit its record or no row is valid.
    """
    if not parts:
        raise MissingInput(f"there is nothing to finish in {folder}: the source has no samples")
    tally, into = _Tally(folder, layout, sources), into or folder
    with TableWriter(into / INDEX_FILE, INDEX_SCHEMA) as index:
        for group in index_groups(tally.counting(parts), layout):
            index.write(group)
        content = content_digest(layout, [line["content"] for line in tally.lines])
        if tally.moments is None or tally.moments.count == 0:
            reasons = ", ".join(f"{count} x {reason}" for reason, count in tally.reasons.most_common(3))
            raise CorruptData(f"none of the {tally.reasons.total()} images gave a latent ({reasons})")
        index.publish(content)
    write_parts_table(into / PARTS_FILE, tally.lines, content)
    _publish_once(into / STATS_FILE, LatentStats.of(tally.moments).to_bytes())
    for name, data in layout.metadata_files(len(parts) * layout.rows_per_part).items():
        make_folder((into / name).parent)
        _publish_once(into / name, data)
    _sweep(folder, layout)
    rows = sum(line["rows"] for line in tally.lines)
    size = sum(line["bytes"] + (line["scales_bytes"] or 0) for line in tally.lines)
    files = tuple(into / name for name in store_files(layout))
    return LatentsSummary(content, rows, tally.reasons.total(), tally.reasons, size, files)


def store_files(layout: LatentLayout) -> list[str]:
    """Paths below a store's folder of the files that `finish` writes."""
    return [*layout.metadata_files(0), INDEX_FILE, PARTS_FILE, STATS_FILE]


def write_parts_table(path: Path, lines: Sequence[dict[str, Any]], content: str) -> None:
    """Write `parts.parquet` from a line per part."""
    with TableWriter(path, PARTS_SCHEMA) as table:
        table.write(parts_table(lines))
        table.publish(content)


def part_line(folder: Path, record: PartRecord, sources: Sequence[str]) -> dict[str, Any]:
    """The line of `parts.parquet` that a record gives; `sources` are the digests of the source shards."""
    return {
        "part": record.part,
        "source_shard": record.source_shard,
        "source_sha256": sources[record.source_shard],
        "first_sample": record.first_sample,
        "slots": record.slots,
        "rows": record.rows,
        "bytes": record.bytes,
        "sha256": record.sha256,
        "scales_bytes": record.scales_bytes,
        "scales_sha256": record.scales_sha256,
        "record_sha256": file_sha256(record_path(folder, record.part)),
        "content": record.content(),
    }


@dataclass
class _Tally:
    """What `finish` gathers from the records as they pass."""

    folder: Path
    layout: LatentLayout
    sources: Sequence[str]
    lines: list[dict[str, Any]] = field(default_factory=list)
    moments: Moments | None = None
    reasons: Counter[str] = field(default_factory=Counter)

    def counting(self, parts: Iterable[Part]) -> Iterator[PartRecord]:
        for part in parts:
            record = PartRecord.load(self.folder, self.layout, part)
            for key, (size, _) in zip(self.layout.shard_keys(part.number), record.shards, strict=True):
                check_size(self.folder / key, size)
            moments = Moments.load(moments_path(self.folder, part.number))
            if moments.mean.shape != self.layout.latent_shape or moments.count != record.rows * self.layout.views:
                raise CorruptData(f"{moments_path(self.folder, part.number)} is not of the rows in its record")
            self.moments = moments if self.moments is None else self.moments.merge(moments)
            self.reasons.update(reason for reason in record.index["reason"] if reason is not None)
            self.lines.append(part_line(self.folder, record, self.sources))
            yield record


def _publish_once(path: Path, data: bytes) -> None:
    try:
        created = publish_bytes(path, data)
    except FileNotFoundError:  # swept away by another process, which has finished
        created = False
    if not created and path.read_bytes() != data:
        raise CorruptData(f"{path} is there already and belongs to other latents than the parts beside it")


def _sweep(folder: Path, layout: LatentLayout) -> None:
    """Remove what killed writers left. One that still runs can only be late: everything is recorded and published."""
    for name in (*store_files(layout), f"{FOLDER}/*"):
        path = folder / name
        for leftover in path.parent.glob(f".{path.name}.*.partial"):
            leftover.unlink(missing_ok=True)
