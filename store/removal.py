"""Taking things out of a workspace: what nobody needs any more, or one artifact that a person names.

Nothing goes while somebody works: what names mean, what leases hold, what is younger than the grace period, and all
that any of these were made from stays. A manifest goes first, so that no reader finds an artifact of which half is
gone; then names and leases are read again, and whoever took an interest in between gets it back. What is damaged may
have been made from anything: nothing but itself goes while it is there.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from rae.store.artifacts import Workspace
from rae.store.errors import ConfigError, CorruptData
from rae.store.lease import LAPSES_AFTER_S, lapsed, leased
from rae.store.lineage import Lineage
from rae.store.manifest import KINDS, Artifact
from rae.store.remote import ObjectStore

_LEFT_BEHIND = ".*.partial"  # as `temporary_name` calls what is not published yet; a bucket has none


@dataclass(frozen=True)
class Garbage:
    """Something that nobody needs: the key of an object or a folder, why, and `KIND/ID` if it is a whole artifact."""

    key: str
    why: str
    bytes: int
    artifact: str | None = None


class Collector:
    """Finds and removes what nobody needs in a workspace, upstreams excluded.

    `grace` is in seconds: younger things stay, since somebody may have just made them. With `unfinished`, work that was
    begun and has not been touched for as long goes, too; it could be continued.
    """

    def __init__(self, workspace: Workspace, grace: float, unfinished: bool = False) -> None:
        self._workspace, self._objects = workspace, workspace.objects
        self._grace, self._unfinished = grace, unfinished
        self._lineage: Lineage | None = None
        self._old = set[str]()

    def find(self) -> list[Garbage]:
        """What `remove` would remove: artifacts first, each before what it was made from.

        Raises `CorruptData` if a manifest or a name cannot be read: what it protects is not known then.
        """
        self._lineage = lineage = Lineage(self._workspace)
        _check_known(self._workspace, lineage)
        self._old = {ref for ref in lineage.artifacts if self._age(f"{_key(ref)}/manifest.json") >= self._grace}
        kept, busy = self._kept(lineage)
        going = [one for ref, one in lineage.artifacts.items() if ref not in kept]
        found = [self._garbage(_key(one.ref), _why(lineage, one), one.ref) for one in _users_first(going, lineage)]
        for kind in KINDS:
            for id in self._objects.folders(f"objects/{kind}"):
                ref = f"{kind}/{id}"
                if ref not in busy and (ref in kept or ref not in lineage.artifacts):
                    found += self._leftovers(lineage, ref)
        left = [*lapsed(self._objects), *self._temporary(busy)]
        return found + [self._garbage(key, "left behind by a process that was killed") for key in left]

    def remove(self, garbage: Garbage) -> bool:
        """Remove one of what `find` found; False if somebody has come to need it since."""
        if garbage.artifact is not None:
            return _remove_artifact(self._objects, garbage.artifact, self._wanted_now)
        if _owner(garbage.key) in leased(self._objects):
            return False
        if self._objects.read(f"{garbage.key}/manifest.json") is not None:  # what was unfinished has been finished
            return False
        self._objects.remove(garbage.key)
        return True

    def _wanted_now(self, ref: str) -> bool:
        self._lineage = lineage = Lineage(self._workspace, self._lineage)
        return bool(lineage.damaged) or ref in self._kept(lineage)[0]

    def _kept(self, lineage: Lineage) -> tuple[set[str], set[str]]:
        """What stays, and what of it somebody is at work on."""
        busy = leased(self._objects)
        young = lineage.artifacts.keys() - self._old  # whatever has been published since `find` looked is young
        begun = {ref for ref in lineage.unfinished if not self._unfinished or not self._is_old(_key(ref))}
        return lineage.closure({*lineage.names.values(), *young, *begun, *busy}), busy

    def _leftovers(self, lineage: Lineage, ref: str) -> Iterator[Garbage]:
        """What lies in an artifact's folder and is no part of it; all of it if nothing there says what it is."""
        key = _key(ref)
        if ref in lineage.artifacts:
            payload = lineage.artifacts[ref].attempt
            for attempt in self._objects.folders(f"{key}/attempts"):
                if attempt != payload and self._is_old(f"{key}/attempts/{attempt}"):
                    why = f"an attempt at {lineage.called(ref)} that came to nothing"
                    yield self._garbage(f"{key}/attempts/{attempt}", why)
        elif ref in lineage.unfinished:
            if self._unfinished and self._is_old(key):
                yield self._garbage(key, f"unfinished work of `{lineage.unfinished[ref].name}`")
        elif self._is_old(key):
            yield self._garbage(key, "left behind: nothing says what it is")

    def _temporary(self, busy: set[str]) -> Iterator[str]:
        """What killed processes were writing. Younger than a lease's life it may be anybody's: not all hold leases."""
        if not self._workspace.is_local:
            return
        root, needed = self._workspace.root, max(self._grace, LAPSES_AFTER_S)
        for path in root.rglob(_LEFT_BEHIND):
            key = path.relative_to(root).as_posix()
            if _owner(key) not in busy and self._age(key) >= needed and self._is_old(key):
                yield key

    def _is_old(self, key: str) -> bool:
        """Whether nothing below a folder has been written for the grace period."""
        return time.time() - max((one.written for one in self._objects.below(key)), default=0.0) >= self._grace

    def _age(self, key: str) -> float:
        written = self._objects.written(key)
        return time.time() - written if written is not None else 0.0

    def _garbage(self, key: str, why: str, artifact: str | None = None) -> Garbage:
        return Garbage(key, why, sum(one.bytes for one in self._objects.below(key)), artifact)


def remove_artifact(workspace: Workspace, artifact: Artifact, dry_run: bool = False) -> list[Artifact]:
    """Remove an artifact with its milestones and its names; returns what goes, the artifact last.

    Raises `ConfigError` for one that others were made from, that somebody is at work with, or that lies elsewhere;
    `CorruptData` if something is damaged that may have been made from it.
    """
    lineage = Lineage(workspace)
    _check_known(workspace, lineage)
    if artifact.folder.resolve() != workspace.folder(artifact.kind, artifact.id).resolve():
        raise ConfigError(f"{artifact.folder} lies outside of the workspace {workspace.place}, which alone is changed")
    going = [lineage.artifacts[ref] for ref in lineage.milestones(artifact.ref)] + [artifact]
    _remove_named(workspace, lineage, [one.ref for one in going], dry_run)
    return going


def remove_damaged(workspace: Workspace, ref: str, dry_run: bool = False) -> bool:
    """Remove the artifact of this `KIND/ID`, whose manifest can't be read, with its names; False if there is none.

    Raises `ConfigError` as `remove_artifact` does.
    """
    lineage = Lineage(workspace)
    if ref not in lineage.damaged:
        return False
    _remove_named(workspace, lineage, [ref], dry_run)
    return True


def _remove_named(workspace: Workspace, lineage: Lineage, refs: list[str], dry_run: bool) -> None:
    """Remove these with their names; `ConfigError`, in terms of the last, if one is needed."""
    needing = sorted({lineage.called(other) for ref in refs for other in lineage.dependents(ref)} - set(refs))
    if needing:
        raise ConfigError(
            f"{lineage.called(refs[-1])} can't be removed: {', '.join(needing)} {_be(needing)} made from it",
            f"rae rm {needing[0]} -w {workspace.place}",
        )
    if lineage.closure(leased(workspace.objects)).intersection(refs):
        raise ConfigError(f"{lineage.called(refs[-1])} can't be removed: somebody is at work with it")
    for ref in [] if dry_run else refs:
        _remove_artifact(workspace.objects, ref, lambda _: False)
        for name in lineage.names_of(ref):
            workspace.forget(ref.partition("/")[0], name)


def _check_known(workspace: Workspace, lineage: Lineage) -> None:
    """`CorruptData` if something is damaged: what it was made from is not known."""
    for ref, error in lineage.damaged.items():
        others = f" (and {len(lineage.damaged) - 1} more)" if len(lineage.damaged) > 1 else ""
        told = f"{error.message}{others}: what it stands on is not known, so that nothing else is removed"
        mend = None if ref.startswith("refs/") else f"rae rm {ref} -w {workspace.place}"
        raise CorruptData(told, error.next_command or mend)


def _be(several: list[str]) -> str:
    return "is" if len(several) == 1 else "are"


def _remove_artifact(objects: ObjectStore, ref: str, wanted: Callable[[str], bool]) -> bool:
    """Withdraw an artifact, then remove it; unless `wanted` says, once it is withdrawn, that somebody needs it."""
    key = _key(ref)
    objects.remove(f"{key}/started.json")  # else it would look like unfinished work
    data = objects.read(f"{key}/manifest.json")
    if data is None:
        return False
    objects.remove(f"{key}/manifest.json")
    if wanted(ref):
        objects.create(f"{key}/manifest.json", data)
        return False
    objects.remove(key)
    return True


def _key(ref: str) -> str:
    return f"objects/{ref}"


def _owner(key: str) -> str | None:
    """The `KIND/ID` in whose folder something lies."""
    top, *below = key.split("/")
    return "/".join(below[:2]) if top == "objects" else None


def _users_first(artifacts: list[Artifact], lineage: Lineage) -> list[Artifact]:
    """Artifacts, each before those that it was made from: cut short anywhere, nothing is left without its inputs."""
    return sorted(artifacts, key=lambda one: len(lineage.closure([one.ref])), reverse=True)


def _why(lineage: Lineage, artifact: Artifact) -> str:
    now = lineage.names.get(f"{artifact.kind}/{artifact.manifest.name}")
    return "has no name" + (f": {artifact.kind}/{artifact.manifest.name} is now {now}" if now else "")
