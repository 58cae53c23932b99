"""What every ordered set of images has in common, whether it lies in tars or in a folder."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self, overload

import numpy as np
from numpy.typing import NDArray

from rae.store.errors import ConfigError

#: Why a sample is listed and can't be used. A source keeps one byte a row: the position in this tuple.
REASONS = (
    "",
    "missing image",
    "missing label",
    "unreadable label",
    "duplicate key",
    "truncated tar",
    "damaged tar",
)


class Keys(Sequence[str]):
    """A column of strings in two buffers: eight bytes a key beside its text, so that millions stay small."""

    def __init__(self, text: bytes, ends: NDArray[np.int64]) -> None:
        self._text = text
        self._ends = ends

    @classmethod
    def of(cls, keys: Iterable[str]) -> Self:
        """Pack `keys`. UnicodeEncodeError for a lone surrogate."""
        encoded = [key.encode() for key in keys]
        return cls(b"".join(encoded), np.cumsum([len(key) for key in encoded], dtype=np.int64))

    @classmethod
    def concatenate(cls, columns: Sequence["Keys"]) -> Self:
        starts = np.cumsum([0, *(len(column._text) for column in columns)])
        ends = [column._ends + start for column, start in zip(columns, starts[:-1], strict=True)]
        return cls(b"".join(column._text for column in columns), np.concatenate([np.empty(0, np.int64), *ends]))

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, row: int) -> str: ...
    @overload
    def __getitem__(self, row: slice) -> list[str]: ...
    def __getitem__(self, row: int | slice) -> str | list[str]:
        if isinstance(row, slice):
            return [self[place] for place in range(*row.indices(len(self)))]
        row = range(len(self))[row]  # negative rows, and IndexError beyond the end
        start = self._ends[row - 1] if row else 0
        return self._text[start : self._ends[row]].decode()


@dataclass(frozen=True)
class SourceShard:
    """A run of consecutive samples with one digest: a tar, or a folder of images.

    `path` may be a URL. `first` is the row of its first sample. `sha256` is a tar's own; for a folder it covers the
    label, and the sorted (relative path, sha256) of its files.
    """

    name: str
    path: Path | str
    sha256: str
    samples: int
    first: int


class Source(ABC):
    """An ordered set of images, addressed by row number. Safe to use from several threads, and to pickle.

    `keys` [N], `labels` int64 [N] (-1: none), `shards` in order, `classes` the class names or None if nobody gave any.
    A row that can't be used keeps its number and says why (`reason`). Raises `ConfigError` for a label outside the
    classes.
    """

    def __init__(
        self,
        shards: Sequence[SourceShard],
        keys: Keys,
        labels: NDArray[np.int64],
        reasons: NDArray[np.uint8],
        classes: Sequence[str] | None,
    ) -> None:
        self.shards = tuple(shards)
        self.keys: Sequence[str] = keys
        self.labels = labels
        self.classes = tuple(classes) if classes is not None else None
        self._firsts = np.array([shard.first for shard in shards], np.int64)
        if (labels >= 0).any():  # without a single label, the set is unlabelled rather than broken
            reasons = np.where((reasons == 0) & (labels < 0), REASONS.index("missing label"), reasons).astype(np.uint8)
        self.reasons = reasons
        check_labels(labels, self.classes, lambda row: f"`{keys[row]}` in {self.shard_of(row).path}")

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def read(self, row: int) -> bytes:
        """The bytes of the row's image file, as they were stored.

        Raises `CorruptData` or `StaleInput` if what is read is not what the index says, or if the row has no image.
        """

    @abstractmethod
    def verify(self, shard: SourceShard) -> None:
        """Read all of `shard` again and raise `CorruptData` unless its digest is the recorded one."""

    def reason(self, row: int) -> str | None:
        """Why the row can't be used, one of `REASONS`; None if it can. Its image may still fail to decode."""
        return REASONS[self.reasons[row]] or None

    def shard_of(self, row: int) -> SourceShard:
        return self.shards[int(np.searchsorted(self._firsts, row, side="right")) - 1]

    @property
    def num_classes(self) -> int:
        """How many classes there are: the names given, or else the largest label plus one; 0 without labels."""
        return len(self.classes) if self.classes is not None else int(self.labels.max(initial=-1)) + 1

    @property
    def digests(self) -> list[str]:
        """The sha256 of every shard, in order: what a recipe records of its source."""
        return [shard.sha256 for shard in self.shards]


def check_labels(labels: NDArray[np.int64], classes: Sequence[str] | None, where: Callable[[int], str]) -> None:
    """Raise `ConfigError` if a label is neither -1 nor a place in `classes`; `where(row)` names the sample."""
    outside = labels < -1
    if classes is not None:
        outside |= labels >= len(classes)
    if outside.any():
        row = int(outside.argmax())
        allowed = f"0..{len(classes) - 1}, of {len(classes)} classes" if classes is not None else "0 and up"
        raise ConfigError(f"label {labels[row]} of {where(row)} is outside the class count ({allowed})")
