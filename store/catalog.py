"""What a workspace holds and what its names mean: read by all, and written by `rae.store.artifacts`."""

import contextlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rae.store.errors import ConfigError, CorruptData, MissingInput, StaleInput
from rae.store.json_data import parse_object
from rae.store.manifest import (
    ID,
    KINDS,
    Artifact,
    Json,
    Manifest,
    differing_fields,
    read_artifact,
    recipe_id,
)
from rae.store.milestones import Run, milestone, no_milestone
from rae.store.mirror import Mirror, mirror_root
from rae.store.remote import LocalFolder, open_objects

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_AT_STEP = re.compile(r"(?P<run>.+)@step=(?P<step>[0-9]{1,15})")
UPSTREAMS_FILE = "upstreams.json"
_TRAINED = ("decoder", "dit")
Damaged = dict[str, CorruptData]  # what can't be read, by `KIND/ID`, or of a name by its key, and why


@dataclass(frozen=True)
class Unfinished:
    """Work that was begun under a name and has not been published."""

    kind: str
    id: str
    name: str
    recipe: Json
    inputs: Json
    folder: Path


class Catalog:
    """Artifacts in a folder, which need not exist yet, or at a URL; writes nothing below it.

    `place` is the folder or the URL, `root` the folder in which work is done and artifacts are read: of a workspace at
    a URL a folder of the cache. What is not in it is looked for in `upstreams`, other workspaces that are only read: by
    default those of RAE_UPSTREAMS and of `upstreams.json` in the workspace. Raises `MissingInput` if the folder is
    there and cannot be read, `ConfigError` for a URL of another kind.
    """

    def __init__(self, place: str | Path, upstreams: Sequence[str] | None = None) -> None:
        self.objects = open_objects(place)
        self.place = self.objects.place
        self.is_local = isinstance(self.objects, LocalFolder)
        self.root = Path(self.place) if self.is_local else mirror_root(self.place)
        try:
            os.listdir(self.root)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise MissingInput(f"the workspace {self.place} cannot be read ({error.strerror})") from error

        named = self._upstreams() if upstreams is None else upstreams
        self.upstreams = tuple(Catalog(one, upstreams=()) for one in named if one != self.place)

    def folder(self, kind: str, id: str) -> Path:
        return self.root / "objects" / kind / id

    def _upstreams(self) -> list[str]:
        data = self.objects.read(UPSTREAMS_FILE)
        listed = parse_object(data, f"{self.place}/{UPSTREAMS_FILE}").get("upstreams") if data is not None else []
        if not isinstance(listed, list) or not all(isinstance(one, str) for one in listed):
            raise ConfigError(
                f'{self.place}/{UPSTREAMS_FILE} must hold {{"upstreams": [...]}}, folders or URLs of workspaces'
            )
        return [*listed, *os.environ.get("RAE_UPSTREAMS", "").split()]

    def find(self, kind: str, recipe: Mapping[str, Any]) -> Artifact | None:
        """The artifact of exactly this recipe, here or upstream, or None."""
        artifact = self.published(kind, recipe_id(recipe))
        if artifact is not None and (fields := list(differing_fields(recipe, artifact.manifest.recipe))):
            raise CorruptData(
                f"{artifact.folder} answers to this recipe's id with another recipe ({'; '.join(fields)})"
            )
        return artifact

    def published(self, kind: str, id: str) -> Artifact | None:
        """What is published under this kind and id, here or else upstream."""
        found = (one._read(kind, id) for one in (self, *self.upstreams))
        return next((artifact for artifact in found if artifact is not None), None)

    def _read(self, kind: str, id: str) -> Artifact | None:
        """What is published under this kind and id; `CorruptData` if it says that it is something else."""
        key = f"objects/{kind}/{id}"
        data = self.objects.read(f"{key}/manifest.json")
        if data is None:
            return None
        where = f"{self.place}/{key}/manifest.json"
        manifest = Manifest.from_json(data, where)
        if (manifest.kind, manifest.id) != (kind, id):
            raise CorruptData(f"{where} is the manifest of {manifest.kind}/{manifest.id}")
        if self.is_local:
            return Artifact(self.folder(kind, id), manifest)
        mirror = Mirror(self.objects, key, self.folder(kind, id))
        mirror.begin(data)
        return Artifact(mirror.folder, manifest, mirror)

    def artifacts(
        self, *kinds: str, known: Mapping[str, Artifact] | None = None, damaged: Damaged | None = None
    ) -> Iterator[Artifact]:
        """Every artifact (of these kinds) that is published here, by kind and id; those of `known` are not read.

        `CorruptData` for one that can't be read; where `damaged` is given, that stands in there by its `KIND/ID`.
        """
        for kind in kinds or KINDS:
            for id in self.objects.folders(f"objects/{kind}"):
                with _noting(damaged, f"{kind}/{id}"):
                    artifact = (known or {}).get(f"{kind}/{id}") or self._read(kind, id)
                    if artifact is not None:
                        yield artifact

    def unfinished(self, damaged: Damaged | None = None) -> Iterator[Unfinished]:
        """Everything begun and not published; `damaged` as of `artifacts`."""
        for kind in KINDS:
            for id in self.objects.folders(f"objects/{kind}"):
                if self.objects.read(f"objects/{kind}/{id}/manifest.json") is None:
                    with _noting(damaged, f"{kind}/{id}"):
                        if started := self._started(kind, id):
                            yield Unfinished(kind, id, **started, folder=self.folder(kind, id))

    def names(self, damaged: Damaged | None = None) -> dict[str, str]:
        """What every `KIND/NAME` means, as `KIND/ID`, whether that is there or not; `damaged` as of `artifacts`."""
        found = {}
        for stored in self.objects.below("refs"):
            match stored.key.removesuffix(".json").split("/"):
                case ["refs", kind, name] if kind in KINDS and _NAME.fullmatch(name):
                    with _noting(damaged, stored.key):
                        meaning = parse_object(self.objects.read(stored.key) or b"{}", f"{self.place}/{stored.key}")
                        id = meaning.get("id")
                        if isinstance(id, str) and ID.fullmatch(id):
                            found[f"{kind}/{name}"] = f"{kind}/{id}"
        return found

    def resolve(self, ref: str, kind: str | None = None) -> Artifact:
        """The artifact a REF means: `KIND/NAME`, `KIND/ID`, a path, or a bare name or id if it is unique.

        `REF@step=N` means the milestone that a training run published at step N, whether the run is done or not.
        """
        if at := _AT_STEP.fullmatch(ref):
            found = self._at_step(at["run"], int(at["step"]), kind)
        elif (Path(ref) / "manifest.json").is_file():
            found = [read_artifact(Path(ref))]
        else:
            kinds, name = _kinds_and_name(ref, (kind,) if kind else KINDS)
            found = [artifact for one in kinds if (artifact := self._named(one, name))]
        if not found:
            raise MissingInput(
                f"no {kind or 'artifact'} `{ref}` in the workspace {self.place}", f"rae status -w {self.place}"
            )
        if len(found) > 1:
            kinds_found = ", ".join(f"{artifact.kind}/{ref}" for artifact in found)
            raise ConfigError(f"`{ref}` is ambiguous; say which of {kinds_found} is meant")
        if kind and found[0].kind != kind:
            raise StaleInput(f"`{ref}` is of kind {found[0].kind}, and {kind} is needed here")
        return found[0]

    def _named(self, kind: str, name: str) -> Artifact | None:
        if not _NAME.fullmatch(name):
            return None
        key, id = f"refs/{kind}/{name}.json", name
        for one in (self, *self.upstreams):
            if (ref := one.objects.read(key)) is not None:
                id = str(parse_object(ref, f"{one.place}/{key}").get("id"))
                break
        return self.published(kind, id) if ID.fullmatch(id) else None

    def _at_step(self, ref: str, step: int, kind: str | None) -> list[Artifact]:
        """What the runs that `ref` may mean published at a step; of runs of one kind, a finished one is meant."""
        found, runs = dict[str, Artifact](), self.runs(ref, kind)
        for run in runs:
            if artifact := milestone(self.published, run, step):
                found.setdefault(run.kind, artifact)
        if runs and not found:
            raise no_milestone(self.artifacts(runs[0].kind), runs[0], step)
        return list(found.values())

    def runs(self, ref: str, kind: str | None = None) -> list[Run]:
        """The training runs that a REF may mean, finished ones first, then those at work under that name or id."""
        if (Path(ref) / "manifest.json").is_file():
            done, unfinished = [read_artifact(Path(ref))], list[Unfinished]()
        else:
            kinds, name = _kinds_and_name(ref, (kind,) if kind else _TRAINED)
            done = [artifact for one in kinds if (artifact := self._named(one, name))]
            unfinished = [one for one in self.unfinished() if one.kind in kinds and name in (one.name, one.id)]
        runs = [Run(one.kind, one.manifest.recipe, one.folder) for one in done]
        return runs + [Run(one.kind, one.recipe, one.folder) for one in unfinished]

    def _started(self, kind: str, id: str) -> Json | None:
        """Name, recipe and inputs of work that has begun; None if none has."""
        key = f"objects/{kind}/{id}"
        data = self.objects.read(f"{key}/started.json")
        if data is None:
            return None
        started = parse_object(data, f"{self.place}/{key}/started.json")
        fields = {key: type(value) for key, value in started.items()}
        # The folder is called by the digest of the recipe, so that no damage in one goes unseen.
        if fields != {"name": str, "recipe": dict, "inputs": dict} or recipe_id(started["recipe"]) != id:
            raise CorruptData(
                f"{self.place}/{key}/started.json does not say what was begun there", f"rm -r {self.place}/{key}"
            )
        return started


@contextlib.contextmanager
def _noting(damaged: Damaged | None, what: str) -> Iterator[None]:
    """`CorruptData` that is raised meanwhile stands in `damaged` instead, if that is given."""
    try:
        yield
    except CorruptData as error:
        if damaged is None:
            raise
        damaged[what] = error


def check_name(name: str) -> None:
    """Refuse names that could lead out of the workspace or be taken for an id."""
    if not _NAME.fullmatch(name) or ID.fullmatch(name):
        raise ConfigError(f"`{name}` can't be a name: letters, digits, '.', '_', '-', up to 100, not 16 hex digits")


def _kinds_and_name(ref: str, kinds: tuple[str, ...]) -> tuple[tuple[str, ...], str]:
    """`KIND/NAME` apart; a bare name may be of any of `kinds`."""
    head, _, tail = ref.partition("/")
    return ((head,), tail) if tail and head in KINDS else (kinds, ref)
