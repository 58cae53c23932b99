"""What a manifest says of a finished attempt."""

import datetime
import hashlib
import os
import platform
from importlib import metadata
from pathlib import Path

from rae.pipeline import launch
from rae.pipeline.plan import Task
from rae.stages.job import Result
from rae.store.artifacts import Work
from rae.store.errors import CorruptData
from rae.store.manifest import Json, Manifest
from rae.store.publish import fsync_folder


def describe(
    task: Task, work: Work, result: Result, started: datetime.datetime, device: str, crew: launch.Crew, command: str
) -> Manifest:
    """The manifest of what a task made in the attempt of `work`; `CorruptData` if a file that it claims is not there.

    `started` is when it began, `device` and `crew` who made it, `command` what a person typed.
    """
    return Manifest(
        kind=work.kind,
        name=work.name,
        recipe=work.recipe,
        content=result.content,
        inputs={role: artifact.as_input() for role, artifact in task.inputs.items()},
        config=work.recipe["config"],
        files=_files(work, result),
        metrics=result.metrics,
        provenance={
            "created": started.isoformat(timespec="seconds"),
            "command": command,
            "rae": metadata.version("rae-pipeline"),
            "python": platform.python_version(),
            "platform": platform.platform(),
            **launch.provenance(device, crew),
            **result.provenance,
        },
    )


def _files(work: Work, result: Result) -> list[Json]:
    """Digest the payload as it lies on the disk, and see to it that it does, before a manifest vouches for it.

    A file that a stage claims and did not write is an error.
    """
    flush = work.kind != "latents"  # whose parts were flushed one by one as they were published
    entries, folders = [], set[Path]()
    for path in sorted(result.files):
        if not path.is_file():
            raise CorruptData(f"the stage said it wrote {path}, and it is not there")
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            if flush:
                os.fsync(file.fileno())
        relative = path.relative_to(work.folder)
        folders.update(work.folder / parent for parent in relative.parents)
        entries.append({"path": relative.as_posix(), "bytes": path.stat().st_size, "sha256": digest})
    for folder in folders if flush else ():
        fsync_folder(folder)
    return entries
