"""Connections to a bucket that break, again and again or for good: commands finish, or stop with exit code 6 and finish
when they are run again. Nothing half is ever seen."""

import hashlib
from collections.abc import Callable, Iterator

import pytest

from loopback import Proxy
from rae.store.artifacts import Workspace
from rae.store.remote import open_objects
from tests.conftest import Rae, Ran

Made = Callable[..., Rae]


@pytest.fixture
def proxy(s3, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """Stands between every command of a test and the server."""
    proxy = Proxy(s3.port)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
    yield proxy
    proxy.close()


def in_the_end(command: Callable[[], Ran], attempts: int = 20) -> int:
    """Run a command until it succeeds, as its exit code 6 asks for; returns how often it was run."""
    for attempt in range(1, attempts + 1):
        ran = command()
        if ran.code == 0:
            return attempt
        ran.refused(6, "what is done is kept")
    raise AssertionError(f"it has not succeeded in {attempts} attempts")


def is_whole(place: str) -> bool:
    """Whether every artifact that can be seen at a place is there to the last byte."""
    objects = open_objects(place)
    for artifact in Workspace(place).artifacts():
        for entry in artifact.manifest.files:
            data = objects.read(f"{artifact.key}/{entry['path']}")
            if data is None or hashlib.sha256(data).hexdigest() != entry["sha256"]:
                return False
    return True


@pytest.mark.parametrize("every_s", [0.02, 0.2])
def test_push_and_pull_get_through_connections_that_break(
    rae_with: Made, rae: Rae, s3, proxy: Proxy, every_s: float, monkeypatch
) -> None:
    monkeypatch.setenv("RAE_REMOTE_PATIENCE_S", "2")
    place, source = s3.place(), rae_with("shards", "latents", "dit")
    with proxy.cutting(every_s):
        in_the_end(lambda: source("push", "dit/tiny", "--to", place, "-w", source.workspace))
        in_the_end(lambda: rae("pull", "dit/tiny", "--from", place, "-w", rae.workspace))
    assert proxy.cuts > 0
    assert is_whole(place)
    for kind in ("shards", "latents", "dit"):
        assert rae.payload(kind) == source.payload(kind)


def test_a_push_to_a_server_that_goes_down_shows_nothing_half(rae_with: Made, s3, proxy: Proxy, monkeypatch) -> None:
    monkeypatch.setenv("RAE_REMOTE_PATIENCE_S", "0.3")
    place, source = s3.place(), rae_with("shards", "latents")

    def push() -> Ran:
        return source("push", "latents/tiny", "--to", place, "-w", source.workspace)

    for writes in (3, 9, 15):
        with s3.failing(after=writes):
            push().refused(6)
        assert is_whole(place)
    with proxy.down():
        push().refused(6, "does not answer", "rae push latents/tiny")
    push().succeeded()
    assert is_whole(place)
    assert {artifact.kind for artifact in Workspace(place).artifacts()} == {"shards", "latents"}


def test_training_gets_through_connections_that_break_and_ends_the_same(
    finished: Rae, rae: Rae, s3, proxy: Proxy, monkeypatch
) -> None:
    monkeypatch.setenv("RAE_REMOTE_PATIENCE_S", "2")
    place = s3.place()
    finished("push", "latents/tiny", "--to", place, "-w", finished.workspace).succeeded()
    monkeypatch.setenv("RAE_UPSTREAMS", place)
    with proxy.cutting(0.05):
        in_the_end(lambda: rae.verb("train-dit"))
    assert rae.content("dit") == finished.content("dit")


def test_training_whose_latents_are_gone_stops_and_goes_on_when_they_are_back(
    finished: Rae, rae: Rae, s3, proxy: Proxy, monkeypatch
) -> None:
    monkeypatch.setenv("RAE_REMOTE_PATIENCE_S", "0.3")
    place = s3.place()
    finished("push", "latents/tiny", "--to", place, "-w", finished.workspace).succeeded()
    monkeypatch.setenv("RAE_UPSTREAMS", place)
    monkeypatch.setenv("RAE_CACHE_GB", "0")
    with s3.without("/latents/c/", after=6):
        rae.verb("train-dit").refused(6, "does not answer", "rae train-dit")
    assert not list(Workspace(rae.workspace).artifacts("dit"))
    rae.verb("train-dit").succeeded()
    assert rae.content("dit") == finished.content("dit")


def test_encoding_into_a_bucket_gets_through_connections_that_break(
    finished: Rae, rae: Rae, s3, proxy: Proxy, monkeypatch
) -> None:
    monkeypatch.setenv("RAE_REMOTE_PATIENCE_S", "2")
    place = s3.place()
    finished("push", "shards/tiny", "--to", place, "-w", finished.workspace).succeeded()
    rae.workspace = place
    with proxy.cutting(0.05):
        in_the_end(lambda: rae.verb("encode"))
    assert proxy.cuts > 0
    assert is_whole(place)
    assert Workspace(place).resolve("latents/tiny").manifest.content == finished.content("latents")
    rae("verify", "latents/tiny", "-w", place).succeeded()
