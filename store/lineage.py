"""What a workspace holds and how it hangs together: names, what was made of what, what is stale and why."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from rae.store.artifacts import Workspace
from rae.store.catalog import Damaged
from rae.store.manifest import Artifact, Json, differing_fields


@dataclass(frozen=True)
class Input:
    """What an artifact was made from, in the role it had; `artifact` is None if it does not lie in the workspace."""

    role: str
    ref: str
    content: str
    artifact: Artifact | None


class Lineage:
    """A workspace as it was when this was made. Artifacts are known by `KIND/ID`, which this module calls a ref.

    With `known`, manifests that were read before are not read again. `damaged` are those, and the names, that can't be,
    with the reason: what these were made from is not known.
    """

    def __init__(self, workspace: Workspace, known: "Lineage | None" = None) -> None:
        # Names first: what is published meanwhile is then known without a name, never named without being known.
        self.damaged: Damaged = {}
        self.names = workspace.names(self.damaged)
        self.unfinished = {f"{one.kind}/{one.id}": one for one in workspace.unfinished(self.damaged)}
        found = workspace.artifacts(known=known.artifacts if known is not None else None, damaged=self.damaged)
        self.artifacts: dict[str, Artifact] = {artifact.ref: artifact for artifact in found}
        self._named: dict[str, list[str]] = {}
        self._stale: dict[str, list[str]] = {}
        for name, ref in sorted(self.names.items()):
            self._named.setdefault(ref, []).append(name)

    def names_of(self, ref: str) -> list[str]:
        """The names, without their kind, that mean this artifact."""
        return [name.partition("/")[2] for name in self._named.get(ref, [])]

    def called(self, ref: str) -> str:
        """An artifact in a person's words: `KIND/NAME`, or `KIND/NAME@step=N`, or its ref if it has no name."""
        if ref in self._named:
            return self._named[ref][0]
        artifact = self.artifacts.get(ref)
        run = _run_of(artifact) if artifact is not None else None
        return f"{self.called(run)}@step={_step_of(artifact)}" if artifact is not None and run in self._named else ref

    def inputs(self, artifact: Artifact) -> list[Input]:
        """What an artifact was made from, by role."""
        given = ((role, one, f"{one['kind']}/{one['id']}") for role, one in artifact.manifest.inputs.items())
        return [Input(role, ref, str(one["content"]), self.artifacts.get(ref)) for role, one, ref in given]

    def dependents(self, ref: str) -> list[str]:
        """What was made from an artifact, or is being made from it: refs of artifacts, then of unfinished work."""
        done = [one.ref for one in self.artifacts.values() if ref in _refs(one.manifest.inputs)]
        return done + [other for other, one in self.unfinished.items() if ref in _refs(one.inputs)]

    def milestones(self, ref: str) -> list[str]:
        """What a training run published before its end."""
        return [one.ref for one in self.artifacts.values() if _run_of(one) == ref]

    def closure(self, refs: Iterable[str]) -> set[str]:
        """Refs, and all that they were made from; milestones, which have no name of their own, come with their run."""
        reached, waiting = set[str](), list(refs)
        runs: dict[str, list[str]] = {}
        for one in self.artifacts.values():
            if (run := _run_of(one)) is not None:
                runs.setdefault(run, []).append(one.ref)
        while waiting:
            ref = waiting.pop()
            if ref in reached:
                continue
            reached.add(ref)
            waiting += runs.get(ref, [])
            if ref in self.artifacts:
                waiting += _refs(self.artifacts[ref].manifest.inputs)
            elif ref in self.unfinished:
                waiting += _refs(self.unfinished[ref].inputs)
        return reached

    # ---- staleness ---------------------------------------------------------------------------------------------

    def stale(self, artifact: Artifact) -> list[str]:
        """Why an artifact is no longer what its name or the names of its inputs stand for; empty if it is.

        One whose inputs do not lie in the workspace is not stale for it: an artifact is self-contained.
        """
        if artifact.ref not in self._stale:
            self._stale[artifact.ref] = []  # manifests are untrusted: their inputs may run in circles
            self._stale[artifact.ref] = list(self._reasons(artifact))
        return self._stale[artifact.ref]

    def _reasons(self, artifact: Artifact) -> Iterator[str]:
        if (now := self._moved(artifact)) is not None:
            yield f"{artifact.kind}/{artifact.manifest.name} is now {now.ref} ({_fields(now, artifact)})"
        for one in self.inputs(artifact):
            if one.artifact is None:
                continue
            if one.artifact.manifest.content != one.content:
                yield f"its {one.role}, {one.ref}, hold other content than it was made from"
            elif (now := self._moved(one.artifact)) is not None:
                name = f"{one.artifact.kind}/{one.artifact.manifest.name}"
                yield f"made from {one.ref}, and {name} is now {now.ref} ({_fields(now, one.artifact)})"
            elif self.stale(one.artifact):
                yield f"made from {self.called(one.ref)}, which is stale"

    def _moved(self, artifact: Artifact) -> Artifact | None:
        """What an artifact's name means now, if that is another one and this one has no other name."""
        now = self.names.get(f"{artifact.kind}/{artifact.manifest.name}")
        if artifact.ref in self._named or now is None or now == artifact.ref:
            return None
        return self.artifacts.get(now)


def _fields(now: Artifact, before: Artifact) -> str:
    return "; ".join(differing_fields(now.manifest.recipe, before.manifest.recipe))


def _refs(inputs: Json) -> list[str]:
    return [f"{one['kind']}/{one['id']}" for one in inputs.values()]


def _run_of(artifact: Artifact) -> str | None:
    """The training run that an artifact is a milestone of."""
    match artifact.manifest.recipe.get("milestone"):
        case {"run": str(run)}:
            return f"{artifact.kind}/{run}"
    return None


def _step_of(artifact: Artifact) -> int:
    return int(artifact.manifest.recipe["milestone"]["step"])
