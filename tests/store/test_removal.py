"""What nobody needs goes; what a name, a lease, the grace period or anything of these stands on stays."""

import os
import time
from pathlib import Path

import pytest

from rae.store.artifacts import Workspace
from rae.store.errors import ConfigError, CorruptData
from rae.store.lease import held
from rae.store.manifest import Artifact
from rae.store.removal import Collector, Garbage, remove_artifact, remove_damaged
from tests.store.making import describe, make, recipe


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path / "workspace")


def collect(workspace: Workspace, grace: float = 0.0, unfinished: bool = False) -> list[Garbage]:
    """Collect garbage; what was removed."""
    collector = Collector(workspace, grace, unfinished)
    return [one for one in collector.find() if collector.remove(one)]


def there(*artifacts: Artifact) -> list[bool]:
    return [(one.folder / "manifest.json").is_file() for one in artifacts]


def age(path: Path, hours: float = 48.0) -> None:
    then = time.time() - hours * 3600
    for one in [*path.rglob("*"), path]:
        os.utime(one, (then, then), follow_symlinks=False)


def test_what_has_no_name_and_no_use_goes_with_all_that_it_alone_was_made_from(workspace: Workspace) -> None:
    shared, alone = make(workspace, "shards", seed=1), make(workspace, "decoder", name="alone")
    old = make(workspace, "latents", inputs={"shards": shared}, seed=1)
    older = make(workspace, inputs={"latents": old, "init_from": alone}, seed=1)
    new = make(workspace, "latents", inputs={"shards": shared}, seed=2)
    dit = make(workspace, inputs={"latents": new}, seed=2)
    workspace.forget("decoder", "alone")
    gone = collect(workspace)
    assert gone[0].artifact == older.ref  # before what it was made from
    assert {one.artifact for one in gone} == {old.ref, older.ref, alone.ref}
    assert there(shared, new, dit) == [True] * 3
    assert not any(one.folder.exists() for one in (old, older, alone))
    assert not collect(workspace)


def test_lineage_of_what_has_a_name_is_kept_without_a_name(workspace: Workspace) -> None:
    latents = make(workspace, "latents", seed=1)
    dit = make(workspace, inputs={"latents": latents})
    make(workspace, "latents", seed=2)  # the name moves on
    assert not collect(workspace)
    assert there(latents, dit) == [True, True]


def test_finding_removes_nothing(workspace: Workspace) -> None:
    artifact = make(workspace)
    workspace.forget("dit", "mine")
    (found,) = Collector(workspace, 0.0).find()
    assert (found.artifact, found.bytes > 64) == (artifact.ref, True)
    assert there(artifact) == [True]


def test_what_is_younger_than_the_grace_period_stays(workspace: Workspace) -> None:
    artifact = make(workspace)
    workspace.forget("dit", "mine")
    assert not collect(workspace, grace=24 * 3600)
    age(artifact.folder, hours=25)
    assert [one.artifact for one in collect(workspace, grace=24 * 3600)] == [artifact.ref]


def test_leases_hold_what_is_worked_on_and_what_it_was_made_from(workspace: Workspace) -> None:
    latents = make(workspace, "latents")
    dit = make(workspace, inputs={"latents": latents})
    for kind in ("latents", "dit"):
        workspace.forget(kind, "mine")
    with held(workspace.objects, [dit.ref]):
        assert not collect(workspace)
    assert len(collect(workspace)) == 2


def test_a_name_that_comes_while_an_artifact_is_being_removed_brings_it_back(workspace: Workspace) -> None:
    latents = make(workspace, "latents")
    other = make(workspace, "decoder")
    for one in (latents, other):
        workspace.forget(one.kind, "mine")
    collector = Collector(workspace, 0.0)
    garbage = {one.artifact: one for one in collector.find()}
    make(workspace, inputs={"latents": latents})  # published meanwhile
    workspace.name(other, "mine")
    assert not any(collector.remove(one) for one in garbage.values())
    assert there(latents, other) == [True, True]
    assert (latents.payload / "payload").is_file()


def test_milestones_go_with_their_run_and_stay_with_it(workspace: Workspace) -> None:
    run = workspace.begin("dit", "mine", recipe(), {})
    early = workspace.begin_milestone(run, 10)
    milestone = workspace.publish(early, describe(early))
    assert not collect(workspace)
    made = workspace.publish(run, describe(run))
    assert not collect(workspace)
    workspace.forget("dit", "mine")
    assert {one.artifact for one in collect(workspace)} == {made.ref, milestone.ref}


def test_unfinished_work_stays_with_its_inputs_unless_it_is_asked_for(workspace: Workspace) -> None:
    latents = make(workspace, "latents")
    workspace.forget("latents", "mine")
    begun = workspace.begin("dit", "mine", recipe(), {"latents": latents.as_input()})
    assert not collect(workspace)
    assert not collect(workspace, grace=3600, unfinished=True)
    with held(workspace.objects, [f"dit/{begun.folder.name}"]):
        assert not collect(workspace, unfinished=True)
    gone = collect(workspace, unfinished=True)
    assert {one.artifact or one.why for one in gone} == {latents.ref, "unfinished work of `mine`"}
    assert not begun.folder.exists()
    assert not list(workspace.unfinished())


def test_unfinished_work_that_was_finished_meanwhile_stays(workspace: Workspace) -> None:
    work = workspace.begin("dit", "mine", recipe(), {})
    collector = Collector(workspace, 0.0, unfinished=True)
    (found,) = collector.find()
    artifact = workspace.publish(work, describe(work))
    assert not collector.remove(found)
    assert there(artifact) == [True]


def test_attempts_of_killed_runs_go_once_the_work_is_done_and_nobody_is_at_it(workspace: Workspace) -> None:
    killed = workspace.begin("dit", "mine", recipe(), {})
    (killed.attempt / "checkpoint").write_bytes(b"x" * 1000)
    work = workspace.begin("dit", "mine", recipe(), {})
    assert not collect(workspace)  # it goes on from there
    artifact = workspace.publish(work, describe(work))
    with held(workspace.objects, [artifact.ref]):
        assert not collect(workspace)
    (gone,) = collect(workspace)
    assert (workspace.root / gone.key, gone.bytes, gone.artifact) == (killed.attempt, 1000, None)
    assert gone.why == "an attempt at dit/mine that came to nothing"
    assert not killed.attempt.exists()
    assert (artifact.payload / "payload").is_file()


def test_leftovers_of_killed_processes_go(workspace: Workspace) -> None:
    artifact, latents = make(workspace), make(workspace, "latents")
    left = [
        artifact.payload / ".ema.safetensors.0a1b2c3d4e5f.partial",
        latents.folder / "latents" / "c" / ".0.0a1b2c3d4e5f.partial",
        workspace.root / "refs" / "dit" / ".mine.json.0a1b2c3d4e5f.partial",
    ]
    for path in left:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"half")
    assert not collect(workspace)  # somebody may be writing them
    for path in left:
        age(path)
    half = workspace.folder("dit", "ab" * 8)  # a removal that was killed, or the start of a milestone
    (half / "attempts" / "x").mkdir(parents=True)
    stale = workspace.root / "leases" / "gone.json"
    stale.parent.mkdir()
    stale.write_text('{"holds": []}')
    age(stale)
    assert {workspace.root / one.key for one in collect(workspace)} == {*left, half, stale}
    assert not any(path.exists() for path in [*left, half, stale])
    assert there(artifact, latents) == [True, True]


def test_a_manifest_that_cannot_be_read_stops_everything_since_what_it_protects_is_not_known(
    workspace: Workspace,
) -> None:
    latents = make(workspace, "latents")
    workspace.forget("latents", "mine")
    damaged = make(workspace)
    (damaged.folder / "manifest.json").write_bytes(b"{}")
    for removal in (lambda: Collector(workspace, 0.0).find(), lambda: remove_artifact(workspace, latents)):
        with pytest.raises(CorruptData, match=r"manifest\.json .*nothing else is removed") as refused:
            removal()
        assert refused.value.next_command == f"rae rm {damaged.ref} -w {workspace.place}"
    assert there(latents, damaged) == [True, True]


def test_what_is_damaged_while_garbage_is_removed_keeps_the_rest_as_well(workspace: Workspace) -> None:
    latents, dit = make(workspace, "latents"), make(workspace)
    workspace.forget("latents", "mine")
    collector = Collector(workspace, 0.0)
    (found,) = collector.find()
    newer = make(workspace, inputs={"latents": latents}, lr=2.0)
    (newer.folder / "manifest.json").write_bytes(b"{}")
    assert not collector.remove(found)
    assert there(latents, dit) == [True, True]


def test_what_is_damaged_can_be_removed_unless_something_was_made_from_it(workspace: Workspace) -> None:
    latents = make(workspace, "latents")
    dit = make(workspace, inputs={"latents": latents})
    for one in (latents, dit):
        (one.folder / "manifest.json").write_bytes(b"{}")
    begun = workspace.begin("samples", "mine", recipe("samples"), {"dit": dit.as_input()})
    with pytest.raises(ConfigError, match=r"is made from it"):
        remove_damaged(workspace, dit.ref)
    workspace.abandon(begun)
    assert remove_damaged(workspace, dit.ref, dry_run=True)
    assert there(dit) == [True]
    assert remove_damaged(workspace, dit.ref)
    assert remove_damaged(workspace, latents.ref)
    assert not any(one.folder.exists() for one in (latents, dit))
    assert not workspace.names()
    assert not remove_damaged(workspace, make(workspace).ref)


def test_links_are_removed_and_not_followed(workspace: Workspace, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_bytes(b"precious")
    artifact = make(workspace)
    (artifact.payload / "link").symlink_to(outside)
    workspace.forget("dit", "mine")
    collect(workspace)
    assert not artifact.folder.exists()
    assert (outside / "file").read_bytes() == b"precious"


# ---- one that a person names ----------------------------------------------------------------------------------------


def test_what_others_were_made_from_is_not_removed(workspace: Workspace) -> None:
    latents = make(workspace, "latents")
    dit = make(workspace, inputs={"latents": latents})
    with pytest.raises(ConfigError, match="latents/mine can't be removed: dit/mine is made from it") as refusal:
        remove_artifact(workspace, latents)
    assert refusal.value.next_command == f"rae rm dit/mine -w {workspace.root}"
    assert remove_artifact(workspace, dit) == [dit]
    assert remove_artifact(workspace, latents) == [latents]
    assert not workspace.names()
    assert not dit.folder.exists()
    assert not latents.folder.exists()


def test_unfinished_work_is_reason_enough_and_so_is_a_lease(workspace: Workspace) -> None:
    latents = make(workspace, "latents")
    begun = workspace.begin("dit", "mine", recipe(), {"latents": latents.as_input()})
    with pytest.raises(ConfigError, match=f"dit/{begun.folder.name} is made from it"):
        remove_artifact(workspace, latents)
    other = make(workspace, "decoder")
    with held(workspace.objects, [other.ref]), pytest.raises(ConfigError, match="somebody is at work with it"):
        remove_artifact(workspace, other)
    assert there(latents, other) == [True, True]


def test_a_run_goes_with_its_milestones_unless_one_of_them_is_needed(workspace: Workspace) -> None:
    run = workspace.begin("dit", "mine", recipe(), {})
    early = workspace.begin_milestone(run, 10)
    milestone = workspace.publish(early, describe(early))
    made = workspace.publish(run, describe(run))
    samples = make(workspace, "samples", inputs={"guide": milestone})
    with pytest.raises(ConfigError, match="samples/mine is made from it"):
        remove_artifact(workspace, made)
    remove_artifact(workspace, samples)
    assert remove_artifact(workspace, made, dry_run=True) == [milestone, made]
    assert there(milestone, made) == [True, True]
    assert remove_artifact(workspace, made) == [milestone, made]
    assert there(milestone, made) == [False, False]


def test_what_lies_outside_is_left_alone(workspace: Workspace, tmp_path: Path) -> None:
    elsewhere = Workspace(tmp_path / "elsewhere")
    made = make(elsewhere)
    with pytest.raises(ConfigError, match="lies outside of the workspace"):
        remove_artifact(workspace, workspace.resolve(str(made.folder)))
    assert there(made) == [True]
