"""Finds what is wrong in a latent store, down to the row."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from rae.store.errors import RaeError
from rae.store.latents_index import (
    INDEX_FILE,
    INDEX_SCHEMA,
    PARTS_FILE,
    PARTS_SCHEMA,
    index_groups,
    open_table,
    read_columns,
    table_content,
)
from rae.store.layout import STATS_FILE, LatentLayout, Part
from rae.store.manifest import Manifest
from rae.store.part_record import PartRecord, content_digest, moments_path, record_path
from rae.store.stats import LatentStats, Moments, merge
from rae.store.zarr_shard import Shard, check_size, crc32c, file_sha256


@dataclass(frozen=True)
class Problem:
    """What is wrong with a file of the store and, where it is a latent, which: slot, view, key of the sample."""

    file: Path
    reason: str
    slot: int | None = None
    view: int | None = None
    key: str | None = None

    def __str__(self) -> str:
        latent = "" if self.slot is None else f", slot {self.slot}, view {self.view} (`{self.key}`)"
        return f"{self.file}{latent}: {self.reason}"


def verify(folder: Path, layout: LatentLayout, mode: Literal["quick", "full"]) -> list[Problem]:
    """Everything that is wrong with the store in `folder`; empty if it is whole.

    `quick` looks at sizes and holds the digests in the metadata against each other, a line per part. `full` reads
    every byte: the sha256 of each file against record and manifest, the crc32c of each latent where that fails, and
    statistics and index against the records.
    """
    try:
        lines = read_columns(folder / PARTS_FILE, PARTS_SCHEMA, PARTS_SCHEMA.names).to_pylist()
    except RaeError as error:
        return [Problem(folder / PARTS_FILE, error.message)]
    problems = [*_metadata_problems(folder, layout, lines), *_size_problems(folder, layout, lines)]
    problems += _manifest_problems(folder, layout, lines, full=mode == "full")
    if mode == "full":
        problems += _byte_problems(folder, layout, lines)
    return problems


def _metadata_problems(folder: Path, layout: LatentLayout, lines: list[dict[str, Any]]) -> Iterator[Problem]:
    for name, data in layout.metadata_files(len(lines) * layout.rows_per_part).items():
        if not (folder / name).exists() or (folder / name).read_bytes() != data:
            yield Problem(folder / name, f"does not describe {len(lines)} parts of these latents")
    content = content_digest(layout, [line["content"] for line in lines])
    for name, schema in ((INDEX_FILE, INDEX_SCHEMA), (PARTS_FILE, PARTS_SCHEMA)):
        try:
            claim = table_content(folder / name, schema)
        except RaeError as error:
            yield Problem(folder / name, error.message)
        else:
            if claim != content:
                yield Problem(folder / name, f"is of the content {claim}, the parts are of {content}")
    try:
        stats = LatentStats.load(folder / STATS_FILE)
    except RaeError as error:
        yield Problem(folder / STATS_FILE, error.message)
        return
    latents = sum(line["rows"] for line in lines) * layout.views
    if stats.mean.shape != layout.latent_shape or stats.count != latents:
        yield Problem(folder / STATS_FILE, f"is of {stats.count} latents {stats.mean.shape}, not of {latents}")


def _manifest_problems(
    folder: Path, layout: LatentLayout, lines: list[dict[str, Any]], full: bool
) -> Iterator[Problem]:
    """The manifest, once there is one, against the parts and, if `full`, against every file but the parts' own."""
    path = folder / "manifest.json"
    if not path.exists():
        return
    try:
        manifest = Manifest.from_json(path.read_bytes(), str(path))
    except RaeError as error:
        yield Problem(path, error.message)
        return
    content = content_digest(layout, [line["content"] for line in lines])
    if manifest.content != content:
        yield Problem(path, f"is of the content {manifest.content}, the parts are of {content}")
    shards = {layout.shard_key(line["part"]) for line in lines}
    for entry in manifest.files if full else ():
        file = folder / entry["path"]
        if entry["path"] not in shards and (not file.exists() or file_sha256(file) != entry["sha256"]):
            yield Problem(file, "does not match the manifest")


def _size_problems(folder: Path, layout: LatentLayout, lines: list[dict[str, Any]]) -> Iterator[Problem]:
    for line in lines:
        path = folder / layout.shard_key(line["part"])
        try:
            check_size(path, line["bytes"])
        except RaeError as error:
            yield Problem(path, error.message)
        for path in (record_path(folder, line["part"]), moments_path(folder, line["part"])):
            if not path.exists():
                yield Problem(path, "is missing")


def _byte_problems(folder: Path, layout: LatentLayout, lines: list[dict[str, Any]]) -> Iterator[Problem]:
    whole = True
    for line in lines:
        found = list(_part_problems(folder, layout, line))
        whole = whole and not found
        yield from found
    if whole:  # else statistics and index have nothing to be held against
        try:
            yield from _derived_problems(folder, layout, lines)
        except RaeError as error:
            yield Problem(folder, error.message)


def _part_problems(folder: Path, layout: LatentLayout, line: dict[str, Any]) -> Iterator[Problem]:
    path = record_path(folder, line["part"])
    try:
        record = PartRecord.load(folder, layout, _planned(line, layout))
    except RaeError as error:
        yield Problem(path, error.message)
        return
    listed = (line["bytes"], line["sha256"], line["rows"], line["content"])
    if (record.bytes, record.sha256, record.rows, record.content()) != listed:
        yield Problem(path, f"does not say what {PARTS_FILE} lists")
    moments = moments_path(folder, line["part"])
    if moments.exists() and file_sha256(moments) != record.statistics_sha256:
        yield Problem(moments, "does not match the digest in its record")
    yield from _shard_problems(folder, layout, record, line)


def _shard_problems(folder: Path, layout: LatentLayout, record: PartRecord, line: dict[str, Any]) -> Iterator[Problem]:
    path = folder / record.shard_key
    if not path.exists() or path.stat().st_size != line["bytes"]:
        return  # which is among the problems already
    if file_sha256(path) == line["sha256"]:
        return
    try:
        shard = Shard(path, layout.rows_per_part, layout.views, layout.latent_bytes)
    except RaeError as error:
        yield Problem(path, error.message)
        return
    damaged = 0
    valid = set(shard.valid_rows.tolist())
    for row, checksums in enumerate(record.row_crc32c):
        for view, checksum in enumerate(checksums or ()):
            if row not in valid or crc32c(shard.chunk(row, view)) != checksum:
                damaged += 1
                slot, key = record.part * layout.rows_per_part + row, record.index["key"][row]
                yield Problem(path, "the latent does not match its checksum", slot, view, key)
    if not damaged:
        yield Problem(path, "does not match its digest, though each latent matches its checksum")


def _derived_problems(folder: Path, layout: LatentLayout, lines: list[dict[str, Any]]) -> Iterator[Problem]:
    """Statistics and index, made again from the records."""
    parts = [_planned(line, layout) for line in lines]
    moments = merge(Moments.load(moments_path(folder, part.number)) for part in parts)
    if moments is None or not LatentStats.of(moments).identical(LatentStats.load(folder / STATS_FILE)):
        yield Problem(folder / STATS_FILE, "is not what the statistics of the parts give")
    records = (PartRecord.load(folder, layout, part) for part in parts)
    groups = index_groups(records, layout)
    try:
        index = open_table(folder / INDEX_FILE, INDEX_SCHEMA)
        for number, group in zip(range(index.num_row_groups), groups, strict=True):
            if not index.read_row_group(number).equals(group):
                yield Problem(folder / INDEX_FILE, f"row group {number} is not what the records say")
    except (ValueError, OSError, pa.ArrowException) as error:
        yield Problem(folder / INDEX_FILE, f"cannot be read whole ({error})")


def _planned(line: dict[str, Any], layout: LatentLayout) -> Part:
    first_slot = line["part"] * layout.rows_per_part
    return Part(line["part"], line["source_shard"], line["first_sample"], line["slots"], first_slot)
