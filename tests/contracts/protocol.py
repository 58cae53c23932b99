"""What every backend promises: the protocol of artifacts, tested through the same two classes of tests.

A backend subclasses both, with a fixture `place`: an empty folder or URL that nobody else uses.
"""

import hashlib
import json
import pickle
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from rae.store.artifacts import Work, Workspace
from rae.store.errors import CorruptData, MissingInput, StaleInput
from rae.store.lease import held
from rae.store.manifest import Artifact, Json, Manifest, recipe_id
from rae.store.remote import BLOCK_BYTES, open_objects
from rae.store.removal import Collector, remove_artifact

Place = str | Path


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def recipe(kind: str = "dit", **config: Any) -> Json:
    return {"kind": kind, "config": {kind: config}, "inputs": {}}


def describe(work: Work, payload: bytes = b"weights") -> Manifest:
    """The manifest of an attempt that holds one file."""
    path = work.attempt / "model"
    path.write_bytes(payload)
    entry = {"path": path.relative_to(work.folder).as_posix(), "bytes": len(payload), "sha256": sha256(payload)}
    metrics = {"seconds": 1.0}
    return Manifest(work.kind, work.name, work.recipe, sha256(payload), {}, work.recipe["config"], [entry], metrics)


def make(workspace: Workspace, name: str = "mine", payload: bytes = b"weights", **config: Any) -> Artifact:
    work = workspace.begin("dit", name, recipe(**config), {})
    return workspace.publish(work, describe(work, payload))


def everything(place: Place) -> dict[str, bytes | None]:
    objects = open_objects(place)
    return {one.key: objects.read(one.key) for one in objects.below("")}


class ObjectsContract:
    """Objects appear whole or not at all, and the first writer wins where it is asked for."""

    def test_the_first_of_many_creates_and_all_others_are_told(self, place: Place) -> None:
        objects = open_objects(place)
        datas = [bytes([number]) * 1000 for number in range(8)]
        with ThreadPoolExecutor(8) as pool:
            created = list(pool.map(lambda data: objects.create("a/b.json", data), datas))
        assert created.count(True) == 1
        assert objects.read("a/b.json") == datas[created.index(True)]

    def test_what_is_not_there_is_none(self, place: Place) -> None:
        objects = open_objects(place)
        assert objects.read("a/b") is None
        assert objects.digest("a/b") is None
        assert objects.written("a/b") is None
        assert objects.folders("a") == []
        assert list(objects.below("a")) == []
        objects.remove("a/b")

    def test_replacing_shows_the_newest(self, place: Place) -> None:
        objects = open_objects(place)
        objects.replace("a", b"1")
        objects.replace("a", b"2")
        assert objects.read("a") == b"2"
        assert objects.digest("a") == sha256(b"2")

    def test_folders_and_what_lies_below_them_are_listed(self, place: Place) -> None:
        objects = open_objects(place)
        for key in ("x/b/2", "x/a/1", "x/a/deep/3", "xy/c", "x/file"):
            objects.create(key, key.encode())
        assert objects.folders("x") == ["a", "b"]
        found = sorted(objects.below("x/a"))
        assert [(one.key, one.bytes) for one in found] == [("x/a/1", 5), ("x/a/deep/3", 10)]
        for one in found:
            assert abs(one.written - time.time()) < 60
            written = objects.written(one.key)
            assert written is not None
            assert abs(one.written - written) < 2
        objects.remove("x/a")
        assert sorted(one.key for one in objects.below("")) == ["x/b/2", "x/file", "xy/c"]

    def test_ranges_are_the_bytes_that_were_asked_for(self, place: Place) -> None:
        objects = open_objects(place)
        data = bytes(range(256)) * 40
        objects.create("data", data)
        starts, sizes = [5000, 0, 256, 300], [10, 1, 44, 9000]
        found = [bytes(one) for one in objects.read_ranges("data", starts, sizes)]
        assert found == [data[start : start + size] for start, size in zip(starts, sizes, strict=True)]

    @pytest.mark.parametrize("size", [0, 1000, BLOCK_BYTES + 1000])
    def test_what_is_written_block_by_block_comes_back(self, place: Place, size: int) -> None:
        objects, data = open_objects(place), bytes(1000) + b"x" * (size - 1000) if size else b""
        objects.write("some/file", [data[: size // 2], data[size // 2 :]], size, sha256(data))
        assert b"".join(objects.stream("some/file")) == data
        assert objects.digest("some/file") == sha256(data)
        objects.write("some/file", iter([data]), size, sha256(data))  # again changes nothing
        other = data[:-1] + b"y" if size else b"y"
        with pytest.raises(StaleInput, match="another content"):
            objects.write("some/file", [other], len(other), sha256(other))
        assert objects.digest("some/file") == sha256(data)

    @pytest.mark.parametrize("size", [1000, BLOCK_BYTES + 1000])
    def test_what_arrives_damaged_does_not_appear(self, place: Place, size: int) -> None:
        objects, data = open_objects(place), b"x" * size
        with pytest.raises(CorruptData, match="does not match its digest"):
            objects.write("file", [data[:-1], b"y"], size, sha256(data))
        with pytest.raises(CorruptData, match=f"{size - 1} bytes, and {size} were announced"):
            objects.write("file", [data[:-1]], size, sha256(data))

        def broken() -> Any:
            yield data[:-1]
            raise OSError("the source broke off")

        with pytest.raises(OSError, match="the source broke off"):
            objects.write("file", broken(), size, sha256(data))
        assert everything(place) == {}

    def test_other_processes_open_it_anew(self, place: Place) -> None:
        objects = open_objects(place)
        objects.create("a", b"1")
        assert pickle.loads(pickle.dumps(objects)).read("a") == b"1"  # noqa: S301


class WorkspaceContract:
    """Artifacts are published once, found by recipe, and never seen half."""

    def test_what_is_published_is_found_by_its_recipe_alone(self, place: Place) -> None:
        made = make(Workspace(place), lr=1.0)
        found = Workspace(place).find("dit", recipe(lr=1.0))
        assert found is not None
        assert (found.id, found.manifest) == (recipe_id(recipe(lr=1.0)), made.manifest)
        assert (found.payload / "model").read_bytes() == b"weights"
        assert Workspace(place).find("dit", recipe(lr=2.0)) is None
        assert Workspace(place).find("decoder", recipe(lr=1.0)) is None
        assert [one.id for one in Workspace(place).artifacts()] == [made.id]

    def test_begun_is_not_done(self, place: Place) -> None:
        workspace = Workspace(place)
        work = workspace.begin("dit", "mine", recipe(lr=1.0), {})
        (work.attempt / "model").write_bytes(b"half")
        other = Workspace(place)
        assert other.find("dit", recipe(lr=1.0)) is None
        assert not list(other.artifacts())
        assert [(one.id, one.name) for one in other.unfinished()] == [(recipe_id(recipe(lr=1.0)), "mine")]
        with pytest.raises(MissingInput, match="no dit `mine`"):
            other.resolve("mine", "dit")
        workspace.publish(work, describe(work))
        assert not list(other.unfinished())

    def test_the_loser_adopts_what_the_winner_published(self, place: Place) -> None:
        first, second = Workspace(place), Workspace(place)
        works = [one.begin("dit", "mine", recipe(lr=1.0), {}) for one in (first, second)]
        made = first.publish(works[0], describe(works[0], b"the first"))
        adopted = second.publish(works[1], describe(works[1], b"the second"))
        assert adopted.manifest == made.manifest
        assert (adopted.payload / "model").read_bytes() == b"the first"
        assert (Workspace(place).resolve("mine").payload / "model").read_bytes() == b"the first"

    def test_of_many_at_once_all_have_the_same_artifact(self, place: Place) -> None:
        workspaces = [Workspace(place) for _ in range(4)]
        works = [one.begin("dit", "mine", recipe(lr=1.0), {}) for one in workspaces]
        manifests = [describe(work, bytes([number])) for number, work in enumerate(works)]
        with ThreadPoolExecutor(4) as pool:
            made = list(
                pool.map(lambda one: one[0].publish(one[1], one[2]), zip(workspaces, works, manifests, strict=True))
            )
        assert len({one.manifest.content for one in made}) == 1

    def test_a_name_moves_to_what_was_named_last(self, place: Place) -> None:
        workspace = Workspace(place)
        old, new = make(workspace, lr=1.0), make(workspace, lr=2.0)
        assert Workspace(place).resolve("dit/mine").id == new.id
        Workspace(place).name(old, "mine")
        assert Workspace(place).resolve("mine").id == old.id
        assert Workspace(place).resolve(f"dit/{new.id}").id == new.id

    def test_work_in_the_way_is_named_and_dropped_when_asked(self, place: Place) -> None:
        Workspace(place).begin("dit", "mine", recipe(lr=1.0), {})
        with pytest.raises(StaleInput, match=r"dit.lr: found 1.0, asked 2.0"):
            Workspace(place).begin("dit", "mine", recipe(lr=2.0), {})
        Workspace(place).begin("dit", "mine", recipe(lr=2.0), {}, restart=True)
        assert [one.id for one in Workspace(place).unfinished()] == [recipe_id(recipe(lr=2.0))]

    def test_a_beginning_that_came_to_nothing_leaves_nothing(self, place: Place) -> None:
        workspace = Workspace(place)
        workspace.abandon(workspace.begin("dit", "mine", recipe(lr=1.0), {}))
        assert everything(place) == {}

    def test_a_manifest_that_was_tampered_with_is_refused(self, place: Place) -> None:
        made, objects = make(Workspace(place), lr=1.0), open_objects(place)
        key = f"objects/dit/{made.id}/manifest.json"
        value = json.loads(objects.read(key) or b"")
        objects.replace(key, json.dumps(value | {"content": "0" * 64}).encode())
        with pytest.raises(CorruptData, match="does not match its own digest"):
            Workspace(place).find("dit", recipe(lr=1.0))

    def test_a_payload_that_was_tampered_with_is_never_read_from_elsewhere(self, place: Place, tmp_path: Path) -> None:
        workspace = Workspace(place)
        made = make(workspace, lr=1.0)
        (file,) = made.manifest.files
        workspace.objects.replace(f"objects/dit/{made.id}/{file['path']}", b"WEIGHTS")
        if workspace.is_local:
            return  # which `rae verify` is for
        (made.folder / file["path"]).unlink()
        with pytest.raises(CorruptData, match="does not match its digest"):
            _ = Workspace(place).resolve("mine").payload

    def test_reading_writes_nothing(self, place: Place) -> None:
        make(Workspace(place), lr=1.0)
        before = everything(place)
        workspace = Workspace(place)
        found = workspace.resolve("mine")
        assert (found.payload / "model").read_bytes() == b"weights"
        assert list(workspace.artifacts())
        assert not list(workspace.unfinished())
        assert everything(place) == before

    def test_what_has_lost_its_name_is_collected_unless_a_lease_holds_it(self, place: Place) -> None:
        workspace = Workspace(place)
        before, now = make(workspace, lr=1.0), make(workspace, lr=2.0)
        collector = Collector(workspace, grace=0.0)
        with held(workspace.objects, [before.ref]):
            assert not collector.find()
        assert not Collector(workspace, grace=3600.0).find()
        (found,) = collector.find()
        assert (found.artifact, found.bytes > len(b"weights")) == (before.ref, True)
        assert collector.remove(found)
        assert {key.split("/")[2] for key in everything(place) if key.startswith("objects/")} == {now.id}
        assert workspace.find("dit", recipe(lr=1.0)) is None
        assert workspace.resolve("mine") == now

    def test_an_artifact_is_removed_with_its_names(self, place: Place) -> None:
        workspace = Workspace(place)
        made = make(workspace, lr=1.0)
        workspace.name(made, "best")
        assert workspace.names() == {"dit/best": made.ref, "dit/mine": made.ref}
        assert remove_artifact(workspace, made) == [made]
        assert everything(place) == {}
