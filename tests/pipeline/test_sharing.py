"""`rae push` and `rae pull`: with lineage, resumable, verified on arrival; upstreams."""

from collections.abc import Callable
from pathlib import Path

import pytest

from rae.store.artifacts import Workspace
from rae.store.remote import open_objects
from tests.conftest import Rae

Made = Callable[..., Rae]


@pytest.fixture
def trained(rae_with: Made) -> Rae:
    return rae_with("shards", "latents", "dit")


@pytest.fixture(params=["s3", "folder"])
def place(request: pytest.FixtureRequest, s3, tmp_path: Path) -> str:
    return s3.place() if request.param == "s3" else str(tmp_path / "team")


def push(rae: Rae, place: str, *words: object):
    return rae("push", "dit/tiny", "--to", place, "-w", rae.workspace, *words)


def test_what_was_pushed_is_pulled_to_the_bit_with_what_it_was_made_from(trained: Rae, rae: Rae, place: str) -> None:
    assert "a second" in push(trained, place).succeeded().out
    rae("pull", "dit/tiny", "--from", place, "-w", rae.workspace).succeeded()
    for kind in ("shards", "latents", "dit"):
        assert rae.payload(kind) == trained.payload(kind)
        rae("verify", f"{kind}/tiny", "-w", rae.workspace).succeeded()
    assert "already done" in rae.verb("train-dit").succeeded().out


def test_notes_come_along_where_the_other_side_has_none(trained: Rae, rae: Rae, tmp_path: Path) -> None:
    place, words = tmp_path / "team", ("tag", "shards/tiny", "--license")
    trained(*words, "CC0-1.0", "-w", trained.workspace).succeeded()
    trained("push", "shards/tiny", "--to", place, "-w", trained.workspace).succeeded()
    assert rae("inspect", "shards/tiny", "-w", place, "--json").succeeded().json["license"] == "CC0-1.0"
    trained(*words, "CC-BY-4.0", "-w", trained.workspace).succeeded()
    trained("push", "shards/tiny", "--to", place, "-w", trained.workspace).succeeded()
    assert rae("inspect", "shards/tiny", "-w", place, "--json").succeeded().json["license"] == "CC0-1.0"
    assert not list((place / "leases").iterdir())


def test_a_second_push_sends_nothing(trained: Rae, s3) -> None:
    place = s3.place()
    push(trained, place).succeeded()
    s3.requests.clear()
    ran = push(trained, place).succeeded()
    assert ran.out.count("is there already") == 3
    assert {method for method, _ in s3.requests} <= {"GET", "HEAD", "PUT"}
    assert [path for method, path in s3.requests if method == "PUT" and "/refs/" not in path] == []


def test_a_push_that_broke_off_shows_nothing_and_goes_on_where_it_was(trained: Rae, s3, monkeypatch) -> None:
    place = s3.place()
    monkeypatch.setenv("RAE_REMOTE_PATIENCE_S", "0.2")
    with s3.failing(after=16):
        push(trained, place).refused(6, "what is done is kept", "rae push dit/tiny")
    stored = {one.key: one.bytes for one in open_objects(place).below("")}
    assert len(stored) > 3
    assert not any(artifact.kind == "latents" for artifact in Workspace(place).artifacts())
    s3.requests.clear()
    push(trained, place).succeeded()
    sent = {path.removeprefix("/bucket/") for method, path in s3.requests if method == "PUT"}
    prefix = place.removeprefix("s3://bucket/")
    kept = {f"{prefix}/{key}" for key in stored if key.startswith("objects/") and not key.endswith("claim.json")}
    assert kept
    assert not sent & kept


def test_dry_run_says_how_much_and_copies_nothing(trained: Rae, place: str) -> None:
    ran = push(trained, place, "--dry-run").succeeded()
    assert ran.out.count("would copy") == 3
    assert list(open_objects(place).below("")) == []


def test_alone_is_without_what_it_was_made_from(trained: Rae, place: str) -> None:
    push(trained, place, "--alone").succeeded()
    assert [artifact.kind for artifact in Workspace(place).artifacts()] == ["dit"]


def test_another_content_under_the_same_id_is_refused_before_anything_moves(trained: Rae, place: str) -> None:
    import dataclasses

    made = Workspace(trained.workspace).resolve("dit/tiny")
    other = dataclasses.replace(made.manifest, content="0" * 64)
    open_objects(place).create(f"{made.key}/manifest.json", other.to_json())
    push(trained, place).refused(4, "another content", "the first one under an id stays")
    assert [one.key for one in open_objects(place).below("")] == [f"{made.key}/manifest.json"]


def test_another_unfinished_content_of_latents_is_refused(trained: Rae, place: str) -> None:
    key = Workspace(trained.workspace).resolve("latents/tiny").key
    open_objects(place).create(f"{key}/claim.json", b'{"content":"another"}')
    push(trained, place).refused(4, "bringing another content of latents/")


def test_what_is_damaged_here_is_not_published_there(trained: Rae, place: str) -> None:
    latents = Workspace(trained.workspace).resolve("latents/tiny")
    shard = latents.folder / "latents/c/1/0/0/0/0"
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    push(trained, place).refused(5, "does not match its digest")
    assert [artifact.kind for artifact in Workspace(place).artifacts()] == ["shards"]


def test_a_name_that_means_something_else_there_keeps_its_meaning(trained: Rae, place: str) -> None:
    open_objects(place).create("refs/dit/tiny.json", b'{"id": "0123456789abcdef"}')
    assert "goes on to" in push(trained, place).succeeded().out
    assert open_objects(place).read("refs/dit/tiny.json") == b'{"id": "0123456789abcdef"}'


@pytest.mark.parametrize("there", ["upstream", "workspace"])
def test_a_transformer_learns_the_same_from_latents_in_a_bucket(
    finished: Rae, rae: Rae, s3, there: str, monkeypatch
) -> None:
    place = s3.place()
    finished("push", "latents/tiny", "--to", place, "-w", finished.workspace).succeeded()
    if there == "upstream":
        monkeypatch.setenv("RAE_UPSTREAMS", place)
    else:
        rae.workspace = place
    ran = rae.verb("train-dit", "--json").succeeded()
    assert ran.json["content"] == finished.content("dit")
    assert any(method == "GET" and "/latents/c/" in path for method, path in s3.requests)
    assert not list(s3.cache.rglob("latents/c/*"))
    if there == "workspace":
        assert Workspace(place).resolve("dit/tiny").manifest.content == finished.content("dit")
        assert not list(Workspace(place).unfinished())


@pytest.mark.parametrize("how", ["environment", "file"])
def test_what_lies_upstream_is_not_made_again(trained: Rae, rae: Rae, place: str, how: str, monkeypatch) -> None:
    push(trained, place).succeeded()
    before = sorted(open_objects(place).below(""))
    if how == "environment":
        monkeypatch.setenv("RAE_UPSTREAMS", place)
    else:
        rae.workspace.mkdir()
        (rae.workspace / "upstreams.json").write_text(f'{{"upstreams": ["{place}"]}}')
    assert "already done" in rae.verb("train-dit").succeeded().out
    assert not list(rae.workspace.rglob("manifest.json"))
    assert rae.artifact("latents/tiny")["content"] == trained.content("latents")
    assert sorted(open_objects(place).below("")) == before


def test_an_upstream_list_that_is_none_is_refused(rae: Rae) -> None:
    rae.workspace.mkdir()
    (rae.workspace / "upstreams.json").write_text('{"upstreams": "s3://x"}')
    rae("status", "-w", rae.workspace).refused(2, "upstreams.json must hold")


def test_what_lies_in_a_bucket_is_verified_there(trained: Rae, s3) -> None:
    place = s3.place()
    push(trained, place).succeeded()
    for mode in ("--quick", "--full"):
        assert "is whole" in trained("verify", "latents/tiny", "-w", place, mode).succeeded().out
    objects, key = open_objects(place), Workspace(place).resolve("latents/tiny").key
    shard, record = f"{key}/latents/c/1/0/0/0/0", f"{key}/parts/000002.npz"
    data = objects.read(shard)
    assert data is not None
    objects.remove(shard)
    trained("verify", "latents/tiny", "-w", place, "--quick").refused(5, "1 problem(s)", "latents/c/1/0/0/0/0")
    objects.replace(shard, data[:-1] + b"?")
    objects.replace(record, b"?")
    trained("verify", "latents/tiny", "-w", place).refused(5, "2 problem(s)")
    trained("verify", "latents/tiny", "-w", place, "--repair").refused(2, "pull it, repair it and push it")


def test_milestones_in_a_bucket_are_found_by_their_step(rae_with: Made, s3) -> None:
    place, source = s3.place(), rae_with("shards", "latents")
    source("push", "latents/tiny", "--to", place, "-w", source.workspace).succeeded()
    source.workspace = place
    source.verb("train-dit", "-s", "train_dit.publish_at=[3]").succeeded()
    found = source.artifact("dit/tiny@step=3")
    assert found["metrics"]["steps"] == 3
    source("inspect", "dit/tiny@step=4", "-w", place).refused(3, "there are steps 3")


def test_python_opens_latents_where_they_lie(trained: Rae, s3) -> None:
    import numpy as np

    import rae

    place = s3.place()
    trained("push", "latents/tiny", "--to", place, "-w", trained.workspace).succeeded()
    there, here = (rae.open_latents("tiny", workspace=str(one)) for one in (place, trained.workspace))
    assert there.manifest == here.manifest
    for one, other in zip(there.batches(8, seed=0, epoch=1), here.batches(8, seed=0, epoch=1), strict=True):
        np.testing.assert_array_equal(one["latent"], other["latent"])


def test_images_in_a_bucket_and_on_a_web_server_make_the_same_artifacts(finished: Rae, rae: Rae, s3, web) -> None:
    place, shards = s3.place(), Workspace(finished.workspace).resolve("shards/tiny").payload
    for path in shards.iterdir():
        (web.folder / path.name).write_bytes(path.read_bytes())
        open_objects(place).create(path.name, path.read_bytes())
    numbers = [f"{{0000..{len(list(shards.glob(f'{name}-*.tar'))) - 1:04d}}}" for name in ("train", "val")]
    sets = f"shards.train={place}/train-{numbers[0]}.tar", f"shards.val={web.url}/val-{numbers[1]}.tar"
    words = [word for one in (*sets, "shards.val_fraction=0", "shards.limit=null") for word in ("-s", one)]
    rae.verb("run", *words).succeeded()
    for kind in ("latents", "decoder", "scores"):
        assert rae.content(kind) == finished.content(kind), kind
    assert not list(rae.workspace.glob("objects/shards/*"))
    rae("inspect", "latents/tiny", "-w", rae.workspace).succeeded()


def test_parts_that_another_machine_made_otherwise_and_first_are_taken(trained: Rae, rae: Rae, s3, monkeypatch) -> None:
    from rae.stages import parts

    place, real, calls = s3.place(), parts._encode_batch, 0
    trained("push", "shards/tiny", "--to", place, "-w", trained.workspace).succeeded()

    def slightly_otherwise(*given):
        samples, latents = real(*given)
        return samples, latents * 1.01

    monkeypatch.setattr(parts, "_encode_batch", slightly_otherwise)
    other = trained.copy(trained.folder / "other", "shards")
    other.verb("encode").succeeded()
    made = Workspace(other.workspace).resolve("latents/tiny")
    theirs = [path for path in made.folder.rglob("*") if path.match("c/1/*/*/*/*") or path.match("parts/000001.*")]
    assert len(theirs) == 3

    def after_the_others(*given):
        nonlocal calls
        calls += 1
        if calls == 1:
            for path in theirs:
                key = f"{made.key}/{path.relative_to(made.folder).as_posix()}"
                open_objects(place).create(key, path.read_bytes())
        return real(*given)

    monkeypatch.setattr(parts, "_encode_batch", after_the_others)
    rae.workspace = place
    rae.verb("encode").succeeded()
    rae("verify", "latents/tiny", "-w", place, "--full").succeeded()
    rae("pull", "latents/tiny", "--from", place, "-w", rae.folder / "here", "--alone").succeeded()
    rae("verify", "latents/tiny", "-w", rae.folder / "here", "--full").succeeded()
    for path in theirs:
        assert open_objects(place).read(f"{made.key}/{path.relative_to(made.folder)}") == path.read_bytes()
    contents = {rae.artifact("latents/tiny")["content"], other.content("latents"), trained.content("latents")}
    assert len(contents) == 3
