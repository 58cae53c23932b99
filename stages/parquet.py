"""Images and labels in parquet files, as the Hugging Face hub lays them out, streamed row group by row group."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from rae.store.errors import ConfigError, CorruptData

Rows = NDArray[np.int64]

_IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp")
_LABEL_COLUMNS = ("label", "labels", "fine_label", "cls")


class ParquetImages:
    """The rows of parquet files, in order: an image column (bytes, or the hub's struct of bytes and path), and labels.

    The label column is `label_field`, `label`, `labels`, `fine_label` or `cls`, of numbers or of names. `labels` int64
    [N], -1 without one; `classes` are the names given, or the hub's, or the names found, sorted, or None. Raises
    `ConfigError` for columns that can't be meant, `CorruptData` for a file that is no parquet.
    """

    def __init__(self, files: Sequence[Path], label_field: str, classes: Sequence[str] | None) -> None:
        self._tables = [_Table.open(path, label_field) for path in files]
        first = self._tables[0]
        for table in self._tables:
            if (table.image, table.label) != (first.image, first.label):
                raise ConfigError(f"{table.path} has other columns than {first.path}: name the files of one set")
        self.classes = tuple(classes) if classes is not None else first.names
        self.labels = np.full(sum(sum(table.groups) for table in self._tables), -1, np.int64)
        if first.label is not None:
            self.labels, self.classes = _numbers(self._tables, self.classes)

    def read(self, rows: Rows) -> Iterator[bytes]:
        """The image files' bytes at ascending `rows`; empty where the table has null."""
        first = 0
        for table in self._tables:
            for group, size in enumerate(table.groups):
                if len(inside := _between(rows, first, first + size)):
                    yield from table.read(group, inside)
                first += size


@dataclass(frozen=True)
class _Table:
    """One parquet file: its columns, the rows of each row group, the class names that the hub wrote into it."""

    path: Path
    image: str
    label: str | None
    groups: tuple[int, ...]
    names: tuple[str, ...] | None

    @classmethod
    def open(cls, path: Path, label_field: str) -> "_Table":
        with _reading(path):
            metadata = pq.read_metadata(path)
            schema = metadata.schema.to_arrow_schema()
        image = next(
            (name for name in _IMAGE_COLUMNS if name in schema.names and _holds_bytes(schema.field(name))), None
        )
        if image is None:
            raise ConfigError(f"{path} has no image column ({', '.join(_IMAGE_COLUMNS)}): it has {schema.names}")
        label = next((name for name in (label_field, *_LABEL_COLUMNS) if name in schema.names), None)
        groups = tuple(metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))
        return cls(path, image, label, groups, _hub_names(schema, label))

    def read(self, group: int, rows: Rows) -> Iterator[bytes]:
        """The images at ascending `rows` of a row group, a few dozen of its rows in memory at a time."""
        with _reading(self.path), pq.ParquetFile(self.path, pre_buffer=False) as file:
            start = 0
            for batch in file.iter_batches(batch_size=32, row_groups=[group], columns=[self.image]):
                values = batch.column(0)
                for row in _between(rows, start, start + len(values)).tolist():
                    value = values[row].as_py()
                    yield (value.get("bytes") if isinstance(value, dict) else value) or b""
                start += len(values)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise CorruptData(f"{path} can't be read as parquet: {error}") from error


def _between(rows: Rows, first: int, end: int) -> Rows:
    """Those of ascending `rows` in first..end - 1, counted from `first`."""
    return rows[np.searchsorted(rows, first) : np.searchsorted(rows, end)] - first


def _holds_bytes(field: pa.Field) -> bool:
    kind = field.type
    if pa.types.is_struct(kind):
        return bool(kind.get_field_index("bytes") >= 0)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _hub_names(schema: pa.Schema, label: str | None) -> tuple[str, ...] | None:
    """The names of a `ClassLabel` in the metadata that the hub's `datasets` writes."""
    try:
        feature = json.loads(schema.metadata[b"huggingface"])["info"]["features"][label]
        return tuple(map(str, feature["names"])) if feature["_type"] == "ClassLabel" else None
    except (TypeError, KeyError, ValueError):
        return None


def _numbers(
    tables: Sequence[_Table], names: tuple[str, ...] | None
) -> tuple[NDArray[np.int64], tuple[str, ...] | None]:
    """The label columns as numbers (null: -1), and the class names; text is numbered by `names`, or else sorted."""
    chunks = []
    for table in tables:
        with _reading(table.path):
            column = pq.read_table(table.path, columns=[table.label]).column(0)
            kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
            is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
            if not is_text and not pa.types.is_integer(kind):
                raise ConfigError(
                    f"the column `{table.label}` of {table.path} holds {kind}, not class numbers or names"
                )
            chunks += column.cast(pa.string() if is_text else pa.int64()).chunks
    labels = pa.chunked_array(chunks)
    if pa.types.is_integer(labels.type):
        return labels.fill_null(-1).to_numpy().copy(), names
    found = sorted(labels.unique().drop_null().to_pylist())
    names = names or tuple(found)
    if unknown := set(found) - set(names):
        raise ConfigError(f"the class `{min(unknown)}` of {tables[0].path} is not one of the {len(names)} classes")
    return pc.index_in(labels, value_set=pa.array(names)).fill_null(-1).cast(pa.int64()).to_numpy().copy(), names
