"""`rae tag`: names and notes, which change while the artifact does not."""

from dataclasses import asdict, replace

from rae.pipeline.console import Console
from rae.store.artifacts import Workspace
from rae.store.catalog import check_name
from rae.store.errors import ConfigError
from rae.store.manifest import Artifact
from rae.store.notes import read_notes, write_notes


def tag(
    workspace: Workspace, ref: str, name: str | None, description: str | None, license: str | None, console: Console
) -> None:
    """Give an artifact another name, or say something of it; what is not given stays as it is."""
    artifact = workspace.resolve(ref)
    if name is None and description is None and license is None:
        raise ConfigError("say what to tag it with: a NAME, --description or --license")
    if name is not None:
        check_name(name)
        if "milestone" in artifact.manifest.recipe:
            raise ConfigError(f"{artifact.ref} is a milestone, which is found by its run's name: tag the run")
    check_lies_here(workspace, artifact)
    if description is not None or license is not None:
        given = {"description": description, "license": license}
        said = {key: text for key, text in given.items() if text is not None}
        write_notes(artifact, replace(read_notes(artifact), **said))
    if name is not None:
        workspace.name(artifact, name)
        console.say(f"{artifact.kind}/{name} is {artifact.ref}")
    if console.as_json:
        notes = asdict(read_notes(artifact))
        console.print_json({"ref": artifact.ref, "name": name} | notes)


def check_lies_here(workspace: Workspace, artifact: Artifact) -> None:
    """`ConfigError` for an artifact of an upstream or of no workspace at all: only this workspace is changed."""
    if artifact.folder.resolve() != workspace.folder(artifact.kind, artifact.id).resolve():
        raise ConfigError(
            f"{artifact.ref} lies outside of the workspace {workspace.place}, which alone is changed",
            f"rae pull {artifact.ref} -w {workspace.place}",
        )
