"""`rae push` and `rae pull`: artifacts with their lineage, from one workspace to another."""

import time
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Literal

from rae.pipeline.console import Console, size
from rae.store.artifacts import Workspace
from rae.store.errors import ConfigError, MissingInput, StaleInput
from rae.store.lease import held
from rae.store.manifest import Artifact, Json
from rae.store.notes import Notes, read_notes, write_notes
from rae.store.remote import LocalFolder, ObjectStore
from rae.store.transfer import copy_payload, payload_bytes


def carry(
    verb: Literal["push", "pull"],
    ref: str,
    source: Workspace,
    target: Workspace,
    console: Console,
    alone: bool = False,
    dry_run: bool = False,
) -> None:
    """Bring the artifact that `ref` means in `source`, and what it was made from, into `target`.

    Inputs arrive before what was made from them, each is published when all of it is there, and what is there is not
    sent again. Raises `StaleInput`, before anything moves, if `target` has another content under one of the ids.
    """
    if source.place == target.place:
        raise ConfigError(f"{source.place} is where the artifact lies already: name another place")
    wanted = source.resolve(ref)
    artifacts = [wanted] if alone else list(lineage(source, wanted, console))
    there = {artifact.id: _is_there(target, artifact) for artifact in artifacts}
    done, began = list[Json](), time.monotonic()
    arriving = [one.ref for one in artifacts if not dry_run and not there[one.id]]
    with held(target.objects, arriving) if arriving else nullcontext():
        for artifact in artifacts:
            name = f"{artifact.kind}/{artifact.id}"
            total = 0 if there[artifact.id] else payload_bytes(_objects(artifact), artifact)
            if there[artifact.id]:
                console.say(f"{verb}: {name} `{artifact.manifest.name}` is there already")
            elif dry_run:
                left = total - min(total, target.arrived_bytes(artifact))
                console.say(f"{verb}: would copy {name} `{artifact.manifest.name}`, {size(left)} of {size(total)}")
            else:
                _copy(verb, artifact, target, total, console)
                console.say(f"{verb}: {name} `{artifact.manifest.name}`, {size(total)}, is in {target.place}")
            if not dry_run:
                _name(target, artifact, console, verb)
                _carry_notes(target, artifact)
            done.append({"kind": artifact.kind, "id": artifact.id, "bytes": total, "reused": there[artifact.id]})
    if not dry_run and (moved := sum(one["bytes"] for one in done)):
        console.say(f"{verb}: {size(moved)}, {size(int(moved / (time.monotonic() - began)))} a second")
    if console.as_json:
        console.print_json(done)


def lineage(workspace: Workspace, artifact: Artifact, console: Console) -> Iterator[Artifact]:
    """What an artifact was made from, as far as it lies in the workspace, then the artifact: each once."""
    seen = set[str]()

    def walk(one: Artifact) -> Iterator[Artifact]:
        if one.id in seen:
            return
        seen.add(one.id)
        for role, made_from in one.manifest.inputs.items():
            try:
                found = workspace.resolve(f"{made_from['kind']}/{made_from['id']}")
            except MissingInput:
                name = f"{made_from['kind']}/{made_from['id']}"
                console.say(f"{name}, the {role} of {one.kind}/{one.id}, is not in {workspace.place}: goes without")
                continue
            yield from walk(found)
        yield one

    yield from walk(artifact)


def _is_there(target: Workspace, artifact: Artifact) -> bool:
    found = target.published(artifact.kind, artifact.id)
    if found is not None and found.manifest.content != artifact.manifest.content:
        raise StaleInput(
            f"{target.place} holds another content of {artifact.kind}/{artifact.id} ({found.manifest.content[:12]}, and"
            f" here is {artifact.manifest.content[:12]}): the first one under an id stays",
            f"rae inspect {artifact.kind}/{artifact.id} -w {target.place}",
        )
    return found is not None


def _objects(artifact: Artifact) -> ObjectStore:
    """The workspace that an artifact lies in."""
    if artifact.mirror is not None:
        return artifact.mirror.objects
    folder = artifact.folder.absolute()
    if not folder.as_posix().endswith(f"/{artifact.key}"):
        raise ConfigError(f"{folder} lies in no workspace; one would hold it as {artifact.key}")
    return LocalFolder(folder.parents[2])


def _copy(verb: str, artifact: Artifact, target: Workspace, total: int, console: Console) -> None:
    began = time.monotonic()
    with console.progress(f"{verb} {artifact.kind}") as progress:

        def carried(done_bytes: int, moved_bytes: int) -> None:
            rate = moved_bytes / (time.monotonic() - began) / 1e6
            progress(done_bytes // 1_000_000, total // 1_000_000, "MB", MB_per_s=rate)

        copy_payload(_objects(artifact), target.objects, artifact, carried)
    target.adopt(artifact)


def _name(target: Workspace, artifact: Artifact, console: Console, verb: str) -> None:
    """Give an artifact its name where that is free; what a team calls so already keeps it."""
    name = artifact.manifest.name
    if "milestone" in artifact.manifest.recipe or target.name_if_free(artifact, name):
        return
    console.say(f"{verb}: `{artifact.kind}/{name}` means another artifact in {target.place}, and goes on to")


def _carry_notes(target: Workspace, artifact: Artifact) -> None:
    """Bring description and licence along, unless the target has its own."""
    notes, arrived = read_notes(artifact), target.published(artifact.kind, artifact.id)
    if notes != Notes() and arrived is not None and read_notes(arrived) == Notes():
        write_notes(arrived, notes)
