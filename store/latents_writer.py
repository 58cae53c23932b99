"""Writes the parts of a latent store, in any order and by any number of processes.

A part is streamed into a file without a name that readers know, flushed, published under its name if the name is
free, and then recorded. Whoever comes second adopts what is there. Nothing that has a name is ever overwritten, so no
lock is needed, and a process that dies leaves nothing but temporary files.
"""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self, Unpack

import numpy.typing as npt

from rae.store.compression import compress
from rae.store.errors import CorruptData, PartialResult
from rae.store.layout import LatentLayout, Part
from rae.store.part_record import COLUMNS, FOLDER, IndexRow, PartRecord, is_recorded, moments_path, record_path
from rae.store.publish import make_folder, publish_bytes, publish_file, temporary_name
from rae.store.stats import Moments, RunningStats
from rae.store.stored_part import StoredPart, checksums
from rae.store.zarr_shard import ShardWriter, file_sha256

_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class _ShardFile:
    """A part's shard in one array, under the temporary name that it is written with."""

    def __init__(self, temporary: Path, target: Path, chunks: int) -> None:
        self.temporary, self.target = temporary, target
        make_folder(temporary.parent)
        make_folder(target.parent)
        self._file = open(temporary, "xb")  # noqa: SIM115 - closed by `finish` or `abort`
        self._shard = ShardWriter(self._file, chunks)
        self.append = self._shard.append
        self.finish = self._shard.finish

    def abort(self) -> None:
        with suppress(OSError):  # closing flushes, and the disk may be full
            self._file.close()
        self.temporary.unlink(missing_ok=True)


class PartWriter:
    """Takes the rows of one part in order; every row gets either a latent or a reason why it has none.

    As a context manager it drops, at the end of the block, what was not published. A full disk raises
    `PartialResult`; the parts recorded before stay.
    """

    def __init__(self, folder: Path, layout: LatentLayout, part: Part) -> None:
        self._folder = folder
        self._layout = layout
        self._part = part
        self._stats = RunningStats(layout.latent_shape)
        self._checksums: list[list[int] | None] = []
        self._index: dict[str, list[Any]] = {column: [] for column in COLUMNS}
        self._shards: list[_ShardFile] = []
        with self._naming_a_full_disk():
            for array in layout.arrays:
                temporary = temporary_name(folder / FOLDER / f"{part.number:06d}.{array.name}")
                target = folder / layout.shard_key(part.number, array.name)
                self._shards.append(_ShardFile(temporary, target, layout.rows_per_part * layout.views))

    def write(self, row: int, latent: npt.NDArray[Any], **entry: Unpack[IndexRow]) -> bool:
        """Store the views [V, C, H, W] of the part's row number `row`, converted to the store's number format.

        A latent that is not finite in that format becomes an invalid row. Returns whether the row is valid.
        """
        if latent.shape != self._layout.row_shape:
            raise ValueError(f"a row is [V, C, H, W] = {self._layout.row_shape}, got {latent.shape}")
        stored = self._layout.encode(latent)
        if stored is None:
            self.invalid(row, f"the latent is not finite in {self._layout.dtype}", **entry)
            return False
        self.write_stored(row, stored, **entry)
        return True

    def write_stored(self, row: int, stored: tuple[npt.NDArray[Any], ...], **entry: Unpack[IndexRow]) -> None:
        """Store a row that is in the store's number format already: its views [V, ...] per array."""
        self._note(row, entry, None, checksums(stored))
        with self._naming_a_full_disk():
            for shard, views in zip(self._shards, stored, strict=True):
                for view, values in enumerate(views):
                    shard.append(row * self._layout.views + view, compress(self._layout.compressor, values))
        for latent in self._layout.decode(stored):
            self._stats.add(latent)

    def invalid(self, row: int, reason: str, **entry: Unpack[IndexRow]) -> None:
        """Record that the part's row number `row` has no latent, and why."""
        self._note(row, entry, reason, None)

    def _note(self, row: int, entry: IndexRow, reason: str | None, row_checksums: list[int] | None) -> None:
        if row != len(self._checksums) or row >= self._part.count:
            raise ValueError(f"row {row} of part {self._part.number} came in place of row {len(self._checksums)}")
        self._checksums.append(row_checksums)
        values = (entry["key"], entry["label"], entry["sha256"], entry["width"], entry["height"], reason)
        for column, value in zip(COLUMNS, values, strict=True):
            self._index[column].append(value)

    def publish(self) -> PartRecord:
        """Make the part durable and known to every reader; returns its record, which may be another writer's."""
        if len(self._checksums) != self._part.count:
            raise ValueError(f"part {self._part.number} has {self._part.count} rows, got {len(self._checksums)}")
        try:
            with self._naming_a_full_disk():
                digests = [shard.finish() for shard in self._shards]
                if not self._recorded():
                    self._publish_files(digests)
                return PartRecord.load(self._folder, self._layout, self._part)
        finally:
            self.abort()

    def abort(self) -> None:
        """Drop what was written."""
        for shard in self._shards:
            shard.abort()

    def _recorded(self) -> bool:
        return is_recorded(self._folder, self._part.number)

    def _publish_files(self, digests: list[str]) -> None:
        moments = self._stats.moments()
        try:
            # All of them, whoever was first: what is recorded is what lies there.
            created = [publish_file(shard.temporary, shard.target) for shard in self._shards]
            if not all(created):
                found = [file_sha256(shard.target) for shard in self._shards]
                if found != digests:
                    digests, moments = found, self._adopt()
            self._publish_record(digests, moments)
        except FileNotFoundError:
            # `finish` of another process swept a temporary file away, which it does once all parts are recorded.
            if not self._recorded():
                raise

    def _adopt(self) -> Moments:
        """Take over the values that lie there under the part's names and are not ours: another device made them.

        Scales of one device with the codes of another differ from either by what the devices differ, in last bits.
        """
        there = StoredPart(self._folder, self._layout, self._part.number)
        ours = [row for row, row_checksums in enumerate(self._checksums) if row_checksums is not None]
        if there.valid_rows.tolist() != ours:
            raise CorruptData(
                f"{self._shards[0].target} is there without a record and holds other rows than its source gives;"
                " move it away and run again"
            )
        stats = RunningStats(self._layout.latent_shape)
        for row in ours:
            stored = there.row(row)
            self._checksums[row] = checksums(stored)
            for latent in self._layout.decode(stored):
                stats.add(latent)
        return stats.moments()

    def _publish_record(self, digests: list[str], moments: Moments) -> None:
        path = moments_path(self._folder, self._part.number)
        if not publish_bytes(path, moments.to_bytes()) and not Moments.load(path).identical(moments):
            raise CorruptData(
                f"{path} is there and does not hold the statistics of {self._shards[0].target}; move it away"
            )
        sizes = [shard.target.stat().st_size for shard in self._shards]
        has_scales = len(self._shards) > 1
        record = PartRecord(
            part=self._part.number,
            source_shard=self._part.source_shard,
            first_sample=self._part.first_sample,
            slots=self._part.count,
            shard_key=self._layout.shard_key(self._part.number),
            bytes=sizes[0],
            sha256=digests[0],
            scales_bytes=sizes[1] if has_scales else None,
            scales_sha256=digests[1] if has_scales else None,
            compressor=self._layout.compressor,
            statistics=str(path.relative_to(self._folder)),
            statistics_sha256=file_sha256(path),
            row_crc32c=self._checksums,
            index=self._index,
        )
        publish_bytes(record_path(self._folder, self._part.number), record.to_json().encode())

    @contextmanager
    def _naming_a_full_disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in _DISK_FULL:
                raise
            self.abort()
            free = shutil.disk_usage(self._folder).free
            raise PartialResult(
                f"no room for part {self._part.number} in {self._folder} ({error.strerror}, {free / 1e6:.0f} MB free);"
                " the parts before it are kept"
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.abort()
