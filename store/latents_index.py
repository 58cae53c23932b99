"""The two tables of a latent store: `index.parquet`, a line per slot, and `parts.parquet`, a line per part.

`parts.parquet` is what a reader opens: it says how many rows lie in which part without a walk over rows or records.
Both are written as streams from the parts' records, with fixed options, and carry the store's content digest in their
metadata under `rae.content`.
"""

import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from rae.store.errors import CorruptData, MissingInput
from rae.store.layout import LatentLayout
from rae.store.part_record import PartRecord
from rae.store.publish import publish_file, temporary_name

INDEX_FILE = "index.parquet"
PARTS_FILE = "parts.parquet"
PADDING = "padding"
SLOTS_PER_GROUP = 65_536
CONTENT_KEY = b"rae.content"

INDEX_SCHEMA = pa.schema(
    [
        pa.field("slot", pa.int64(), nullable=False),
        pa.field("key", pa.string()),
        pa.field("label", pa.int64()),
        pa.field("source_shard", pa.int32(), nullable=False),
        pa.field("image_sha256", pa.string()),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("valid", pa.bool_(), nullable=False),
        pa.field("reason", pa.string()),
    ]
)
PARTS_SCHEMA = pa.schema(
    [
        pa.field("part", pa.int32(), nullable=False),
        pa.field("source_shard", pa.int32(), nullable=False),
        pa.field("source_sha256", pa.string(), nullable=False),
        pa.field("first_sample", pa.int64(), nullable=False),
        pa.field("slots", pa.int32(), nullable=False),
        pa.field("rows", pa.int32(), nullable=False),
        pa.field("bytes", pa.int64(), nullable=False),
        pa.field("sha256", pa.string(), nullable=False),
        pa.field("scales_bytes", pa.int64()),  # of int8 latents alone, as `scales_sha256`
        pa.field("scales_sha256", pa.string()),
        pa.field("record_sha256", pa.string(), nullable=False),
        pa.field("content", pa.string(), nullable=False),
    ]
)


def index_table(record: PartRecord, layout: LatentLayout) -> pa.Table:
    """The R index rows of one part, padding included."""
    slots, padding = layout.rows_per_part, layout.rows_per_part - record.slots
    columns: dict[str, Any] = {name: values + [None] * padding for name, values in record.index.items()}
    columns["reason"] = record.index["reason"] + [PADDING] * padding
    columns["slot"] = np.arange(slots) + record.part * slots
    columns["source_shard"] = np.full(slots, record.source_shard)
    columns["valid"] = np.array([checksums is not None for checksums in record.row_crc32c] + [False] * padding)
    try:
        return pa.table([pa.array(columns[field.name], field.type) for field in INDEX_SCHEMA], schema=INDEX_SCHEMA)
    except (pa.ArrowException, TypeError, OverflowError) as error:
        raise CorruptData(f"the record of part {record.part} holds a value that the index cannot ({error})") from error


def index_groups(records: Iterable[PartRecord], layout: LatentLayout) -> Iterator[pa.Table]:
    """The tables of `index.parquet`'s row groups: a fixed number of whole parts each."""
    parts_per_group = max(1, SLOTS_PER_GROUP // layout.rows_per_part)
    remaining = iter(records)
    while group := list(itertools.islice(remaining, parts_per_group)):
        yield pa.concat_tables(index_table(record, layout) for record in group).combine_chunks()


def parts_table(lines: Sequence[dict[str, Any]]) -> pa.Table:
    """`parts.parquet` from one dict per part."""
    return pa.Table.from_pylist(list(lines), schema=PARTS_SCHEMA)


class TableWriter:
    """Writes one of the tables under a temporary name; `publish` gives it its own if no other writer was first."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._path = path
        self._schema = schema
        self._temporary = temporary_name(path)
        self._writer = pq.ParquetWriter(self._temporary, schema, compression="zstd", version="2.6")

    def write(self, table: pa.Table) -> None:
        """Append one row group."""
        self._writer.write_table(table, row_group_size=max(1, table.num_rows))

    def publish(self, content: str) -> None:
        """Make the table durable and known; `CorruptData` if a table of another content has the name."""
        self._writer.add_key_value_metadata({CONTENT_KEY.decode(): content})
        self._writer.close()
        try:
            with open(self._temporary, "rb+") as file:
                os.fsync(file.fileno())
            created = publish_file(self._temporary, self._path)
        except FileNotFoundError:  # swept away by another process, which has finished
            created = False
        if not created and table_content(self._path, self._schema) != content:
            raise CorruptData(f"{self._path} is there already and belongs to other latents than the parts beside it")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._writer.close()
        self._temporary.unlink(missing_ok=True)


def open_table(path: Path, schema: pa.Schema) -> pq.ParquetFile:
    """A table open for reading; `MissingInput` or `CorruptData` names the file."""
    try:
        file = pq.ParquetFile(path)
        found = file.schema_arrow
    except FileNotFoundError as error:
        raise MissingInput(f"the table {path} is missing") from error
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # the last for a column's name
        raise CorruptData(f"the table {path} cannot be read ({error})") from error
    if not found.equals(schema):
        raise CorruptData(f"{path} does not have the columns of a latent store")
    return file


def table_content(path: Path, schema: pa.Schema) -> str:
    """The content digest that a table carries; `MissingInput` or `CorruptData` names the file."""
    metadata = open_table(path, schema).metadata.metadata or {}
    return str(metadata.get(CONTENT_KEY, b"").decode(errors="replace"))


def read_columns(path: Path, schema: pa.Schema, columns: Sequence[str]) -> pa.Table:
    """Some columns of a table; `MissingInput` or `CorruptData` names the file."""
    file = open_table(path, schema)
    try:
        table = file.read(columns=list(columns))
        table.validate(full=True)
        return table
    except (pa.ArrowException, OSError) as error:
        raise CorruptData(f"the table {path} is damaged ({error})") from error


class ValidRows:
    """The index by row, a row group at a time: memory holds what is asked for, and 32 groups.

    `first_row` [parts + 1] says how many valid rows lie before each part. `CorruptData` if the index has others.
    """

    def __init__(self, path: Path, layout: LatentLayout, first_row: npt.NDArray[np.int64]) -> None:
        self._path, self._file = path, open_table(path, INDEX_SCHEMA)
        parts_per_group = max(1, SLOTS_PER_GROUP // layout.rows_per_part)
        self._begins = np.append(first_row[:-1:parts_per_group], first_row[-1])
        self.groups = self._begins.size - 1
        slots = (first_row.size - 1) * layout.rows_per_part
        metadata = self._file.metadata
        if (metadata.num_rows, metadata.num_row_groups) != (slots, self.groups):
            raise CorruptData(f"{path} has {metadata.num_rows} lines, and {PARTS_FILE} lists parts of {slots} slots")
        self._kept = lru_cache(32)(self.column)

    def rows(self, group: int) -> slice:
        """The rows in a row group."""
        return slice(int(self._begins[group]), int(self._begins[group + 1]))

    def column(self, name: str, group: int) -> Any:
        """A column's values for the valid rows of a group, as an Arrow array."""
        try:
            table = self._file.read_row_group(group, columns=[name, "valid"])
            table.validate(full=True)
            values = table[name].filter(table["valid"])
        except (pa.ArrowException, OSError) as error:
            raise CorruptData(f"the table {self._path} is damaged ({error})") from error
        rows = self.rows(group)
        if len(values) != rows.stop - rows.start:
            raise CorruptData(
                f"{self._path} has {len(values)} valid rows where {PARTS_FILE} lists {rows.stop - rows.start}"
            )
        return values

    def value(self, name: str, row: int) -> Any:
        """One row's value."""
        group = int(np.searchsorted(self._begins, row, side="right")) - 1
        return self._kept(name, group)[row - int(self._begins[group])].as_py()


def integers(table: pa.Table, column: str) -> npt.NDArray[np.int64]:
    """A column of integers without nulls, as int64."""
    return np.asarray(table[column].to_numpy(), dtype=np.int64)
