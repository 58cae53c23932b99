"""`rae gc` and `rae rm`: what goes and why is said, and with `--delete` it goes."""

import shlex

from rae.pipeline.console import Console, size
from rae.store.artifacts import Workspace
from rae.store.errors import CorruptData
from rae.store.removal import Collector, Garbage, remove_artifact, remove_damaged

_SHOWN = 40


def collect_garbage(workspace: Workspace, grace: float, delete: bool, unfinished: bool, console: Console) -> None:
    """Say what nobody needs and has not been touched for `grace` seconds; with `delete`, remove it."""
    collector = Collector(workspace, grace, unfinished)
    found = collector.find()
    gone = [one for one in found if collector.remove(one)] if delete else []
    if console.as_json:
        console.print_json([_as_json(one) | {"removed": one in gone} for one in found])
        return
    for one in found[:_SHOWN]:
        verb = "" if not delete else "removed " if one in gone else "kept, since somebody needs it now: "
        console.say(f"{verb}{one.artifact or one.key}  {size(one.bytes)}  {one.why}")
    if len(found) > _SHOWN:
        console.say(f"{len(found) - _SHOWN} more; --json lists them all")
    if not found:
        console.say(f"{workspace.place} holds nothing that nobody needs")
    elif delete:
        console.say(f"removed {size(sum(one.bytes for one in gone))}")
    else:
        total = size(sum(one.bytes for one in found))
        again = shlex.join(["rae", "gc", "-w", workspace.place, "--delete"])
        console.say(f"{total} could go; nothing has been removed. To remove it: {again}, with the same options")


def remove(workspace: Workspace, ref: str, dry_run: bool, console: Console) -> None:
    """Remove an artifact, its milestones and its names; refuses what others were made from."""
    would = "would remove" if dry_run else "removed"
    try:
        artifact = workspace.resolve(ref)
    except CorruptData:
        if not remove_damaged(workspace, ref, dry_run):
            raise
        if console.as_json:
            console.print_json([{"ref": ref, "bytes": None, "removed": not dry_run}])
        console.say(f"{would} {ref}, which is damaged")
        return
    gone = remove_artifact(workspace, artifact, dry_run)
    if console.as_json:
        console.print_json([{"ref": one.ref, "bytes": one.payload_bytes, "removed": not dry_run} for one in gone])
    for one in gone:
        console.say(f"{would} {one.ref}  `{one.manifest.name}`  {size(one.payload_bytes)}")


def _as_json(garbage: Garbage) -> dict[str, object]:
    return {"key": garbage.key, "artifact": garbage.artifact, "bytes": garbage.bytes, "why": garbage.why}
