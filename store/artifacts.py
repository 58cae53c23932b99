"""Artifacts in a workspace: found by recipe, begun, published once, named.

WORKSPACE/objects/KIND/ID/manifest.json     published last; done means it exists
WORKSPACE/objects/KIND/ID/started.json      name and recipe of work that has begun
WORKSPACE/objects/KIND/ID/...               payload: latents' parts, or attempts/RANDOM/ for every other kind
WORKSPACE/refs/KIND/NAME.json               mutable name -> id
"""

import contextlib
import json
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rae.store.catalog import Catalog, Unfinished, check_name
from rae.store.errors import CorruptData, Overtaken, StaleInput
from rae.store.manifest import Artifact, Json, Manifest, differing_fields, milestone_recipe, recipe_id
from rae.store.publish import make_folder


@dataclass(frozen=True)
class Work:
    """Begun and unfinished: where an attempt writes, and the earlier attempts it can take over from."""

    kind: str
    name: str
    recipe: Json
    folder: Path
    attempt: Path
    earlier: tuple[Path, ...]


class Workspace(Catalog):
    """A catalog that is also written to."""

    def begin(self, kind: str, name: str, recipe: Json, inputs: Mapping[str, Json], restart: bool = False) -> Work:
        """Start or continue the work of a recipe.

        `StaleInput` when other work is unfinished under the same name, or when an input's content has changed since
        this work began; `restart` drops such work.
        """
        check_name(name)
        id, folder = recipe_id(recipe), self.folder(kind, recipe_id(recipe))
        for other in self.unfinished():
            if other.kind == kind and other.name == name and other.id != id:
                fields = "; ".join(differing_fields(recipe, other.recipe))
                self._drop(other, f"unfinished {kind} `{name}` was begun with other settings ({fields})", restart)
        make_folder(folder)
        started = {"name": name, "recipe": recipe, "inputs": dict(inputs)}
        beginning = json.dumps(started, indent=1, sort_keys=True).encode()
        if not self.objects.create(f"objects/{kind}/{id}/started.json", beginning):
            before = self._started(kind, id)
            if before is None:  # whoever began it has just abandoned it
                return self.begin(kind, name, recipe, inputs)
            if fields := "; ".join(differing_fields(dict(inputs), before["inputs"])):
                changed = f"an input of the unfinished {kind} `{name}` has changed since it began ({fields})"
                self._drop(Unfinished(kind, id, name, recipe, dict(inputs), folder), changed, restart)
                return self.begin(kind, name, recipe, inputs)
        if not self.is_local:
            from rae.store.sending import fetch_unfinished

            fetch_unfinished(self.objects, f"objects/{kind}/{id}", folder)
        attempts = sorted(folder.glob("attempts/*"), key=lambda path: path.stat().st_mtime, reverse=True)
        attempt = folder
        if kind != "latents":  # latents' parts are shared by all who write them: each part is published for itself
            attempt = _new_attempt(folder)
        return Work(kind, name, recipe, folder, attempt, tuple(attempts))

    def sending(self, work: Work) -> contextlib.AbstractContextManager[object]:
        """While it lasts, what `work` has done is sent to where the workspace lies, if that is elsewhere."""
        if self.is_local:
            return contextlib.nullcontext()
        from rae.store.sending import Sending

        below = work.attempt.relative_to(self.root).as_posix()
        return Sending(self.objects, below, work.attempt)

    def abandon(self, work: Work) -> None:
        """Forget a beginning that came to nothing, so that it stands in nobody's way; anything written stays."""
        with contextlib.suppress(OSError):  # `rmdir` refuses a folder that holds something
            if work.attempt != work.folder:
                work.attempt.rmdir()
                work.attempt.parent.rmdir()
            key = f"objects/{work.kind}/{recipe_id(work.recipe)}"
            if [one.key for one in self.objects.below(key)] == [f"{key}/started.json"]:
                self.objects.remove(f"{key}/started.json")
                work.folder.rmdir()

    def begin_milestone(self, run: Work, step: int) -> Work:
        """Where what a training run publishes at a step is to be written; it is begun and unfinished with the run."""
        recipe = milestone_recipe(run.recipe, step)
        folder = self.folder(run.kind, recipe_id(recipe))
        return Work(run.kind, f"{run.name}@step={step}", recipe, folder, _new_attempt(folder), ())

    def publish(self, work: Work, manifest: Manifest) -> Artifact:
        """Publish what `work` made, or adopt what somebody else published first; the name then points to it.

        A milestone takes no name of its own: it is found by its run's. Raises `Overtaken` where parts were made
        otherwise by others, who were first: theirs lie in the folder then, and what describes all parts is made anew.
        """
        key = f"objects/{work.kind}/{recipe_id(work.recipe)}"
        if not self.is_local:
            self._send(work, manifest)
        self.objects.create(f"{key}/manifest.json", manifest.to_json())
        artifact = self.find(work.kind, work.recipe)
        if artifact is None:
            raise CorruptData(f"{self.place}/{key}/manifest.json vanished right after it was published")
        if "milestone" not in work.recipe:
            self.name(artifact, work.name)
        return artifact

    def _send(self, work: Work, manifest: Manifest) -> None:
        from rae.store.sending import fetch_unfinished
        from rae.store.transfer import send_work

        made = Artifact(work.folder, manifest)
        there = self.objects.read(f"{made.key}/manifest.json")
        if there is not None:
            if Manifest.from_json(there, f"{self.place}/{made.key}/manifest.json").content != manifest.content:
                shutil.rmtree(work.folder)  # the folder is to show what lies there
            return
        try:
            send_work(self.objects, self.root, made)
        except Overtaken:
            fetch_unfinished(self.objects, made.key, work.folder)
            raise

    def name(self, artifact: Artifact, name: str) -> None:
        """Let `KIND/NAME` mean this artifact."""
        check_name(name)
        key, data = f"refs/{artifact.kind}/{name}.json", json.dumps({"id": artifact.id}).encode()
        if self.objects.read(key) != data:
            self.objects.replace(key, data)

    def forget(self, kind: str, name: str) -> None:
        """Let `KIND/NAME` mean nothing."""
        self.objects.remove(f"refs/{kind}/{name}.json")

    def _drop(self, work: Unfinished, why: str, allowed: bool) -> None:
        """Remove unfinished work, which nothing published can refer to; `StaleInput` says why unless it is allowed."""
        if not allowed:
            raise StaleInput(f"{why}; --restart drops what it has done")
        self.objects.remove(f"objects/{work.kind}/{work.id}")
        if not self.is_local:
            shutil.rmtree(work.folder, ignore_errors=True)

    def name_if_free(self, artifact: Artifact, name: str) -> bool:
        """Let `KIND/NAME` mean this artifact unless it means another; returns whether it does."""
        check_name(name)
        key, data = f"refs/{artifact.kind}/{name}.json", json.dumps({"id": artifact.id}).encode()
        return self.objects.create(key, data) or self.objects.read(key) == data

    def adopt(self, artifact: Artifact) -> None:
        """Publish an artifact of another workspace whose payload has been brought here.

        `StaleInput` if another content was published under its id meanwhile.
        """
        self.objects.create(f"{artifact.key}/manifest.json", artifact.manifest.to_json())
        found = self._read(artifact.kind, artifact.id)
        if found is None or found.manifest.content != artifact.manifest.content:
            raise StaleInput(f"{self.place} has just got another content of {artifact.kind}/{artifact.id}")

    def arrived_bytes(self, artifact: Artifact) -> int:
        """How much of an artifact's payload has arrived here."""
        return sum(stored.bytes for stored in self.objects.below(artifact.key))


def _new_attempt(folder: Path) -> Path:
    attempt = folder / "attempts" / secrets.token_hex(4)
    make_folder(attempt)
    return attempt
