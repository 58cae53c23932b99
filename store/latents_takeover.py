"""Parts that earlier stores of the same settings hold already: linked or copied instead of encoded again.

A part follows from its source shard, its place in that shard, the settings and the encoder, never from the shards
around it. So whatever was appended, removed or reordered, a part of a source shard that was encoded before is taken
over as it is; its record alone is written anew, with its new number.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet

from rae.store.errors import CorruptData, RaeError
from rae.store.latents_index import PARTS_FILE
from rae.store.layout import LatentLayout, Part
from rae.store.manifest import Artifact
from rae.store.part_record import PartRecord, moments_path, record_path
from rae.store.publish import fsync_folder, make_folder, publish_bytes, publish_file, temporary_name
from rae.store.shards import Source
from rae.store.zarr_shard import check_size, file_sha256

_COLUMNS = ("part", "source_shard", "source_sha256", "first_sample", "slots", "content")
_COPY_BLOCK = 1 << 22

_Place = tuple[str, int, int]  # digest of a source shard, first sample, samples


@dataclass(frozen=True)
class _Found:
    """A part in an earlier store."""

    artifact: Artifact
    part: Part
    content: str


class EarlierParts:
    """What published latents of the same settings hold. `artifacts`: the one to prefer first."""

    def __init__(self, artifacts: Iterable[Artifact] = ()) -> None:
        self._found: dict[_Place, _Found] = {}
        for artifact in artifacts:
            for line in _lines(artifact.folder):
                part = Part(line["part"], line["source_shard"], line["first_sample"], line["slots"], first_slot=0)
                self._found.setdefault(_place(line), _Found(artifact, part, line["content"]))

    def take_over(self, parts: Iterable[Part], folder: Path, layout: LatentLayout, source: Source) -> None:
        """Publish in the store at `folder` those of `parts` that are here, records and all.

        What cannot be taken over (damaged, or of rows that now have other labels) is left out, to be encoded.
        """
        for part in parts:
            found = self._found.get((source.shards[part.source_shard].sha256, part.first_sample, part.count))
            if found is not None:
                try:
                    _take_over(found, part, folder, layout, source)
                except RaeError:
                    continue

    def taken_over(self, folder: Path) -> dict[str, int]:
        """How many parts of the finished store at `folder` are the very ones of each earlier artifact."""
        counts: Counter[str] = Counter()
        for line in _lines(folder) if self._found else ():
            found = self._found.get(_place(line))
            if found is not None and found.content == line["content"]:
                counts[f"latents/{found.artifact.id}"] += 1
        return dict(counts)


def _lines(folder: Path) -> Iterator[dict[str, Any]]:
    """The table of a finished store's parts, line by line; nothing if it cannot be read."""
    try:
        with pyarrow.parquet.ParquetFile(folder / PARTS_FILE) as table:
            for batch in table.iter_batches(columns=list(_COLUMNS)):
                yield from batch.to_pylist()
    except (OSError, ValueError, KeyError):  # pyarrow's own errors are ValueErrors
        return


def _place(line: dict[str, Any]) -> _Place:
    return line["source_sha256"], line["first_sample"], line["slots"]


def _take_over(found: _Found, part: Part, folder: Path, layout: LatentLayout, source: Source) -> None:
    old_folder = found.artifact.folder
    old = PartRecord.load(old_folder, layout, found.part)
    if old.content() != found.content or not _is_of_rows(old, part, source):
        return
    new = replace(
        old,
        part=part.number,
        source_shard=part.source_shard,
        shard_key=layout.shard_key(part.number),
        statistics=str(moments_path(folder, part.number).relative_to(folder)),
    )
    if not (old_folder / old.statistics).is_file():
        return
    shards = list(zip(layout.shard_keys(old.part), layout.shard_keys(new.part), old.shards, strict=True))
    for old_key, _, (size, sha256) in shards:  # all before the first: the encode that follows would adopt what is here
        check_size(old_folder / old_key, size)
        if file_sha256(old_folder / old_key) != sha256:  # else a new manifest would vouch for old damage
            raise CorruptData(f"{old_folder / old_key} is not what its record says")
    for old_key, new_key, (_, sha256) in shards:
        _link_or_copy(old_folder / old_key, folder / new_key, sha256)
    _link_or_copy(old_folder / old.statistics, folder / new.statistics, old.statistics_sha256)
    publish_bytes(record_path(folder, part.number), new.to_json().encode())


def _is_of_rows(record: PartRecord, part: Part, source: Source) -> bool:
    """Whether a record's keys, labels and reasons are what `source` says now.

    A source shard alone does not decide them: classes can have changed, and a label is missing only among others.
    """
    first = source.shards[part.source_shard].first + part.first_sample
    rows = range(first, first + part.count)
    labels = [int(label) if label >= 0 else None for label in source.labels[rows.start : rows.stop]]
    # A reason of the source's own leaves the image unread, and no other does.
    reasons = [source.reason(row) for row in rows]
    unread = zip(record.index["reason"], record.index["image_sha256"], strict=True)
    recorded = [reason if sha256 is None else None for reason, sha256 in unread]
    keys: Sequence[str] = [source.keys[row] for row in rows]
    return (record.index["key"], record.index["label"], recorded) == (keys, labels, reasons)


def _link_or_copy(old: Path, new: Path, sha256: str) -> None:
    """Give the immutable file `old` a second name, or copy it where that can't be done.

    Raises `CorruptData` if another file has the name, or if what was copied has not this digest.
    """
    make_folder(new.parent)
    try:
        os.link(old, new)
        fsync_folder(new.parent)
        return
    except FileExistsError:
        if os.path.samefile(old, new) or file_sha256(new) == sha256:  # a takeover was killed before its record
            return
        raise CorruptData(f"{new} is there and is not {old}") from None
    except OSError:
        pass  # another file system, or one without links
    temporary = temporary_name(new)
    try:
        _copy_durably(old, temporary, sha256)
        if not publish_file(temporary, new) and file_sha256(new) != sha256:
            raise CorruptData(f"{new} is there and is not {old}")
    finally:
        temporary.unlink(missing_ok=True)


def _copy_durably(old: Path, temporary: Path, sha256: str) -> None:
    digest = hashlib.sha256()
    with open(old, "rb") as source, open(temporary, "xb") as target:
        while block := source.read(_COPY_BLOCK):
            digest.update(block)
            target.write(block)
        target.flush()
        os.fsync(target.fileno())
    if digest.hexdigest() != sha256:
        raise CorruptData(f"{old} is not what its record says")
