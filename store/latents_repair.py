"""Repairs a latent store: makes again what is damaged, and puts it in place only if it is what was published.

Everything is made beside the store and flushed to the disk first; a file is then replaced in one step, and only if it
does not match its digest and what replaces it does. So nothing good is ever lost, and a repair that is killed has
changed nothing or mended something. What is made from what:

    zarr.json files                the manifest
    parts.parquet                  all records
    a part's shards, record, sums  its rows whose checksums hold, and those rows encoded again that do not
    index.parquet, stats.npz       all records and sums
    boxes.npy                      the index
    what else the manifest lists   the encode's configuration
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, get_args

import numpy.typing as npt

from rae.store.compression import Compressor
from rae.store.crops import BOXES_FILE, CropLaw, record_boxes
from rae.store.errors import ConfigError, CorruptData, RaeError
from rae.store.latents_finish import finish, part_line, store_files, write_parts_table
from rae.store.latents_index import INDEX_FILE, INDEX_SCHEMA, PARTS_FILE, PARTS_SCHEMA, open_table, read_columns
from rae.store.latents_verify import Mode, planned, verify
from rae.store.latents_writer import PartWriter
from rae.store.layout import ARRAY_FILE, STATS_FILE, LatentLayout, Part
from rae.store.manifest import Manifest
from rae.store.part_record import COLUMNS, FOLDER, IndexRow, PartRecord, moments_path, record_path
from rae.store.publish import fsync_folder, make_folder, write_durably
from rae.store.stored_part import StoredPart, checksums
from rae.store.zarr_shard import file_sha256


@dataclass(frozen=True)
class EncodedRow:
    """A row, encoded again: its latent [V, C, H, W], or the reason why there is none, and what the index says of it."""

    latent: npt.NDArray[Any] | None
    reason: str | None
    entry: IndexRow


Encode = Callable[[Part, Sequence[int]], Iterable[EncodedRow]]
"""Encodes the given rows of a part, in order, as they were encoded first: in the same batches."""

Describe = Callable[[], Mapping[str, bytes]]
"""What the encode puts beside the latents (the encoder's description, names of classes), by path below the folder."""


class Repair:
    """The repair of one published store, of which `manifest` is whole."""

    def __init__(
        self, folder: Path, layout: LatentLayout, manifest: Manifest, encode: Encode, describe: Describe
    ) -> None:
        self._folder, self._layout, self._manifest = folder, layout, manifest
        self._encode, self._describe = encode, describe
        self._digests = {entry["path"]: entry["sha256"] for entry in manifest.files}

    def run(self, mode: Mode) -> list[Path]:
        """Mend what `verify` finds in this mode, and return the files that were replaced.

        Raises `CorruptData`, naming it, at the first thing that comes out different from what was published; what was
        mended before stays.
        """
        scratch = Path(mkdtemp(prefix=".repair-", dir=self._folder))
        try:
            replaced = [*self._metadata(scratch), *self._parts_table(scratch)]
            problems = verify(self._folder, self._layout, mode)
            for part in sorted({problem.part for problem in problems if problem.part is not None}):
                replaced += self._part(part, scratch / str(part))
                shutil.rmtree(scratch / str(part))
            return [*replaced, *self._derived(scratch), *self._boxes(scratch), *self._described(scratch)]
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def _whole(self, name: str) -> bool:
        path = self._folder / name
        return path.exists() and file_sha256(path) == self._digests.get(name)

    def _metadata(self, scratch: Path) -> Iterator[Path]:
        for name, data in self._layout.metadata_files(_slots(self._folder, self._layout)).items():
            if not self._whole(name):
                write_durably(scratch / "zarr.json", data)
                yield self._replace(scratch / "zarr.json", self._folder / name, self._digests.get(name))

    def _parts_table(self, scratch: Path) -> Iterator[Path]:
        if self._whole(PARTS_FILE):
            return
        sources = self._manifest.recipe["source"]
        records = (PartRecord.load(self._folder, self._layout, part) for part in _recorded(self._folder, self._layout))
        lines = [part_line(self._folder, record, sources) for record in records]
        write_parts_table(scratch / PARTS_FILE, lines, self._manifest.content)
        yield self._replace(scratch / PARTS_FILE, self._folder / PARTS_FILE, self._digests.get(PARTS_FILE))

    def _derived(self, scratch: Path) -> Iterator[Path]:
        """Index and statistics, which follow from the parts."""
        damaged = [name for name in (INDEX_FILE, STATS_FILE) if not self._whole(name)]
        if not damaged:
            return
        parts = list(_recorded(self._folder, self._layout))
        make_folder(scratch / "store")
        finish(self._folder, self._layout, parts, self._manifest.recipe["source"], into=scratch / "store")
        for name in damaged:
            yield self._replace(scratch / "store" / name, self._folder / name, self._digests.get(name))

    def _boxes(self, scratch: Path) -> Iterator[Path]:
        """Where crops lie, which follows from the index."""
        if BOXES_FILE not in self._digests or self._whole(BOXES_FILE):
            return
        law = CropLaw(*(self._manifest.config["encode"][key] for key in ("seed", "resize_size", "image_size")))
        parts, sources = list(_recorded(self._folder, self._layout)), self._manifest.recipe["source"]
        made = record_boxes(self._folder, self._layout, parts, sources, law, into=scratch)
        yield self._replace(made, self._folder / BOXES_FILE, self._digests[BOXES_FILE])

    def _described(self, scratch: Path) -> Iterator[Path]:
        """What the encode put beside the latents, which no record tells."""
        others = self._digests.keys() - set(store_files(self._layout))
        damaged = sorted(name for name in others if not self._whole(name))
        made = self._describe() if damaged else {}
        for name in damaged:
            write_durably(scratch / "description", made.get(name, b""))
            yield self._replace(scratch / "description", self._folder / name, self._digests[name])

    def _part(self, number: int, scratch: Path) -> Iterator[Path]:
        """Write a part anew beside the store, and replace its damaged files if that gives the bits that they had."""
        line = self._line(number)
        part = planned(line, self._layout)
        with PartWriter(scratch, self._layout, part) as writer:
            _fill(
                writer, part, _KeptRows(self._folder, self._layout, part, line, self._whole(INDEX_FILE)), self._encode
            )
            writer.publish()
        names = [*self._layout.shard_keys(number), *(str(path(Path(), number)) for path in (record_path, moments_path))]
        digests = [file_sha256(scratch / name) for name in names]
        listed = [line[key] for key in ("sha256", "scales_sha256", "record_sha256") if line[key] is not None]
        if digests[: len(listed)] != listed:
            raise CorruptData(
                f"part {number} of {self._folder}, made again, is not what was published; nothing of it was changed:"
                " another device, number of threads or version of a library gives other last bits"
            )
        for name, digest in zip(names, digests, strict=True):
            target = self._folder / name
            if not target.exists() or file_sha256(target) != digest:
                yield self._replace(scratch / name, target, digest)

    def _line(self, number: int) -> dict[str, Any]:
        table = read_columns(self._folder / PARTS_FILE, PARTS_SCHEMA, PARTS_SCHEMA.names)
        line: dict[str, Any] = table.slice(number, 1).to_pylist()[0]
        return line

    def _replace(self, made: Path, target: Path, digest: str | None) -> Path:
        """Put a file that lies on the disk, whole, in the place of a damaged one."""
        if file_sha256(made) != digest:
            raise CorruptData(
                f"{target} is damaged, and what can be made in its place is not what was published;"
                " nothing of it was changed"
            )
        make_folder(target.parent)
        os.replace(made, target)
        fsync_folder(target.parent)
        return target


def published_layout(folder: Path, manifest: Manifest) -> LatentLayout:
    """The layout of a published store, as its metadata or, where that is damaged, its manifest tells it."""
    with suppress(RaeError):
        return LatentLayout.load(folder)[0]
    try:
        encode, (channels, height, width) = manifest.config["encode"], manifest.metrics["shape"]
        views = int(manifest.metrics["views"])
        rows_per_part = encode["rows_per_part"] or LatentLayout.default_rows_per_part(views)
        sizes = (views, channels, height, width, rows_per_part)
        digests = {entry["path"]: entry["sha256"] for entry in manifest.files}
        for compressor in get_args(Compressor):
            layout = LatentLayout(*sizes, encode["dtype"], compressor, "crops" if encode.get("crops") else "flips")
            metadata = layout.metadata_files(_slots(folder, layout))
            if hashlib.sha256(metadata[ARRAY_FILE]).hexdigest() == digests[ARRAY_FILE]:
                return layout
    except (KeyError, TypeError, ValueError, ConfigError) as error:
        raise CorruptData(
            f"{folder / ARRAY_FILE} is damaged, and the manifest does not replace it ({error})"
        ) from error
    raise CorruptData(f"{folder / ARRAY_FILE} is damaged, and can't be told from the manifest and the records")


class _KeptRows:
    """The rows of a damaged part that can be told to be whole.

    What is known of a row comes from the part's record or, where that is damaged, from the index; its latent from the
    part's shards, if its checksum holds or all of their bytes do.
    """

    def __init__(self, folder: Path, layout: LatentLayout, part: Part, line: dict[str, Any], index_whole: bool) -> None:
        self.entries: dict[str, list[Any]] | None = None
        self._checksums: list[list[int] | None] | None = None
        self._stored: StoredPart | None = None
        record = record_path(folder, part.number)
        if record.exists() and file_sha256(record) == line["record_sha256"]:
            found = PartRecord.load(folder, layout, part)
            self.entries, self._checksums = found.index, found.row_crc32c
        elif index_whole:
            self.entries = _indexed(folder, part)
        with suppress(RaeError):
            self._stored = StoredPart(folder, layout, part.number)
        shards = [folder / key for key in layout.shard_keys(part.number)]
        listed = [line[key] for key in ("sha256", "scales_sha256") if line[key] is not None]
        self._all_whole = self._stored is not None and [file_sha256(path) for path in shards] == listed

    def stored(self, row: int) -> tuple[npt.NDArray[Any], ...] | None:
        """What is stored of a valid row; None if it is damaged."""
        if self._stored is None or row not in self._stored.valid_rows:
            return None
        try:
            stored = self._stored.row(row)
        except CorruptData:
            return None
        expected = self._checksums[row] if self._checksums is not None else None
        return stored if self._all_whole or checksums(stored) == expected else None

    def missing(self, count: int) -> list[int]:
        """Rows that must be encoded again."""
        if self.entries is None:
            return list(range(count))
        reasons = self.entries["reason"]
        return [row for row in range(count) if reasons[row] is None and self.stored(row) is None]


def _fill(writer: PartWriter, part: Part, kept: _KeptRows, encode: Encode) -> None:
    missing = kept.missing(part.count)
    again, to_encode = iter(encode(part, missing) if missing else ()), set(missing)
    for row in range(part.count):
        if row in to_encode:
            encoded = next(again)
            if encoded.latent is None:
                writer.invalid(row, str(encoded.reason), **encoded.entry)
            else:
                writer.write(row, encoded.latent, **encoded.entry)
            continue
        assert kept.entries is not None  # else all rows are missing, and encoded
        values = {column: kept.entries[column][row] for column in COLUMNS}
        reason, sha256 = values.pop("reason"), values.pop("image_sha256")
        entry: IndexRow = {**values, "sha256": sha256}  # type: ignore[typeddict-item]
        if reason is not None:
            writer.invalid(row, reason, **entry)
        elif (stored := kept.stored(row)) is not None:
            writer.write_stored(row, stored, **entry)
        else:
            raise CorruptData(f"row {row} of part {part.number} changes while it is repaired")


def _indexed(folder: Path, part: Part) -> dict[str, list[Any]]:
    """The lines of `index.parquet` that belong to a part, by column."""
    file = open_table(folder / INDEX_FILE, INDEX_SCHEMA)
    first = 0
    for group in range(file.num_row_groups):
        rows = file.metadata.row_group(group).num_rows
        if first <= part.first_slot < first + rows:
            table = file.read_row_group(group, columns=list(COLUMNS)).slice(part.first_slot - first, part.count)
            return {column: table[column].to_pylist() for column in COLUMNS}
        first += rows
    raise CorruptData(f"{folder / INDEX_FILE} has no line for part {part.number}")


def _slots(folder: Path, layout: LatentLayout) -> int:
    return layout.rows_per_part * sum(1 for _ in (folder / FOLDER).glob("*.json"))


def _recorded(folder: Path, layout: LatentLayout) -> Iterator[Part]:
    """The plan of a store as its records tell it, for when `parts.parquet` can't."""
    for path in sorted((folder / FOLDER).glob("*.json"), key=lambda path: int(path.stem)):
        try:
            value = json.loads(path.read_bytes())
            number = int(value["part"])
            place = (number, int(value["source_shard"]), int(value["first_sample"]), int(value["slots"]))
        except (ValueError, KeyError, TypeError) as error:
            raise CorruptData(f"{path} is damaged too, and {PARTS_FILE} can't be made again without it") from error
        yield Part(*place, first_slot=number * layout.rows_per_part)
