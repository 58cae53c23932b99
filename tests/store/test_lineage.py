"""What was made of what, under which names, and what is stale and why."""

from pathlib import Path

import pytest

from rae.store.artifacts import Workspace
from rae.store.lineage import Lineage
from rae.store.manifest import milestone_recipe
from tests.store.making import describe, make, recipe


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path / "workspace")


def test_inputs_and_dependents_are_two_sides_of_one_thing(workspace: Workspace) -> None:
    latents = make(workspace, "latents")
    dit = make(workspace, inputs={"latents": latents})
    workspace.begin("samples", "mine", recipe("samples"), {"dit": dit.as_input()})
    lineage = Lineage(workspace)
    assert [(one.role, one.ref, one.artifact) for one in lineage.inputs(dit)] == [("latents", latents.ref, latents)]
    assert lineage.dependents(latents.ref) == [dit.ref]
    (begun,) = lineage.unfinished
    assert lineage.dependents(dit.ref) == [begun]
    assert lineage.closure([begun]) == {begun, dit.ref, latents.ref}
    assert lineage.called(dit.ref) == "dit/mine"


def test_milestones_are_called_and_kept_as_parts_of_their_run(workspace: Workspace) -> None:
    run = workspace.begin("dit", "mine", recipe(), {})
    early = workspace.begin_milestone(run, 10)
    milestone = workspace.publish(early, describe(early))
    made = workspace.publish(run, describe(run))
    assert milestone.manifest.recipe == milestone_recipe(made.manifest.recipe, 10)
    lineage = Lineage(workspace)
    assert lineage.called(milestone.ref) == "dit/mine@step=10"
    assert lineage.milestones(made.ref) == [milestone.ref]
    assert lineage.closure([made.ref]) == {made.ref, milestone.ref}
    assert not lineage.stale(milestone)


def test_what_was_made_from_a_name_that_moved_on_is_stale_and_so_is_all_that_follows(workspace: Workspace) -> None:
    before = make(workspace, "latents", dtype="float16")
    dit = make(workspace, inputs={"latents": before})
    samples = make(workspace, "samples", inputs={"dit": dit})
    assert not any(Lineage(workspace).stale(one) for one in (before, dit, samples))
    now = make(workspace, "latents", dtype="float32")
    lineage = Lineage(workspace)
    fields = '(config.latents.dtype: found "float16", asked "float32")'
    assert lineage.stale(before) == [f"latents/mine is now {now.ref} {fields}"]
    assert lineage.stale(dit) == [f"made from {before.ref}, and latents/mine is now {now.ref} {fields}"]
    assert lineage.stale(samples) == ["made from dit/mine, which is stale"]
    assert not lineage.stale(now)


def test_another_name_keeps_an_artifact_from_being_stale(workspace: Workspace) -> None:
    before = make(workspace, "latents", dtype="float16")
    dit = make(workspace, inputs={"latents": before})
    workspace.name(before, "half")
    make(workspace, "latents", dtype="float32")
    lineage = Lineage(workspace)
    assert not lineage.stale(before)
    assert not lineage.stale(dit)


def test_an_input_of_other_content_makes_stale_and_one_that_lies_elsewhere_does_not(workspace: Workspace) -> None:
    latents = make(workspace, "latents")
    dit = make(workspace, inputs={"latents": latents})
    (latents.folder / "manifest.json").unlink()
    assert not Lineage(workspace).stale(dit)
    assert [one.artifact for one in Lineage(workspace).inputs(dit)] == [None]
    work = workspace.begin("latents", "mine", recipe("latents"), {})
    workspace.publish(work, describe(work, "d" * 64))
    assert Lineage(workspace).stale(dit) == [f"its latents, {latents.ref}, hold other content than it was made from"]


def test_manifests_that_claim_to_be_made_from_each_other_end_in_an_answer(workspace: Workspace) -> None:
    one = make(workspace, "latents", name="one")
    work = workspace.begin("dit", "other", recipe(), {})
    other = workspace.publish(work, describe(work, inputs={"latents": one}))
    (one.folder / "manifest.json").unlink()
    again = workspace.begin("latents", "one", recipe("latents"), {})
    workspace.publish(again, describe(again, inputs={"dit": other}))
    lineage = Lineage(workspace)
    assert lineage.closure([one.ref]) == {one.ref, other.ref}
    assert not any(lineage.stale(artifact) for artifact in lineage.artifacts.values())
