"""Writes webdataset shards whose bytes depend on their samples alone, and the index.json beside them."""

import contextlib
import hashlib
import io
import json
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from rae.store.errors import StaleInput
from rae.store.source import Keys
from rae.store.tar_index import SCHEMA, TarIndex, read_index

_BLOCK = 512


class ShardWriter:
    """Writes samples into FOLDER/PREFIX-0000.tar, PREFIX-0001.tar, ... of `samples_per_shard` samples each.

    Members have owner 0, mode 0644 and time 0, so equal samples give equal bytes. `close` publishes what was written in
    FOLDER/index.json; until then, and after a failure, the index knows nothing of it. Several prefixes share an index.
    `paths` are the tars begun so far, `indexes` those finished, by name.
    """

    def __init__(
        self, folder: Path, prefix: str, samples_per_shard: int = 1000, classes: Sequence[str] | None = None
    ) -> None:
        self.paths: list[Path] = []
        self._folder = folder
        self._prefix = prefix
        self._samples_per_shard = samples_per_shard
        self._classes = classes
        self._tar: _TarFile | None = None
        self.indexes: dict[str, TarIndex] = {}

    def add(self, key: str, image: bytes, extension: str, label: int = -1) -> None:
        """Append one sample: `key` has no dot in its base name; `extension` (`jpg`) names the format; -1 is no label.

        Raises ValueError for a key that webdataset would take apart differently, `StaleInput` if a tar is in the way.
        """
        if "." in key.rpartition("/")[2] or key.rpartition("/")[2] == "":
            raise ValueError(f"`{key}` can't be a webdataset key: its base name is empty or has a dot")
        if self._tar is None:
            path = self._folder / f"{self._prefix}-{len(self.paths):04d}.tar"
            try:
                self._tar = _TarFile(path)
            except FileExistsError as error:
                raise StaleInput(f"{path} exists already: give an empty folder") from error
            self.paths.append(path)
        self._tar.add(key, image, extension, label)
        if len(self._tar.keys) == self._samples_per_shard:
            self._finish_tar()

    def close(self) -> None:
        """Finish the last tar and record all of them in index.json."""
        self._finish_tar()
        _, others = read_index(self._folder / "index.json")
        write_index(self._folder / "index.json", self._classes, others | self.indexes)

    def _finish_tar(self) -> None:
        if self._tar is not None:
            self.indexes[self.paths[-1].name] = self._tar.close()
            self._tar = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        elif self._tar is not None:
            self._tar.abandon()


def write_index(path: Path, classes: Sequence[str] | None, indexes: dict[str, TarIndex]) -> None:
    """Write an index.json, whole or not at all; a line a tar, so that people and diff can read it."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            names = json.dumps(list(classes) if classes is not None else None, ensure_ascii=False)
            file.write(f'{{"schema":{SCHEMA},"classes":{names},"shards":[')
            for place, (name, index) in enumerate(sorted(indexes.items())):
                line: dict[str, Any] = index.to_json(name)
                file.write((",\n" if place else "\n") + json.dumps(line, ensure_ascii=False, separators=(",", ":")))
            file.write("\n]}\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


class _TarFile:
    """One tar on its way: hashed as it is written, its samples' places kept."""

    def __init__(self, path: Path) -> None:
        self._file = _HashedFile(path)
        self._archive = tarfile.open(  # noqa: SIM115 (closed in `close`)
            fileobj=self._file, mode="w|", bufsize=1 << 20, format=tarfile.GNU_FORMAT
        )
        self.keys: list[str] = []
        self._places: list[tuple[int, int, int]] = []

    def add(self, key: str, image: bytes, extension: str, label: int) -> None:
        self._places.append((self._append(f"{key}.{extension}", image), len(image), label))
        self.keys.append(key)
        if label >= 0:
            self._append(f"{key}.cls", str(label).encode())

    def _append(self, name: str, data: bytes) -> int:
        member = tarfile.TarInfo(name)
        member.size = len(data)
        self._archive.addfile(member, io.BytesIO(data))
        return int(self._archive.offset) - -(-len(data) // _BLOCK) * _BLOCK

    def close(self) -> TarIndex:
        self._archive.close()
        os.fsync(self._file.fileno())
        self._file.close()
        places = np.array(self._places, np.int64).reshape(-1, 3)
        reasons = np.zeros(len(places), np.uint8)
        return TarIndex(self._file.digest.hexdigest(), self._file.size, Keys.of(self.keys), places, reasons)

    def abandon(self) -> None:
        with contextlib.suppress(OSError):  # whatever stopped the writing is the error to report
            self._file.close()


class _HashedFile(io.FileIO):
    """A new file that is hashed as it is written."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "x")
        self.digest = hashlib.sha256()
        self.size = 0

    def write(self, data: Any, /) -> int:
        rest = memoryview(data)
        size = len(rest)
        self.digest.update(rest)
        self.size += size
        while rest:  # a nearly full disk takes a part before it refuses the rest
            rest = rest[super().write(rest) :]
        return size
