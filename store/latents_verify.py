"""Finds what is wrong in a latent store, down to the row."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from rae.store.errors import CorruptData, MissingInput, RaeError
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
from rae.store.layout import ARRAY_FILE, STATS_FILE, LatentLayout, Part
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


def verify(folder: Path, mode: Literal["quick", "full"]) -> list[Problem]:
    """Everything that is wrong; empty if the store is whole.

    `quick` holds sizes and digests of the metadata against each other, a line per part. `full` reads every byte:
    sha256 of each file against its record, crc32c of each latent where that fails, statistics and index against the
    records. Raises `MissingInput` or `CorruptData` if the metadata cannot even be read.
    """
    try:
        metadata = json.loads((folder / ARRAY_FILE).read_bytes())
    except FileNotFoundError as error:
        raise MissingInput(f"{folder} holds no finished latents: {folder / ARRAY_FILE} is missing") from error
    except ValueError as error:
        raise CorruptData(f"{folder / ARRAY_FILE} is not JSON ({error})") from error
    layout, slots = LatentLayout.from_array_metadata(metadata, str(folder / ARRAY_FILE))
    lines = read_columns(folder / PARTS_FILE, PARTS_SCHEMA, PARTS_SCHEMA.names).to_pylist()
    problems = [*_metadata_problems(folder, layout, slots, lines), *_size_problems(folder, layout, lines)]
    if mode == "full":
        problems += _byte_problems(folder, layout, lines)
    return problems


def _metadata_problems(
    folder: Path, layout: LatentLayout, slots: int, lines: list[dict[str, Any]]
) -> Iterator[Problem]:
    if slots != len(lines) * layout.rows_per_part:
        yield Problem(folder / ARRAY_FILE, f"has {slots} slots for {len(lines)} parts of {layout.rows_per_part}")
    content = content_digest(layout, [line["content"] for line in lines])
    claims = {path: table_content(path) for path in (folder / INDEX_FILE, folder / PARTS_FILE) if path.exists()}
    manifest = folder / "manifest.json"
    if manifest.exists():
        claims[manifest] = json.loads(manifest.read_bytes()).get("content")
    yield from (
        Problem(path, f"is of the content {claim}, the parts of {content}")
        for path, claim in claims.items()
        if claim != content
    )
    try:
        index = open_table(folder / INDEX_FILE, INDEX_SCHEMA)
        if index.metadata.num_rows != slots:
            yield Problem(folder / INDEX_FILE, f"has {index.metadata.num_rows} rows for {slots} slots")
        stats = LatentStats.load(folder / STATS_FILE)
        latents = sum(line["rows"] for line in lines) * layout.views
        if stats.mean.shape != layout.latent_shape or stats.count != latents:
            yield Problem(folder / STATS_FILE, f"is of {stats.count} latents {stats.mean.shape}, not of {latents}")
    except RaeError as error:
        yield Problem(folder, error.message)


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
        yield from _derived_problems(folder, layout, lines)


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
    if moments.exists() and file_sha256(moments) != record.statistics["sha256"]:
        yield Problem(moments, "does not match the digest in its record")
    yield from _shard_problems(folder, layout, record, line)


def _shard_problems(folder: Path, layout: LatentLayout, record: PartRecord, line: dict[str, Any]) -> Iterator[Problem]:
    path = folder / record.shard_key
    if not path.exists() or file_sha256(path) == line["sha256"]:
        return  # a missing file is among the problems already
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
    if moments is not None and LatentStats.of(moments).to_bytes() != LatentStats.load(folder / STATS_FILE).to_bytes():
        yield Problem(folder / STATS_FILE, "is not what the parts' statistics give")
    try:
        index = open_table(folder / INDEX_FILE, INDEX_SCHEMA)
        records = (PartRecord.load(folder, layout, part) for part in parts)
        for number, group in enumerate(index_groups(records, layout)):
            if number >= index.num_row_groups or not index.read_row_group(number).equals(group):
                yield Problem(folder / INDEX_FILE, f"row group {number} is not what the records say")
    except (RaeError, pa.ArrowException, OSError) as error:
        yield Problem(folder / INDEX_FILE, f"cannot be read ({error})")


def _planned(line: dict[str, Any], layout: LatentLayout) -> Part:
    first_slot = line["part"] * layout.rows_per_part
    return Part(line["part"], line["source_shard"], line["first_sample"], line["slots"], first_slot)
