"""Work that is found, begun, continued, published once and named; references; workspaces that lie."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from rae.store.artifacts import Workspace
from rae.store.catalog import check_name
from rae.store.errors import ConfigError, CorruptData, MissingInput, StaleInput
from rae.store.manifest import recipe_id
from tests.store.making import describe, make, recipe

LATENTS = {"kind": "latents", "id": "ab" * 8, "content": "1" * 64}


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path / "workspace")


def tree(root: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in root.rglob("*")}


def test_what_is_published_is_found_by_its_recipe_alone(workspace: Workspace) -> None:
    assert workspace.find("dit", recipe(lr=1.0)) is None
    made = make(workspace, lr=1.0)
    assert made.id == recipe_id(recipe(lr=1.0))
    assert made.folder == workspace.root / "objects" / "dit" / made.id
    assert (made.payload / "payload").read_text() == "c" * 64
    assert made.payload.parent == made.folder / "attempts"
    assert workspace.find("dit", recipe(lr=1.0)) == made
    assert workspace.find("dit", recipe(lr=1)) is None
    assert workspace.find("decoder", recipe(lr=1.0)) is None


def test_begun_is_not_done(workspace: Workspace) -> None:
    work = workspace.begin("dit", "mine", recipe(lr=1.0), {})
    (work.attempt / "payload").write_bytes(b"half")
    assert workspace.find("dit", recipe(lr=1.0)) is None
    assert not list(workspace.artifacts())
    assert [(one.kind, one.id, one.name) for one in workspace.unfinished()] == [
        ("dit", recipe_id(recipe(lr=1.0)), "mine")
    ]
    with pytest.raises(MissingInput, match="no dit `mine`"):
        workspace.resolve("mine", "dit")
    workspace.publish(work, describe(work))
    assert not list(workspace.unfinished())


def test_unfinished_work_is_continued_in_a_folder_of_its_own(workspace: Workspace) -> None:
    first = workspace.begin("dit", "mine", recipe(lr=1.0), {})
    second = workspace.begin("dit", "mine", recipe(lr=1.0), {})
    os.utime(first.attempt, (1, 1))
    third = workspace.begin("dit", "another", recipe(lr=1.0), {})
    assert first.earlier == ()
    assert second.earlier == (first.attempt,)
    assert third.earlier == (second.attempt, first.attempt)  # the newest first
    assert len({first.attempt, second.attempt, third.attempt}) == 3


def test_the_parts_of_latents_are_shared_by_all_who_write_them(workspace: Workspace) -> None:
    first = workspace.begin("latents", "mine", recipe("latents"), {})
    second = workspace.begin("latents", "mine", recipe("latents"), {})
    assert first.attempt == second.attempt == first.folder
    made = workspace.publish(first, describe(first))
    assert made.payload == made.folder


def test_the_loser_of_a_race_adopts_what_was_published(workspace: Workspace) -> None:
    one, other = (workspace.begin("dit", "mine", recipe(lr=1.0), {}) for _ in range(2))
    won = workspace.publish(one, describe(one, "a" * 64))
    lost = workspace.publish(other, describe(other, "b" * 64))
    assert lost == won
    assert lost.manifest.content == "a" * 64
    assert (won.payload / "payload").read_text() == "a" * 64


def test_unfinished_work_with_other_settings_is_neither_lost_nor_mixed(workspace: Workspace) -> None:
    begun = workspace.begin("dit", "mine", recipe(lr=1.0, steps=5), {})
    with pytest.raises(StaleInput, match=r"config\.dit\.lr: found 1\.0, asked 2\.0\); --restart drops"):
        workspace.begin("dit", "mine", recipe(lr=2.0, steps=5), {})
    assert begun.attempt.is_dir()
    workspace.begin("dit", "theirs", recipe(lr=3.0), {})  # another name: another's work
    workspace.begin("decoder", "mine", recipe("decoder", lr=2.0), {})  # another kind
    workspace.begin("dit", "mine", recipe(lr=2.0, steps=5), {}, restart=True)
    assert not begun.folder.exists()
    assert sorted(one.name for one in workspace.unfinished() if one.kind == "dit") == ["mine", "theirs"]


def test_finished_work_does_not_stand_in_the_way_of_other_settings(workspace: Workspace) -> None:
    first = make(workspace, lr=1.0)
    second = make(workspace, lr=2.0)
    assert workspace.resolve("dit/mine") == second
    assert workspace.resolve(f"dit/{first.id}") == first


def test_a_resume_refuses_an_input_whose_content_changed(workspace: Workspace) -> None:
    begun = workspace.begin("dit", "mine", recipe(), {"latents": LATENTS})
    assert workspace.begin("dit", "mine", recipe(), {"latents": LATENTS}).earlier == (begun.attempt,)
    changed = {"latents": LATENTS | {"content": "2" * 64}}
    with pytest.raises(StaleInput, match=r"latents\.content: found \"111.*asked \"222.*--restart"):
        workspace.begin("dit", "mine", recipe(), changed)
    assert workspace.begin("dit", "mine", recipe(), changed, restart=True).earlier == ()


def test_reading_writes_nothing(workspace: Workspace) -> None:
    make(workspace, lr=1.0)
    workspace.begin("dit", "mine", recipe(lr=2.0), {})
    before = tree(workspace.root)
    reader = Workspace(workspace.root)
    list(reader.artifacts()), list(reader.unfinished()), reader.resolve("mine"), reader.find("dit", recipe(lr=1.0))
    with pytest.raises(MissingInput):
        reader.resolve("nothing")
    assert tree(workspace.root) == before
    assert not list(Workspace(workspace.root / "none").artifacts())
    assert not (workspace.root / "none").exists()


# ---- references -----------------------------------------------------------------------------------------------------


def test_a_reference_is_a_name_an_id_or_a_path(workspace: Workspace) -> None:
    made = make(workspace)
    for ref in ("mine", "dit/mine", f"dit/{made.id}", made.id, str(made.folder)):
        assert workspace.resolve(ref) == made
        assert workspace.resolve(ref, "dit") == made


def test_an_ambiguous_name_is_refused_with_the_choices(workspace: Workspace) -> None:
    make(workspace)
    make(workspace, "decoder")
    with pytest.raises(ConfigError, match=r"`mine` is ambiguous; say which of decoder/mine, dit/mine is meant"):
        workspace.resolve("mine")
    assert workspace.resolve("mine", "decoder").kind == "decoder"


def test_another_kind_than_needed_is_refused(workspace: Workspace) -> None:
    made = make(workspace)
    for ref in ("dit/mine", str(made.folder)):
        with pytest.raises(StaleInput, match="is of kind dit, and latents is needed here"):
            workspace.resolve(ref, "latents")


@pytest.mark.parametrize("ref", ["nothing", "dit/nothing", "", "/", "dit/", "dit/../dit/mine", "../mine", "a\0b"])
def test_what_is_not_there_is_missing(ref: str, workspace: Workspace) -> None:
    make(workspace)
    with pytest.raises(MissingInput, match="in the workspace") as refusal:
        workspace.resolve(ref)
    assert refusal.value.next_command == f"rae status -w {workspace.root}"


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "a/b", "a\\b", "-x", "a" * 101, "ä", "a b", "0123456789abcdef"]
)
def test_names_that_lead_elsewhere_are_refused(name: str, workspace: Workspace) -> None:
    with pytest.raises(ConfigError, match="can't be a name"):
        check_name(name)
    with pytest.raises(ConfigError):
        workspace.begin("dit", name, recipe(), {})
    assert not workspace.root.exists()


def test_a_name_moves_to_another_artifact(workspace: Workspace) -> None:
    first = make(workspace, lr=1.0)
    make(workspace, lr=2.0)
    workspace.name(first, "mine")
    assert workspace.resolve("mine") == first
    assert json.loads((workspace.root / "refs" / "dit" / "mine.json").read_text()) == {"id": first.id}


# ---- workspaces that lie --------------------------------------------------------------------------------------------


def test_a_manifest_of_something_else_is_refused(workspace: Workspace) -> None:
    made = make(workspace, lr=1.0)
    for kind, id in (("dit", recipe_id(recipe(lr=2.0))), ("decoder", made.id)):
        folder = workspace.folder(kind, id)
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_bytes((made.folder / "manifest.json").read_bytes())
        with pytest.raises(CorruptData, match=f"is the manifest of dit/{made.id}"):
            workspace.resolve(f"{kind}/{id}")
    with pytest.raises(CorruptData, match="is the manifest of"):
        workspace.find("dit", recipe(lr=2.0))
    with pytest.raises(CorruptData, match="is the manifest of"):
        list(workspace.artifacts())


@pytest.mark.parametrize("data", [b"", b"[]", b"{", b"[" * 100_000])
def test_a_damaged_reference_is_named(data: bytes, workspace: Workspace) -> None:
    make(workspace)
    path = workspace.root / "refs" / "dit" / "mine.json"
    path.write_bytes(data)
    with pytest.raises(CorruptData, match=r"refs/dit/mine\.json"):
        workspace.resolve("dit/mine")


@pytest.mark.parametrize("id", ["../../../etc", "", 5, None, ["x"], "ABABABABABABABAB"])
def test_a_reference_never_leads_out_of_the_workspace(id: Any, workspace: Workspace) -> None:
    make(workspace)
    (workspace.root / "refs" / "dit" / "mine.json").write_text(json.dumps({"id": id}))
    with pytest.raises(MissingInput):
        workspace.resolve("dit/mine")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"{}",
        b'{"name": 1, "recipe": {}, "inputs": {}}',
        b'{"name": "mine", "recipe": {"kind": "dit", "config": {"dit": {"lr": 9}}, "inputs": {}}, "inputs": {}}',
    ],
)
def test_damaged_beginnings_are_named_with_the_way_out(data: bytes, workspace: Workspace) -> None:
    begun = workspace.begin("dit", "mine", recipe(), {})
    (begun.folder / "started.json").write_bytes(data)
    with pytest.raises(CorruptData, match=r"started\.json"):
        list(workspace.unfinished())
    with pytest.raises(CorruptData, match=r"started\.json"):
        workspace.begin("dit", "mine", recipe(), {})


def test_a_workspace_that_cannot_be_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(MissingInput, match=r"the workspace .*/file cannot be read \(Not a directory\)"):
        Workspace(tmp_path / "file")
    with pytest.raises(MissingInput, match="cannot be read"):
        Workspace(tmp_path / "file" / "below")
    with pytest.raises(ConfigError, match="is no place that artifacts can lie in"):
        Workspace("ftp://bucket/rae")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads what it has no permission to read")
def test_a_workspace_without_permission_is_refused(tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0)
    with pytest.raises(MissingInput, match=r"cannot be read \(Permission denied\)"):
        Workspace(locked)
