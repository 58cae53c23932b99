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
from typing import Any, BinaryIO, Self, Unpack

import numpy as np
import numpy.typing as npt

from rae.store.errors import CorruptData, PartialResult
from rae.store.layout import LatentLayout, Part
from rae.store.part_record import COLUMNS, FOLDER, IndexRow, PartRecord, moments_path, record_path
from rae.store.publish import make_folder, publish_bytes, publish_file, temporary_name
from rae.store.stats import Moments, RunningStats
from rae.store.zarr_shard import Shard, ShardWriter, crc32c, file_sha256

_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class PartWriter:
    """Takes the rows of one part in order; every row gets either a latent or a reason why it has none.

    As a context manager it drops, at the end of the block, what was not published. A full disk raises
    `PartialResult`; the parts recorded before stay.
    """

    def __init__(self, folder: Path, layout: LatentLayout, part: Part) -> None:
        self._folder = folder
        self._layout = layout
        self._part = part
        self._target = folder / layout.shard_key(part.number)
        self._temporary = temporary_name(folder / FOLDER / f"{part.number:06d}.shard")
        self._stats = RunningStats(layout.latent_shape)
        self._checksums: list[list[int] | None] = []
        self._index: dict[str, list[Any]] = {column: [] for column in COLUMNS}
        self._file: BinaryIO | None = None
        with self._naming_a_full_disk():
            make_folder(self._temporary.parent)
            make_folder(self._target.parent)
            self._file = open(self._temporary, "xb")  # noqa: SIM115 - closed by `publish` or `abort`
        self._shard = ShardWriter(self._file, layout.rows_per_part * layout.views)

    def write(self, row: int, latent: npt.NDArray[Any], **entry: Unpack[IndexRow]) -> bool:
        """Store the views [V, C, H, W] of the part's row number `row`, converted to the stored dtype.

        A latent that is not finite in that dtype becomes an invalid row. Returns whether the row is valid. float16 in
        is cheapest for float16: numpy's conversion costs more than all the rest of this call.
        """
        if latent.shape != self._layout.row_shape:
            raise ValueError(f"a row is [V, C, H, W] = {self._layout.row_shape}, got {latent.shape}")
        with np.errstate(over="ignore"):
            stored = np.ascontiguousarray(latent, dtype=self._layout.stored_dtype)
        if not _all_finite(stored):
            self.invalid(row, f"the latent is not finite in {self._layout.dtype}", **entry)
            return False
        self._note(row, entry, None, [crc32c(view) for view in stored])
        with self._naming_a_full_disk():
            for view, values in enumerate(stored):
                self._shard.append(row * self._layout.views + view, values)
        for values in stored:
            self._stats.add(values)
        return True

    def invalid(self, row: int, reason: str, **entry: Unpack[IndexRow]) -> None:
        """Record that the part's row number `row` has no latent, and why."""
        self._note(row, entry, reason, None)

    def _note(self, row: int, entry: IndexRow, reason: str | None, checksums: list[int] | None) -> None:
        if row != len(self._checksums) or row >= self._part.count:
            raise ValueError(f"row {row} of part {self._part.number} came in place of row {len(self._checksums)}")
        self._checksums.append(checksums)
        values = (entry["key"], entry["label"], entry["sha256"], entry["width"], entry["height"], reason)
        for column, value in zip(COLUMNS, values, strict=True):
            self._index[column].append(value)

    def publish(self) -> PartRecord:
        """Make the part durable and known to every reader; returns its record, which may be another writer's."""
        if len(self._checksums) != self._part.count:
            raise ValueError(f"part {self._part.number} has {self._part.count} rows, got {len(self._checksums)}")
        try:
            with self._naming_a_full_disk():
                sha256 = self._shard.finish()
                if not self._recorded():
                    self._publish_files(sha256)
                return PartRecord.load(self._folder, self._layout, self._part)
        finally:
            self.abort()

    def abort(self) -> None:
        """Drop what was written."""
        with suppress(OSError):  # closing flushes, and the disk may be full
            if self._file is not None:
                self._file.close()
        self._temporary.unlink(missing_ok=True)

    def _recorded(self) -> bool:
        return record_path(self._folder, self._part.number).exists()

    def _publish_files(self, sha256: str) -> None:
        moments = self._stats.moments()
        try:
            if not publish_file(self._temporary, self._target):
                sha256, moments = self._adopt(sha256, moments)
            self._publish_record(sha256, moments)
        except FileNotFoundError:
            # `finish` of another process swept a temporary file away, which it does once all parts are recorded.
            if not self._recorded():
                raise

    def _adopt(self, sha256: str, moments: Moments) -> tuple[str, Moments]:
        """Hash the file that has the part's name; where its values are not ours (another device), take them over."""
        found = file_sha256(self._target)
        if found == sha256:
            return sha256, moments
        shard = Shard(self._target, self._layout.rows_per_part, self._layout.views, self._layout.latent_bytes)
        ours = [row for row, checksums in enumerate(self._checksums) if checksums is not None]
        if shard.valid_rows.tolist() != ours:
            raise CorruptData(
                f"{self._target} is there without a record and holds other rows than its source gives;"
                " move it away and run again"
            )
        stats = RunningStats(self._layout.latent_shape)
        for row in ours:
            views = [shard.chunk(row, view) for view in range(self._layout.views)]
            self._checksums[row] = [crc32c(view) for view in views]
            for view in views:
                stats.add(view.view(self._layout.stored_dtype).reshape(self._layout.latent_shape))
        return found, stats.moments()

    def _publish_record(self, sha256: str, moments: Moments) -> None:
        path = moments_path(self._folder, self._part.number)
        if not publish_bytes(path, moments.to_bytes()) and not Moments.load(path).identical(moments):
            raise CorruptData(f"{path} is there and does not hold the statistics of {self._target}; move it away")
        record = PartRecord(
            part=self._part.number,
            source_shard=self._part.source_shard,
            first_sample=self._part.first_sample,
            slots=self._part.count,
            shard_key=self._layout.shard_key(self._part.number),
            bytes=self._target.stat().st_size,
            sha256=sha256,
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


def _all_finite(values: npt.NDArray[Any]) -> bool:
    """`np.isfinite(values).all()`, twenty times faster for float16: an exponent of all ones is inf or NaN."""
    bits = values.view(f"<u{values.dtype.itemsize}")
    exponent = bits.dtype.type(0x7C00 if values.dtype.itemsize == 2 else 0x7F80_0000)
    return bool((bits & exponent).max() != exponent)
