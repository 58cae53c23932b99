"""An artifact card: what a manifest says, as Markdown for people who are handed the artifact."""

import json
import re
from collections.abc import Sequence
from typing import Any

from rae.pipeline.console import duration, size
from rae.store.manifest import Artifact, Json
from rae.store.notes import Notes

_WHAT = {
    "shards": "Images in webdataset shards",
    "latents": "Latents: images as tokens of a frozen encoder",
    "decoder": "A decoder that turns tokens back into images",
    "dit": "A diffusion transformer that makes tokens",
    "samples": "Images that a diffusion transformer and a decoder made",
    "reference": "Statistics of real images to score against",
    "scores": "Scores of reconstructions and samples",
}


def card(artifact: Artifact, notes: Notes, encoder: Json | None, lineage: Sequence[str]) -> str:
    """The card. All that the manifest and the notes say is untrusted: none of it becomes markup."""
    manifest, about = artifact.manifest, artifact.manifest.provenance
    title = f"# {_text(manifest.name)}"
    lead = [f"{_WHAT[manifest.kind]}, made by `rae` ({_text(about.get('created', 'nobody says when'))})."]
    if notes.description:
        lead = [_text(notes.description), "", *lead]
    identity = {
        "artifact": f"{manifest.kind}/{manifest.id}",
        "content": manifest.content,
        "size": size(artifact.payload_bytes),
        "licence": notes.license or "nobody has said",
        "command": about.get("command", ""),
    }
    parts = [title, *lead, _table(identity), "## Numbers", _table(manifest.metrics)]
    if encoder is not None:
        parts += ["## Encoder of its tokens", _table({key: one for key, one in encoder.items() if one is not None})]
    for section, values in manifest.config.items():
        settings = values if isinstance(values, dict) else {"": values}
        parts += [f"## Settings: {_text(section)}", _table(settings)]
    if isinstance(weights := manifest.recipe.get("weights"), dict) and weights:
        parts += ["## Weights that went in, sha256", _table(weights)]
    tree = "\n".join(f"    {line}" for line in lineage) or "no other artifact"
    parts += ["## Made from", tree, "## Made with", _table({k: v for k, v in about.items() if k != "command"})]
    return "\n\n".join(parts) + "\n"


def _table(values: Json) -> str:
    rows = [f"| {_text(key)} | {_value(key, value)} |" for key, value in values.items()]
    return "\n".join(["| | |", "| --- | --- |", *rows])


def _value(key: str, value: Any) -> str:
    if key == "seconds" and isinstance(value, int | float):
        return duration(value)
    if isinstance(value, float):
        return f"{value:.6g}"
    return _text(value if isinstance(value, str) else json.dumps(value))


def _text(value: object) -> str:
    """Text as Markdown shows it: in one line, with nothing in it that Markdown or HTML would take for markup."""
    line = " ".join(str(value).split())
    escaped = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|#!~])", r"\\\1", escaped)
