"""Artifacts of one small file, made without a stage."""

from typing import Any

from rae.store.artifacts import Work, Workspace
from rae.store.manifest import Artifact, Json, Manifest


def recipe(kind: str = "dit", **config: Any) -> Json:
    return {"kind": kind, "config": {kind: config}, "inputs": {}}


def describe(work: Work, content: str = "c" * 64, inputs: dict[str, Artifact] | None = None) -> Manifest:
    """The manifest of an attempt that holds one file."""
    path = work.attempt / "payload"
    path.write_bytes(content.encode())
    entry = {"path": path.relative_to(work.folder).as_posix(), "bytes": len(content), "sha256": "0" * 64}
    given = {role: one.as_input() for role, one in (inputs or {}).items()}
    return Manifest(work.kind, work.name, work.recipe, content, given, work.recipe["config"], [entry], {"seconds": 1.0})


def make(
    workspace: Workspace,
    kind: str = "dit",
    name: str = "mine",
    inputs: dict[str, Artifact] | None = None,
    **config: Any,
) -> Artifact:
    """Publish an artifact of these settings, made from `inputs`."""
    given = {role: one.as_input() for role, one in (inputs or {}).items()}
    work = workspace.begin(kind, name, recipe(kind, **config), given)
    return workspace.publish(work, describe(work, inputs=inputs))
