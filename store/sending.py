"""Work on an artifact in a bucket, sent there in the background as it is done, and fetched by whoever continues it.

Stages write every file under a temporary name and give it its own when it is whole; a part's record and a checkpoint's
`checkpoint.json` come last. So whatever has a name can be sent, those two after the rest, and an attempt in the bucket
is at any moment one that a killed process might have left on a disk. Of latents it is parts alone: tables say what all
of them hold. Of a part that another machine has sent first, made otherwise, nothing more is sent.
"""

import logging
from collections.abc import Iterable
from pathlib import Path
from threading import Event, Thread
from types import TracebackType
from typing import Self

from rae.store.errors import RaeError, StaleInput
from rae.store.mirror import LIES_AT
from rae.store.part_record import FOLDER, part_of
from rae.store.remote import LocalFolder, ObjectStore
from rae.store.zarr_shard import file_sha256

logger = logging.getLogger(__name__)

_EVERY_S = 1.0
_CHECKPOINT = "checkpoint.json"
_GROWS = "metrics.jsonl"
_NO_PAYLOAD = ("manifest.json", "started.json", LIES_AT)


class Sending:
    """Sends what appears below `folder` to `key`, until it is left; then once more. What vanishes, vanishes there."""

    def __init__(self, objects: ObjectStore, key: str, folder: Path, every_s: float = _EVERY_S) -> None:
        self._objects, self._key, self._folder, self._every_s = objects, key, folder, every_s
        self._sent: dict[str, tuple[int, int]] = {}
        self._parts_alone = key.startswith("objects/latents/")
        self._lost = set[int]()
        self._over = Event()
        self._thread = Thread(target=self._work, name="sending", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()
        self._pass()

    def _work(self) -> None:
        while not self._over.wait(self._every_s):
            self._pass()

    def _pass(self) -> None:
        try:
            found = dict(_whole_files(self._folder))
            for path in sorted(found, key=_comes_last):
                part = part_of(path) if self._parts_alone else None
                if self._sent.get(path) == found[path] or part in self._lost or (self._parts_alone and part is None):
                    continue
                try:
                    self._send(path)
                    self._sent[path] = found[path]
                except StaleInput:
                    if part is None:
                        raise
                    self._lost.add(part)  # publication takes theirs
            for path in sorted(self._sent.keys() - found.keys(), key=_comes_last, reverse=True):
                self._objects.remove(f"{self._key}/{path}")
                del self._sent[path]
        except (RaeError, OSError) as error:  # nothing is lost: the next pass, or the publication, sends it
            logger.warning("what is done could not be sent yet: %s", error)

    def _send(self, path: str) -> None:
        file, key = self._folder / path, f"{self._key}/{path}"
        if file.name == _GROWS:
            self._objects.replace(key, file.read_bytes())
            return
        local = LocalFolder(self._folder)
        self._objects.write(key, local.stream(path), file.stat().st_size, file_sha256(file))


def fetch_unfinished(objects: ObjectStore, key: str, folder: Path) -> None:
    """Bring what was sent of unfinished work: of checkpoints the one of most steps, and everything else.

    What is there already stays. Raises `CorruptData` for an object that is not what was sent.
    """
    stored = list(objects.below(key))
    checkpoints = [one.key for one in stored if one.key.endswith(f"/{_CHECKPOINT}")]
    newest = max(checkpoints, key=lambda path: path.split("/")[-2], default="").removesuffix(_CHECKPOINT)
    local = LocalFolder(folder)
    for one in stored:
        path = one.key.removeprefix(f"{key}/")
        wanted = one.key.startswith(newest) if "/checkpoints/" in path else "/" in path
        if not wanted or (folder / path).exists():
            continue
        if (sha256 := objects.digest(one.key)) is not None:
            local.write(path, objects.stream(one.key), one.bytes, sha256)


def _whole_files(folder: Path) -> Iterable[tuple[str, tuple[int, int]]]:
    """Files that have their own name, in folders that have theirs: path, and size and modification time."""
    for path in folder.rglob("*"):
        relative = path.relative_to(folder)
        unnamed = any(part.startswith(".") or part.endswith(".partial") for part in relative.parts)
        if unnamed or relative.as_posix() in _NO_PAYLOAD:
            continue
        try:
            if path.is_file():
                status = path.stat()
                yield relative.as_posix(), (status.st_size, status.st_mtime_ns)
        except FileNotFoundError:  # renamed or dropped meanwhile
            continue


def _comes_last(path: str) -> tuple[bool, str]:
    name = path.rpartition("/")[2]
    return name == _CHECKPOINT or (path.startswith(f"{FOLDER}/") and name.endswith(".json")), path
