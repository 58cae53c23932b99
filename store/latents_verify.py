"""Finds what is wrong in a latent store, down to the row."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from rae.store.errors import CorruptData, RaeError
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
from rae.store.stored_part import StoredPart, checksums
from rae.store.zarr_shard import check_size, file_sha256

Mode = Literal["quick", "sampled", "full"]

_SAMPLED_PARTS = 32


@dataclass(frozen=True)
class Problem:
    """What is wrong with a file of the store: of which part and, where it is a latent, its slot, view and key."""

    file: Path
    reason: str
    part: int | None = None
    slot: int | None = None
    view: int | None = None
    key: str | None = None

    def __str__(self) -> str:
        view = "" if self.view is None else f", view {self.view}"
        latent = "" if self.slot is None else f", slot {self.slot}{view} (`{self.key}`)"
        return f"{self.file}{latent}: {self.reason}"


def verify(folder: Path, layout: LatentLayout, mode: Mode) -> list[Problem]:
    """Everything that is wrong with the store in `folder`; empty if it is whole.

    `quick` looks at sizes and holds the digests in the metadata against each other, a line per part. `full` reads
    every byte: the sha256 of each file against the manifest, `parts.parquet` and the records, the crc32c of each
    latent where that fails, and statistics and index against the records. `sampled` is `quick`, and reads every byte
    of 32 parts, others each time.
    """
    try:
        lines = read_columns(folder / PARTS_FILE, PARTS_SCHEMA, PARTS_SCHEMA.names).to_pylist()
    except RaeError as error:
        return [Problem(folder / PARTS_FILE, error.message)]
    problems = [*_metadata_problems(folder, layout, lines), *_size_problems(folder, layout, lines)]
    problems += _manifest_problems(folder, layout, lines, full=mode == "full")
    if mode == "sampled":
        drawn = random.sample(lines, min(_SAMPLED_PARTS, len(lines)))
        problems += [problem for line in drawn for problem in _part_problems(folder, layout, line)]
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
    """The manifest, once there is one, against the parts and, if `full`, against the files of the whole store."""
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
    for entry in manifest.files:
        file = folder / entry["path"]
        if not file.exists():
            yield Problem(file, "is missing")
        elif file.stat().st_size != entry["bytes"] or (full and file_sha256(file) != entry["sha256"]):
            yield Problem(file, "does not match the manifest")


def _size_problems(folder: Path, layout: LatentLayout, lines: list[dict[str, Any]]) -> Iterator[Problem]:
    inside = folder.resolve()
    for line in lines:
        for path, size, _ in _listed_shards(folder, layout, line):
            if not path.resolve().is_relative_to(inside):
                yield Problem(path, "is a link that leads out of the store", line["part"])
                continue
            if size is None:
                yield Problem(folder / PARTS_FILE, f"says nothing of {path}", line["part"])
                continue
            try:
                check_size(path, size)
            except RaeError as error:
                yield Problem(path, error.message, line["part"])
        for path in (record_path(folder, line["part"]), moments_path(folder, line["part"])):
            if not path.exists():
                yield Problem(path, "is missing", line["part"])


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
    if not path.exists():
        return  # which is among the problems already
    try:
        record = PartRecord.load(folder, layout, planned(line, layout))
    except RaeError as error:
        yield Problem(path, error.message, line["part"])
        return
    if file_sha256(path) != line["record_sha256"]:
        yield Problem(path, f"does not match the digest in {PARTS_FILE}", line["part"])
        return
    moments = moments_path(folder, line["part"])
    if moments.exists() and file_sha256(moments) != record.statistics_sha256:
        yield Problem(moments, "does not match the digest in its record", line["part"])
    yield from _shard_problems(folder, layout, record, line)


def _shard_problems(folder: Path, layout: LatentLayout, record: PartRecord, line: dict[str, Any]) -> Iterator[Problem]:
    files = _listed_shards(folder, layout, line)
    if any(not path.exists() or path.stat().st_size != size for path, size, _ in files):
        return  # which is among the problems already
    damaged = [path for path, _, sha256 in files if file_sha256(path) != sha256]
    if not damaged:
        return
    latents = list(_latent_problems(folder, layout, record, damaged[0]))
    if not latents:
        for path in damaged:
            yield Problem(path, "does not match its digest, though each latent matches its checksum", line["part"])
    yield from latents


def _latent_problems(folder: Path, layout: LatentLayout, record: PartRecord, damaged: Path) -> Iterator[Problem]:
    """The latents that do not match their checksums, in a part of which the file `damaged` differs."""
    try:
        stored = StoredPart(folder, layout, record.part)
    except RaeError as error:
        yield Problem(damaged, error.message, record.part)
        return
    valid = set(stored.valid_rows.tolist())
    for row, expected in enumerate(record.row_crc32c):
        slot, key = record.part * layout.rows_per_part + row, record.index["key"][row]
        try:
            found = checksums(stored.row(row)) if row in valid else [None] * layout.views
        except CorruptData as error:
            yield Problem(damaged, error.message, record.part, slot, None, key)
            continue
        for view, checksum in enumerate(expected or ()):
            if found[view] != checksum:
                yield Problem(damaged, "the latent does not match its checksum", record.part, slot, view, key)


def _listed_shards(folder: Path, layout: LatentLayout, line: dict[str, Any]) -> list[tuple[Path, int | None, str]]:
    """A part's shards, with the bytes and the sha256 that the table of parts has for each; None where it has none."""
    columns = {"latents": ("bytes", "sha256"), "scales": ("scales_bytes", "scales_sha256")}
    number = line["part"]
    return [
        (folder / layout.shard_key(number, array.name), *(line[column] for column in columns[array.name]))
        for array in layout.arrays
    ]


def _derived_problems(folder: Path, layout: LatentLayout, lines: list[dict[str, Any]]) -> Iterator[Problem]:
    """Statistics and index, made again from the records."""
    parts = [planned(line, layout) for line in lines]
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
    except (RaeError, ValueError, OSError, pa.ArrowException) as error:
        yield Problem(folder / INDEX_FILE, f"cannot be read whole ({error})")


def planned(line: dict[str, Any], layout: LatentLayout) -> Part:
    first_slot = line["part"] * layout.rows_per_part
    return Part(line["part"], line["source_shard"], line["first_sample"], line["slots"], first_slot)
