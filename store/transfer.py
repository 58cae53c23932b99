"""Payloads of artifacts, carried from one place to another: several files at once, each verified, none twice."""

import hashlib
import json
import random
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import NamedTuple, Protocol

from rae.store.errors import CorruptData, MissingInput, Overtaken, StaleInput
from rae.store.latents_index import PARTS_FILE, PARTS_SCHEMA, read_columns
from rae.store.latents_verify import Mode
from rae.store.layout import LatentLayout
from rae.store.manifest import Artifact, canonical
from rae.store.part_record import FOLDER, moments_path, part_of, record_path
from rae.store.remote import LocalFolder, ObjectStore, checked

_TRANSFERS = 8
_CLAIM = "claim.json"
_SAMPLED_SHARE = 1 / 16


class Payload(NamedTuple):
    """A file of an artifact: its path below the artifact's folder, its size, its sha256."""

    path: str
    bytes: int
    sha256: str


class Carried(Protocol):
    """Told after each file of the bytes that need not move any more, and of those that this call moved."""

    def __call__(self, done_bytes: int, moved_bytes: int) -> None: ...


def untold(done_bytes: int, moved_bytes: int) -> None:
    """A `Carried` that says nothing."""


def payload_files(objects: ObjectStore, artifact: Artifact) -> Iterator[Payload]:
    """Every file of an artifact in `objects`; those of latents' parts come first, as the table of parts lists them."""
    if artifact.kind == "latents":
        yield from _part_files(objects, artifact)
    yield from _listed_files(artifact)


def _listed_files(artifact: Artifact) -> Iterator[Payload]:
    for entry in artifact.manifest.files:
        yield Payload(entry["path"], entry["bytes"], entry["sha256"])


def payload_bytes(objects: ObjectStore, artifact: Artifact) -> int:
    """The size of all those files, without a look at each."""
    total = sum(int(entry["bytes"]) for entry in artifact.manifest.files)
    if artifact.kind == "latents":
        total += int(artifact.manifest.metrics["bytes"])
        total += sum(stored.bytes for stored in objects.below(f"{artifact.key}/{FOLDER}"))
    return total


def damaged(objects: ObjectStore, artifact: Artifact, mode: Mode) -> Iterator[tuple[str, str]]:
    """Files of an artifact in `objects` that are not what was published, each with what is wrong with it.

    `quick` looks at sizes, `full` at every byte, `sampled` at those of a file in 16, others each time.
    """
    sizes = {stored.key: stored.bytes for stored in objects.below(artifact.key)}
    try:
        for file in payload_files(objects, artifact):
            key = f"{artifact.key}/{file.path}"
            if sizes.get(key) != file.bytes:
                yield key, "is missing" if key not in sizes else f"has {sizes[key]} bytes, published were {file.bytes}"
            elif mode == "full" or (mode == "sampled" and random.random() < _SAMPLED_SHARE):
                try:
                    for _ in checked(objects.stream(key), file.bytes, file.sha256, key):
                        pass
                except CorruptData:
                    yield key, "does not match its digest"
    except (CorruptData, MissingInput) as error:
        yield artifact.key, error.message


def _part_files(objects: ObjectStore, artifact: Artifact) -> Iterator[Payload]:
    key = artifact.key
    layout, _ = LatentLayout.load(artifact.payload)
    sizes = {stored.key: stored.bytes for stored in objects.below(f"{key}/{FOLDER}")}
    for line in read_columns(artifact.payload / PARTS_FILE, PARTS_SCHEMA, PARTS_SCHEMA.names).to_pylist():
        columns = {"latents": ("bytes", "sha256"), "scales": ("scales_bytes", "scales_sha256")}
        for array in layout.arrays:
            size, sha256 = (line[column] for column in columns[array.name])
            yield Payload(layout.shard_key(line["part"], array.name), size, sha256)
        path = record_path(artifact.folder, line["part"]).relative_to(artifact.folder).as_posix()
        record = objects.read(f"{key}/{path}")
        if record is None:
            raise MissingInput(f"{objects.place}/{key}/{path} is missing")
        if hashlib.sha256(record).hexdigest() != line["record_sha256"]:
            raise CorruptData(f"{objects.place}/{key}/{path} does not match its digest")
        yield Payload(path, len(record), line["record_sha256"])
        path = moments_path(artifact.folder, line["part"]).relative_to(artifact.folder).as_posix()
        if f"{key}/{path}" not in sizes:
            raise MissingInput(f"{objects.place}/{key}/{path} is missing")
        yield Payload(path, sizes[f"{key}/{path}"], json.loads(record)["statistics_sha256"])


def copy_payload(source: ObjectStore, target: ObjectStore, artifact: Artifact, carried: Carried = untold) -> None:
    """Bring all files of an artifact from one place to another, those that are not there.

    What is published of it is for the caller, afterwards. Raises `CorruptData` for a file that arrives otherwise than
    listed, `StaleInput` where the target holds another content under this id.
    """
    key, claim = artifact.key, canonical({"content": artifact.manifest.content})
    # Large objects can't be created-if-absent, and two who made the same latents may have made them differently.
    is_ours = artifact.kind != "latents" or target.create(f"{key}/{_CLAIM}", claim)
    if not is_ours and target.read(f"{key}/{_CLAIM}") not in (claim, None):
        raise StaleInput(f"somebody is bringing another content of {artifact.kind}/{artifact.id} to {target.place}")
    _copy(source, target, artifact, payload_files(source, artifact), carried)
    if artifact.kind == "latents":
        target.remove(f"{key}/{_CLAIM}")  # every name is taken now


def send_work(target: ObjectStore, root: Path, artifact: Artifact) -> None:
    """Bring what this machine made below `root` to where its workspace lies.

    Parts of latents that others brought there first, and made otherwise, are taken in place of ours: the tables are
    then to be made anew, which `Overtaken` says. Raises `CorruptData` as `copy_payload` does.
    """
    source = LocalFolder(root)
    if artifact.kind == "latents":
        refused: list[str] = []
        _copy(source, target, artifact, _part_files(source, artifact), untold, refused)
        if refused:
            lost = {part_of(path) for path in refused}
            of_parts = [file for file in _part_files(source, artifact) if part_of(file.path) in lost]
            for file in (*of_parts, *_listed_files(artifact)):
                (artifact.folder / file.path).unlink(missing_ok=True)
            raise Overtaken(f"{len(lost)} parts of {artifact.ref} are in {target.place} already as others made them")
    _copy(source, target, artifact, _listed_files(artifact), untold)


def _copy(
    source: ObjectStore,
    target: ObjectStore,
    artifact: Artifact,
    files: Iterator[Payload],
    carried: Carried,
    refused: list[str] | None = None,
) -> None:
    """Copy files of an artifact that are not there; paths whose content there is another go to `refused` if given."""
    key = artifact.key
    there = {stored.key: stored.bytes for stored in target.below(key)}
    lock, done, moved = Lock(), 0, 0

    def copy(file: Payload) -> None:
        nonlocal done, moved
        where = f"{key}/{file.path}"
        # An object appears whole, and with a digest of its own; its size alone says nothing.
        has = there.get(where) == file.bytes and target.digest(where) == file.sha256
        if not has:
            try:
                target.write(where, source.stream(where), file.bytes, file.sha256)
            except StaleInput:
                if refused is None:
                    raise
                refused.append(file.path)
        with lock:
            done, moved = done + file.bytes, moved + (0 if has else file.bytes)
            carried(done, moved)

    with ThreadPoolExecutor(_TRANSFERS, thread_name_prefix="transfer") as pool:
        under_way = deque[Future[None]]()
        try:
            for file in files:
                if len(under_way) == 4 * _TRANSFERS:
                    under_way.popleft().result()
                under_way.append(pool.submit(copy, file))
            for future in under_way:
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
