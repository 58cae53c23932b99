"""What an artifact says of itself: recipe, content, lineage, files, and how its id follows from its recipe."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from rae.store.errors import CorruptData
from rae.store.mirror import Mirror

SCHEMA = 1
KINDS = ("shards", "latents", "decoder", "dit", "samples", "reference", "scores")

# An id as `recipe_id` makes it.
ID = re.compile(r"[0-9a-f]{16}")
ABSENT = object()  # in place of a value that only the other side has

Json = dict[str, Any]


def canonical(value: Any) -> bytes:
    """The one spelling of a JSON value that digests are taken over."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def recipe_id(recipe: Mapping[str, Any]) -> str:
    """An artifact's id: the first 16 hex digits of the sha256 of its canonical recipe."""
    return hashlib.sha256(canonical(recipe)).hexdigest()[:16]


def milestone_recipe(run: Mapping[str, Any], step: int) -> Json:
    """The recipe of what a training run, given by its recipe, publishes at a step before its end."""
    return {**run, "milestone": {"run": recipe_id(run), "step": step}}


def differences(asked: Any, found: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """The dotted fields in which two recipes differ, with what is found and what is asked there, or `ABSENT`."""
    if isinstance(asked, Mapping) and isinstance(found, Mapping):
        for key in sorted(asked.keys() | found.keys()):
            one, other = (side.get(key, ABSENT) for side in (asked, found))
            yield from differences(one, other, f"{prefix}.{key}" if prefix else str(key))
    elif asked is ABSENT or found is ABSENT or canonical(asked) != canonical(found):
        yield prefix, found, asked


def differing_fields(asked: Any, found: Any, prefix: str = "") -> Iterator[str]:
    """The `differences` of two recipes as sentences `field: found X, asked Y`."""
    for field_name, one, other in differences(asked, found, prefix):
        yield f"{field_name}: found {_short(one)}, asked {_short(other)}"


def _short(value: Any) -> str:
    text = "nothing" if value is ABSENT else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


@dataclass(frozen=True)
class Manifest:
    """The published description of an artifact.

    `inputs` maps a role to {kind, id, content}; `files` lists {path, bytes, sha256} relative to the artifact's folder;
    `metrics` are the numbers a person wants; `provenance` is what does not change the result. On the disk the manifest
    carries its own digest, so that no flipped bit in it goes unseen.
    """

    kind: str
    name: str
    recipe: Json
    content: str
    inputs: dict[str, Json]
    config: Json
    files: list[Json]
    metrics: Json
    provenance: Json = field(default_factory=dict)
    schema: int = SCHEMA

    @property
    def id(self) -> str:
        return recipe_id(self.recipe)

    def to_json(self) -> bytes:
        value = json.loads(canonical({**asdict(self), "id": self.id}))  # as it will be read back
        value["digest"] = hashlib.sha256(canonical(value)).hexdigest()
        return (json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()

    @classmethod
    def from_json(cls, data: bytes, where: str) -> Self:
        """Read an untrusted manifest; `CorruptData` says what in it does not hold."""
        try:
            value = json.loads(data, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            raise CorruptData(f"{where} is not JSON ({error})") from error
        fields: dict[str, type] = {"kind": str, "name": str, "recipe": dict, "content": str, "inputs": dict}
        fields |= {"config": dict, "files": list, "metrics": dict, "provenance": dict, "schema": int, "id": str}
        fields |= {"digest": str}
        schema = value.get("schema") if isinstance(value, dict) else None
        if type(schema) is int and schema > SCHEMA:
            raise CorruptData(f"{where} has schema {schema}; this version of rae reads up to {SCHEMA}")
        if not isinstance(value, dict) or set(value) != set(fields):
            raise CorruptData(f"{where} is not a manifest: its fields must be {', '.join(sorted(fields))}")
        for key, kind in fields.items():
            if type(value[key]) is not kind:
                raise CorruptData(f"{where}: `{key}` must be {kind.__name__}")
        if value["kind"] not in KINDS:
            raise CorruptData(f"{where}: `kind` is {value['kind']!r}, not one of {', '.join(KINDS)}")
        claimed, _ = value.pop("id"), value.pop("digest")
        manifest = cls(**value)
        if manifest.id != claimed:
            raise CorruptData(f"{where}: its recipe gives the id {manifest.id}, not {claimed}")
        for role, one in manifest.inputs.items():
            _check_input(role, one, where)
        for entry in manifest.files:
            _check_file_entry(entry, where)
        if manifest.to_json() != data:
            raise CorruptData(f"{where} is damaged: it does not match its own digest")
        return manifest


@dataclass(frozen=True)
class Artifact:
    """A published artifact: its folder and what it says of itself.

    `mirror` is of artifacts that lie elsewhere: then `folder` is one of this machine's cache, and holds what was asked
    for.
    """

    folder: Path
    manifest: Manifest
    mirror: Mirror | None = None

    @property
    def kind(self) -> str:
        return self.manifest.kind

    @property
    def id(self) -> str:
        return self.manifest.id

    @property
    def key(self) -> str:
        """Where it lies below any workspace."""
        return f"objects/{self.kind}/{self.id}"

    @property
    def ref(self) -> str:
        """`KIND/ID`."""
        return f"{self.kind}/{self.id}"

    @property
    def payload_bytes(self) -> int:
        """Bytes of the payload, as the manifest has them; of latents with their parts, which it does not list."""
        parts = self.manifest.metrics.get("bytes") if self.kind == "latents" else 0
        return sum(int(entry["bytes"]) for entry in self.manifest.files) + (parts if type(parts) is int else 0)

    @property
    def payload(self) -> Path:
        """The folder of the payload: the winning attempt's, or the artifact's own (latents, shards at a path).

        Of an artifact that lies elsewhere, the payload's files are there when this returns: all but checkpoints, which
        `checkpoint` is for, and the latents themselves, which are read where they lie. `CorruptData` if a link among
        the files leads out of the artifact.
        """
        self._bring([entry for entry in self.manifest.files if not _of_checkpoint(entry)])
        self._check_links()
        return self.folder if self.attempt is None else self.folder / "attempts" / self.attempt

    @property
    def attempt(self) -> str | None:
        """The name of the attempt that was published; None where the payload is the artifact's own folder."""
        for entry in self.manifest.files:
            parts = Path(entry["path"]).parts
            if parts[0] == "attempts":
                return parts[1]
        return None

    @property
    def checkpoint(self) -> Path | None:
        """The folder of the last checkpoint of a training run; None if it is published without one."""
        files = [entry for entry in self.manifest.files if _of_checkpoint(entry)]
        self._bring(files)
        return self.folder / Path(files[0]["path"]).parent if files else None

    def _check_links(self) -> None:
        """`CorruptData` if a link among the files leads out of the artifact, which others may have made."""
        inside = self.folder.resolve()
        for entry in self.manifest.files:
            if not (path := self.folder / entry["path"]).resolve().is_relative_to(inside):
                raise CorruptData(f"{path} is a link that leads out of the artifact")

    def _bring(self, files: list[Json]) -> None:
        if self.mirror is not None:
            self.mirror.bring(files)

    def as_input(self) -> Json:
        """How this artifact stands in the `inputs` of what is made from it."""
        return {"kind": self.kind, "id": self.id, "content": self.manifest.content}


def read_artifact(folder: Path) -> Artifact:
    """Read the manifest in `folder`; `CorruptData` if it does not hold."""
    where = folder / "manifest.json"
    return Artifact(folder, Manifest.from_json(where.read_bytes(), str(where)))


def _of_checkpoint(entry: Json) -> bool:
    return "/checkpoints/" in entry["path"]


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _check_input(role: str, one: Any, where: str) -> None:
    if not isinstance(one, dict) or not all(isinstance(one.get(key), str) for key in ("kind", "id", "content")):
        raise CorruptData(f"{where}: the input `{role}` needs kind, id and content")
    if one["kind"] not in KINDS or not ID.fullmatch(one["id"]):
        raise CorruptData(f"{where}: the input `{role}` is no artifact: {one['kind']!r}, {one['id']!r}")


def _check_file_entry(entry: Any, where: str) -> None:
    good = isinstance(entry, dict) and isinstance(entry.get("path"), str) and type(entry.get("bytes")) is int
    if not good or not isinstance(entry.get("sha256"), str):
        raise CorruptData(f"{where}: every entry of `files` needs path, bytes and sha256")
    parts = entry["path"].split("/")
    if {"", ".", ".."} & set(parts) or "\\" in entry["path"] or "\0" in entry["path"]:
        raise CorruptData(f"{where}: the file path {entry['path']!r} does not lead to a file of the artifact")
    if parts[0] == "attempts" and len(parts) < 3:
        raise CorruptData(f"{where}: the file path {entry['path']!r} lies in no attempt")
