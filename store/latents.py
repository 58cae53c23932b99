"""Reading latents: rows by number, batches in an order that is the same for any number of ranks.

Rows count valid samples, in slot order. Nothing is read at opening but the array's metadata and a line per part;
a shard is opened when a row of its is asked for, and no row is looked at that is not asked for.
"""

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypedDict

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from rae.store.conditioning import Vectors, open_vectors
from rae.store.errors import ConfigError, CorruptData, MissingInput
from rae.store.json_data import parse_object
from rae.store.latents_index import (
    INDEX_FILE,
    INDEX_SCHEMA,
    PADDING,
    PARTS_FILE,
    PARTS_SCHEMA,
    ValidRows,
    integers,
    open_table,
    read_columns,
    table_content,
)
from rae.store.latents_rows import RowReader
from rae.store.latents_verify import Mode, Problem, verify
from rae.store.layout import ARRAY_FILE, GROUP_FILE, STATS_FILE, LatentLayout
from rae.store.order import GlobalShuffle, IntArray, Shuffle, WindowedShuffle, batch_rows, draw, steps_per_epoch
from rae.store.stats import LatentStats

Latents = npt.NDArray[Any]

WINDOW_PARTS = 16  # 6.4 GB of parts of 400 MB
IDENTITY = 0  # the view of a sample as it is; view 1 is its horizontal flip


class LatentSample(TypedDict):
    """One row: latent [C, H, W], class label (-1: none), key."""

    latent: Latents
    label: int
    key: str


class LatentBatch(TypedDict):
    """B rows: latents [B, C, H, W], labels [B] (-1: none), row numbers [B], views [B]; all numbers int64."""

    latent: Latents
    label: IntArray
    row: IntArray
    view: IntArray


class LatentStore:
    """A finished latent store in a folder, read-only.

    Items and batches are whitened with the store's own statistics, float32, unless `raw`: then they are what the
    encoder gave, as near as the store's number format comes, in float16 for float16 and in float32 for every other.
    `len` counts valid rows. Raises `MissingInput` or `CorruptData`, naming the file, where something is not there or
    does not fit; a shard is looked at when it is first needed, and all of them by `verify`. Can be pickled, which
    carries the folder and opens anew.
    """

    def __init__(self, folder: str | Path, raw: bool = False) -> None:
        self.folder = Path(folder)
        self.raw = raw
        self.layout, self.slots = LatentLayout.load(self.folder)
        parts = read_columns(self.folder / PARTS_FILE, PARTS_SCHEMA, ["part", "slots", "rows", "bytes", "scales_bytes"])
        rows = integers(parts, "rows")
        columns = {"latents": "bytes", "scales": "scales_bytes"}
        sizes = {array.name: integers(parts, columns[array.name]) for array in self.layout.arrays}
        numbered = np.array_equal(integers(parts, "part"), np.arange(parts.num_rows))
        if not numbered or parts.num_rows * self.layout.rows_per_part != self.slots:
            raise CorruptData(f"{self.folder / PARTS_FILE} lists other parts than {ARRAY_FILE} has room for")
        content = table_content(self.folder / PARTS_FILE, PARTS_SCHEMA)
        if self.manifest.get("content", content) != content:
            raise CorruptData(f"{self.folder / 'manifest.json'} is of other latents than {PARTS_FILE} beside it lists")
        for name, data in self.layout.metadata_files(self.slots).items():
            if name not in (GROUP_FILE, ARRAY_FILE) and _read_bytes(self.folder / name) != data:
                raise CorruptData(f"{self.folder / name} does not describe the {name.split('/')[0]} of {ARRAY_FILE}")
        has_holes = rows < integers(parts, "slots")
        self._reader = RowReader(self.folder, self.layout, sizes, rows, has_holes)

    def __reduce__(self) -> tuple[type["LatentStore"], tuple[Path, bool]]:
        return LatentStore, (self.folder, self.raw)

    def __len__(self) -> int:
        return len(self._reader)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one latent."""
        return self.layout.latent_shape

    @property
    def views(self) -> int:
        """How many views of each sample are stored: the identity, then its horizontal flip; or crops."""
        return self.layout.views

    @cached_property
    def stats(self) -> LatentStats:
        """Mean and variance [C, H, W] over all valid rows and views."""
        stats = LatentStats.load(self.folder / STATS_FILE)
        if stats.mean.shape != self.shape or stats.variance.shape != self.shape:
            raise CorruptData(
                f"{self.folder / STATS_FILE} holds statistics of shape {stats.mean.shape}, not {self.shape}"
            )
        return stats

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """`manifest.json`; empty while the store is not published."""
        path = self.folder / "manifest.json"
        return parse_object(_read_bytes(path), str(path)) if path.exists() else {}

    @cached_property
    def labels(self) -> IntArray:
        """Class label of each row, -1 where there is none; 8 bytes a row."""
        labels = np.empty(len(self), np.int64)
        for group in range(self._index.groups):
            values = self._index.column("label", group)
            labels[self._index.rows(group)] = pc.fill_null(values, -1).to_numpy()
        return labels

    @cached_property
    def conditioning(self) -> Vectors:
        """The vectors [slots, D] kept beside the latents, mapped; `slot_of` says whose is whose."""
        return open_vectors(self.folder, self.slots)

    @cached_property
    def image_digests(self) -> npt.NDArray[np.uint8]:
        """The sha256 of the image file that each row was made of, uint8 [N, 32]."""
        digests = np.empty((len(self), 32), np.uint8)
        for group in range(self._index.groups):
            joined = "".join(self._index.column("image_sha256", group).to_pylist())
            digests[self._index.rows(group)] = np.frombuffer(bytes.fromhex(joined), np.uint8).reshape(-1, 32)
        return digests

    @cached_property
    def keys(self) -> list[str]:
        """Key of each row, all of them; `keys_of` reads those of some rows."""
        groups = range(self._index.groups)
        return [key for group in groups for key in self._index.column("key", group).to_pylist()]

    def keys_of(self, rows: npt.ArrayLike) -> list[str]:
        """Keys of `rows` [B], from the parts of the index that they are in."""
        return [self._index.value("key", row) for row in np.asarray(rows, dtype=np.int64).tolist()]

    @cached_property
    def _index(self) -> ValidRows:
        return ValidRows(self.folder / INDEX_FILE, self.layout, self._reader.first_row)

    def invalid_rows(self) -> list[dict[str, Any]]:
        """Samples without a latent, in slot order: slot, key, label, source_shard (its number), reason."""
        file = open_table(self.folder / INDEX_FILE, INDEX_SCHEMA)
        found: list[dict[str, Any]] = []
        try:
            for batch in file.iter_batches(columns=["slot", "key", "label", "source_shard", "valid", "reason"]):
                batch.validate(full=True)
                wanted = pc.and_(pc.invert(batch["valid"]), pc.not_equal(batch["reason"], PADDING))
                found += batch.filter(wanted).drop_columns(["valid"]).to_pylist()
        except (pa.ArrowException, OSError) as error:
            raise CorruptData(f"the table {self.folder / INDEX_FILE} is damaged ({error})") from error
        return found

    def __getitem__(self, row: int) -> LatentSample:
        """Row number `row` as it is, not flipped; negative numbers count from the end."""
        number = range(len(self))[row]  # IndexError as for any sequence
        latent = self.rows([number], [IDENTITY])[0]
        return {
            "latent": latent if self.raw else self.stats.whiten(latent),
            "label": int(self.labels[number]),
            "key": self.keys_of([number])[0],
        }

    def rows(self, rows: npt.ArrayLike, views: npt.ArrayLike) -> Latents:
        """Raw latents [B, C, H, W] of `rows` [B] in the given `views` [B] (or one for all); float16 or float32."""
        return self._reader.read(np.asarray(rows, dtype=np.int64), np.asarray(views, dtype=np.int64))

    def batches(
        self,
        batch_size: int,
        seed: int,
        epoch: int,
        start_step: int = 0,
        rank: int = 0,
        world_size: int = 1,
        horizontal_flip: bool | None = None,
        raw: bool | None = None,
        shuffle: Literal["global", "windowed"] = "global",
        window_parts: int = WINDOW_PARTS,
    ) -> Iterator[LatentBatch]:
        """The batches of one shuffled epoch from `start_step` on, each announced to the system one step ahead.

        `batch_size` is that of all ranks together; each of `world_size` ranks gets its share of the same global
        batches (`rae.store.order`). The remainder of an epoch is dropped. A row's view is drawn from (seed, "view",
        epoch, row) if both are stored; `horizontal_flip` True insists on that, False reads the identity alone. `raw`
        overrides the store's own; the method `shuffle` says what `shuffle` and `window_parts` mean. Raises
        `ConfigError` for sizes that do not fit.
        """
        if horizontal_flip is not None and self.layout.view_kind == "crops":
            raise ConfigError(f"`horizontal_flip` chooses among flips, and the views in {self.folder} are crops")
        if horizontal_flip and self.views < 2:
            raise ConfigError(f"`horizontal_flip` needs flipped views, and {self.folder} stores one view of each image")
        if batch_size > len(self):
            raise ConfigError(f"`batch_size` {batch_size} is larger than the {len(self)} rows of {self.folder}")
        steps = range(start_step, steps_per_epoch(len(self), batch_size))
        order = self.shuffle(shuffle, window_parts)
        shares = (batch_rows(order, batch_size, seed, epoch, step, rank, world_size) for step in steps)
        flips = horizontal_flip is not False
        drawn = ((rows, self.draw_views(rows, seed, epoch) if flips else np.zeros_like(rows)) for rows in shares)
        return self._batches(drawn, self.raw if raw is None else raw)

    def shuffle(self, law: Literal["global", "windowed"] = "global", window_parts: int = WINDOW_PARTS) -> Shuffle:
        """The order of epochs, to be given to `batch_rows`.

        `global` permutes all rows. `windowed` permutes the parts and, in every `window_parts` of them, the rows: for
        latents on a disk that is slow at random reads, at the price of batches that mix fewer parts.
        """
        if law == "global":
            return GlobalShuffle(len(self))
        return WindowedShuffle(np.diff(self._reader.first_row), window_parts)

    def draw_views(self, rows: IntArray, seed: int, epoch: int) -> IntArray:
        """The view in which each row appears in an epoch, all stored ones equally likely. int64, shape of `rows`."""
        return (draw(seed, "view", epoch, rows) * self.views).astype(np.int64)

    def verify(self, mode: Mode = "quick") -> list[Problem]:
        """What is wrong, naming file or row: `quick` looks at sizes and metadata, `full` reads every byte."""
        return verify(self.folder, self.layout, mode)

    def _batches(self, drawn: Iterator[tuple[IntArray, IntArray]], raw: bool) -> Iterator[LatentBatch]:
        upcoming = next(drawn, None)
        while upcoming is not None:
            rows, views = upcoming
            upcoming = next(drawn, None)
            if upcoming is not None:
                self._reader.announce(*upcoming)
            latents = self.rows(rows, views)
            yield {
                "latent": latents if raw else self.stats.whiten(latents),
                "label": self.labels[rows],
                "row": rows,
                "view": views,
            }

    def slot_of(self, row: int) -> int:
        """The slot of a row."""
        (part,), (place,) = self.places(np.array([row]))
        return int(part) * self.layout.rows_per_part + int(place)

    def places(self, rows: IntArray) -> tuple[IntArray, IntArray]:
        """The part of each row, and its place among the part's samples."""
        return self._reader.places(rows)


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise MissingInput(f"{path.parent} holds no finished latents: {path} is missing") from error
