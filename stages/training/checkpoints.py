"""Checkpoints: immutable folders of safetensors, published whole, verified before they are believed.

ATTEMPT/checkpoints/step-00000500/model.safetensors ...     one file per group of tensors,
ATTEMPT/checkpoints/step-00000500/model/shard-...           or one per rank, where they lie in shards
ATTEMPT/checkpoints/step-00000500/dit.json ...              what the model is: it can be sampled from here
ATTEMPT/checkpoints/step-00000500/checkpoint.json           step, state, sha256 of each file and of itself
"""

import errno
import hashlib
import json
import logging
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from rae.stages.models.saving import read_tensors, save_shards, save_weights
from rae.stages.training.parallel import is_sharded
from rae.stages.training.ranks import ALONE, Ranks
from rae.store.errors import CorruptData, PartialResult
from rae.store.manifest import Json, canonical
from rae.store.publish import fsync_folder, temporary_name, write_durably

logger = logging.getLogger("rae.train")

Groups = dict[str, dict[str, Tensor]]
Describe = Callable[[Path], Sequence[Path]]  # writes files into the folder that it is given, and names them

_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class Checkpoint:
    """A training's state after `step` optimizer steps: groups of tensors ("model", "ema", "optimizer") and JSON."""

    step: int
    tensors: Groups
    state: Json
    folder: Path

    @property
    def attempt(self) -> Path:
        """The attempt that saved it."""
        return self.folder.parents[1]


def save(
    attempt: Path,
    step: int,
    groups: Mapping[str, Mapping[str, Tensor]],
    state: Json,
    keep: int,
    describe: Describe = lambda folder: (),
    ranks: Ranks = ALONE,
) -> Path:
    """Publish a checkpoint, then drop all of this attempt but the newest `keep` up to here; returns its folder.

    `describe` writes more files that belong to it: what the model is. The folder appears whole, under its name, after
    everything in it is on the disk. Raises `PartialResult` if the disk is full; the checkpoints that were there remain,
    and nothing of the new one does. All ranks call it at once: the first one writes, and the others write their shards
    of what lies in shards.
    """
    folder = attempt / "checkpoints" / f"step-{step:08d}"
    sharded = any(map(is_sharded, groups.values()))
    if not (ranks.is_main or sharded):
        return folder
    temporary = temporary_name(folder)
    try:
        if ranks.is_main:
            folder.parent.mkdir(parents=True, exist_ok=True)
            _sweep(folder.parent)
            temporary.mkdir()
        if sharded:
            temporary = ranks.broadcast(temporary)
            for group, tensors in groups.items():
                save_shards(temporary / group, tensors)
        if ranks.is_main:
            _write(temporary, step, {} if sharded else groups, state, describe)
            _publish(temporary, folder)
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise PartialResult(
            f"the disk is full: the checkpoint of step {step} could not be written below {folder.parent};"
            " earlier ones are intact",
            f"df -h {folder.parent}",
        ) from error
    finally:
        if ranks.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
    if ranks.is_main:
        _prune(attempt, step, keep)
    return folder


def newest(attempts: Sequence[Path]) -> Checkpoint | None:
    """The valid checkpoint of most steps among all attempts; invalid ones are skipped with a warning."""
    found = [folder for attempt in attempts for folder in _published(attempt)]
    for folder in sorted(found, key=_step, reverse=True):
        try:
            return load(folder)
        except CorruptData as error:
            logger.warning("skipped a checkpoint: %s", error)
    return None


def load(folder: Path) -> Checkpoint:
    """Read a checkpoint's folder onto the CPU; `CorruptData` unless every byte is what was saved."""
    description = _description(folder)
    for name, digest in description["files"].items():
        _verify(folder / name, digest)
    groups = {_group(name) for name in description["files"] if name.endswith(".safetensors")}
    tensors = {group: read_tensors(folder / f"{group}.safetensors") for group in sorted(groups)}
    return Checkpoint(description["step"], tensors, description["state"], folder)


def files_of(folder: Path) -> list[Path]:
    """All files of a checkpoint."""
    return [folder / "checkpoint.json", *(folder / name for name in sorted(_description(folder)["files"]))]


def steps(attempts: Sequence[Path]) -> list[int]:
    """The steps of all checkpoints, valid or not, in order."""
    return sorted({_step(folder) for attempt in attempts for folder in _published(attempt)})


def find_model(attempts: Sequence[Path], weights: str, step: int | None = None) -> tuple[Path, int, str] | None:
    """The newest checkpoint, or that of a step, of which a model can be loaded: its folder, its step and the sha256 of
    its `weights`, "ema" or "model". What only a training needs is not looked at; invalid ones are skipped.
    """
    found = [folder for attempt in attempts for folder in _published(attempt) if step in (None, _step(folder))]
    for folder in sorted(found, key=_step, reverse=True):
        try:
            files = _description(folder)["files"]
            needed = [name for name in files if name.endswith(".json") or _group(name) in (weights, "latent_stats")]
            for name in needed:
                _verify(folder / name, files[name])
        except CorruptData as error:
            logger.warning("skipped a checkpoint: %s", error)
        else:
            digests = [files[name] for name in sorted(needed) if _group(name) == weights]
            digest = digests[0] if len(digests) == 1 else hashlib.sha256(canonical(digests)).hexdigest()
            return folder, _step(folder), str(digest)
    return None


def _verify(path: Path, digest: str) -> None:
    try:
        found = _sha256(path)
    except OSError as error:
        raise CorruptData(f"{path} cannot be read ({error})") from error
    if found != digest:
        raise CorruptData(f"{path} is not what was saved: its sha256 differs")


def _write(
    folder: Path, step: int, groups: Mapping[str, Mapping[str, Tensor]], state: Json, describe: Describe
) -> None:
    written = [*folder.glob("*/*.safetensors"), *describe(folder)]
    files = {path.relative_to(folder).as_posix(): _sha256(path) for path in sorted(written)}
    for group, tensors in groups.items():
        path = folder / f"{group}.safetensors"
        save_weights(path, tensors)
        files[path.name] = _sha256(path)
    description = {"schema": 1, "step": step, "files": files, "state": state}
    whole = {**description, "sha256": hashlib.sha256(canonical(description)).hexdigest()}
    write_durably(folder / "checkpoint.json", json.dumps(whole, indent=1, allow_nan=False).encode())
    for shards in folder.glob("*/"):
        fsync_folder(shards)
    fsync_folder(folder)


def _publish(temporary: Path, folder: Path) -> None:
    try:
        temporary.rename(folder)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise
        # This attempt saved the step before: a valid checkpoint is never replaced.
        try:
            load(folder)
        except CorruptData:
            shutil.rmtree(folder.rename(temporary_name(folder)))
            temporary.rename(folder)
    fsync_folder(folder.parent)


def _prune(attempt: Path, step: int, keep: int) -> None:
    """Drop old checkpoints, and any of a later step: had it been readable, training would have gone on from there."""
    published = _published(attempt)
    kept = [folder for folder in published if _step(folder) <= step][:keep]
    for folder in published:
        if folder not in kept:
            # Renamed first, so that no reader finds half of it under its name.
            shutil.rmtree(folder.rename(temporary_name(folder)))


def _description(folder: Path) -> Json:
    path = folder / "checkpoint.json"
    try:
        description: Any = json.loads(path.read_bytes())
        digest = description.pop("sha256")
        intact = digest == hashlib.sha256(canonical(description)).hexdigest() and description["step"] == _step(folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptData(f"{path} cannot be read ({error})") from error
    if not intact:
        raise CorruptData(f"{path} is not what was saved")
    if bad := [name for name in description["files"] if not re.fullmatch(r"(\w+/)?[\w-]+\.(safetensors|json)", name)]:
        raise CorruptData(f"{path} names {bad[0]!r}, which is no file of a checkpoint")
    return dict(description)


def _published(attempt: Path) -> list[Path]:
    """The checkpoint folders of an attempt, newest first."""
    found = (path for path in (attempt / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name))
    return sorted(found, key=_step, reverse=True)


def _group(name: str) -> str:
    """The group of tensors that a file of a checkpoint belongs to."""
    return name.partition("/")[0].removesuffix(".safetensors")


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _sweep(folder: Path) -> None:
    """Remove what a killed process left unfinished: an attempt has one writer, and that is us."""
    for left in folder.glob(".step-*.partial"):
        shutil.rmtree(left, ignore_errors=True)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
