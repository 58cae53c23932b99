"""`rae inspect`: one artifact: its numbers, settings and lineage, on the terminal or as a card in Markdown."""

from collections.abc import Iterator
from dataclasses import asdict

from rae.pipeline.card import card
from rae.pipeline.console import Console, duration, size
from rae.pipeline.status import summary
from rae.stages.models.model_folder import read_json
from rae.store.artifacts import Workspace
from rae.store.lineage import Lineage
from rae.store.manifest import Artifact, Json
from rae.store.notes import read_notes

_SHOWN_INVALID_ROWS = 20


def show_artifact(workspace: Workspace, ref: str, console: Console, as_card: bool = False) -> None:
    """One artifact: numbers, settings, inputs, and of latents the invalid rows with their reasons."""
    artifact = workspace.resolve(ref)
    manifest, notes, encoder = artifact.manifest, read_notes(artifact), _encoder(artifact)
    if as_card:
        console.say(card(artifact, notes, encoder, list(_tree(workspace, artifact))))
        return
    invalid, lineage = _invalid_rows(artifact), Lineage(workspace)
    if console.as_json:
        details: Json = {"path": str(artifact.folder), "config": manifest.config, "provenance": manifest.provenance}
        details |= {"recipe": manifest.recipe, "encoder": encoder, "invalid": invalid, **asdict(notes)}
        console.print_json(summary(lineage, artifact) | details)
        return
    console.say(f"{artifact.ref}  `{manifest.name}`  {size(artifact.payload_bytes)}  {artifact.folder}")
    console.say(f"content {manifest.content}")
    for title, text in asdict(notes).items():
        if text:
            console.say(f"{title}: {text}")
    sections = {"numbers": manifest.metrics, "provenance": manifest.provenance, **manifest.config}
    if encoder is not None:
        sections["encoder of its tokens"] = {key: value for key, value in encoder.items() if value is not None}
    for title, values in sections.items():
        console.say(f"{title}:")
        for key, value in values.items():
            console.say(f"  {key}: {duration(value) if key == 'seconds' else value}")
    console.say("made from:" if manifest.inputs else "made from no other artifact")
    for line in _tree(workspace, artifact):
        console.say(f"  {line}")
    for other in lineage.dependents(artifact.ref):
        console.say(f"needed by {lineage.called(other)}")
    for reason in lineage.stale(artifact):
        console.say(f"stale: {reason}")
    for row in invalid[:_SHOWN_INVALID_ROWS]:
        console.say(f"invalid: {row['key']} in source shard {row['source_shard']}: {row['reason']}")
    if len(invalid) > _SHOWN_INVALID_ROWS:
        console.say(f"invalid: {len(invalid) - _SHOWN_INVALID_ROWS} more; --json lists them all")


def _tree(workspace: Workspace, artifact: Artifact, seen: set[str] | None = None) -> Iterator[str]:
    """What an artifact was made from, a line each, as far as it lies in the workspace or upstream: each once."""
    seen = set() if seen is None else seen
    inputs = list(artifact.manifest.inputs.items())
    for number, (role, one) in enumerate(inputs):
        last, ref = number + 1 == len(inputs), f"{one['kind']}/{one['id']}"
        found = workspace.published(one["kind"], one["id"])
        if found is None:
            what = f"{ref}, not in this workspace"
        else:
            what = f"{ref} `{found.manifest.name}`" + (", as above" if ref in seen else "")
        yield f"{'└── ' if last else '├── '}{role}: {what}"
        if found is not None and ref not in seen:
            seen.add(ref)
            for line in _tree(workspace, found, seen):
                yield f"{'    ' if last else '│   '}{line}"


def _encoder(artifact: Artifact) -> Json | None:
    """The encoder of an artifact's tokens: width, grid, input size, normalisation, digest, and version if it has one.

    None for kinds without. Raises `CorruptData` if its description cannot be read.
    """
    file = {"latents": "encoder.json", "decoder": "decoder.json", "dit": "dit.json"}.get(artifact.kind)
    if file is None or not (path := artifact.payload / file).is_file():
        return None
    described = read_json(path)
    encoder: Json | None = described if artifact.kind == "latents" else described.get("encoder")
    return encoder


def _invalid_rows(artifact: Artifact) -> list[Json]:
    if artifact.kind != "latents":
        return []
    from rae.store.latents import LatentStore

    return LatentStore(artifact.payload).invalid_rows()
