"""What people say of an artifact: mutable, beside the manifest and under none of its digests.

objects/KIND/ID/notes.json    {"description": ..., "license": ...}
"""

import json
from dataclasses import asdict, dataclass

from rae.store.errors import ConfigError, CorruptData
from rae.store.manifest import Artifact
from rae.store.remote import LocalFolder, ObjectStore

NOTES_FILE = "notes.json"
_LONGEST = 10_000


@dataclass(frozen=True)
class Notes:
    """A description and a licence, both free text; empty where nobody has said anything."""

    description: str = ""
    license: str = ""


def read_notes(artifact: Artifact) -> Notes:
    """An artifact's notes; `CorruptData` for what are none."""
    objects, key = _place(artifact)
    data = objects.read(key)
    if data is None:
        return Notes()
    try:
        value = json.loads(data)
        notes = Notes(value["description"], value["license"])
        if not all(isinstance(text, str) and len(text) <= _LONGEST for text in asdict(notes).values()):
            raise TypeError("`description` and `license` must be text")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorruptData(f"{objects.place}/{key} holds no notes ({error})", f"rm {objects.place}/{key}") from error
    return notes


def write_notes(artifact: Artifact, notes: Notes) -> None:
    """Replace an artifact's notes, where it lies."""
    for name, text in asdict(notes).items():
        if len(text) > _LONGEST:
            raise ConfigError(f"the {name} has {len(text)} characters, and {_LONGEST} are the most")
    objects, key = _place(artifact)
    objects.replace(key, json.dumps(asdict(notes), ensure_ascii=False, indent=1).encode())


def _place(artifact: Artifact) -> tuple[ObjectStore, str]:
    if artifact.mirror is not None:
        return artifact.mirror.objects, f"{artifact.mirror.key}/{NOTES_FILE}"
    return LocalFolder(artifact.folder), NOTES_FILE
