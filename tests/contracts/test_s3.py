"""The protocol on S3, against a server on loopback; and what only a server can refuse."""

import logging
from pathlib import Path

import pytest

from contracts.protocol import ObjectsContract, WorkspaceContract, everything, make, recipe
from rae.store.artifacts import Workspace
from rae.store.errors import ConfigError, MissingInput, PartialResult, RaeError
from rae.store.remote import open_objects


@pytest.fixture
def place(s3) -> str:
    return s3.place()


class TestObjects(ObjectsContract):
    pass


class TestWorkspace(WorkspaceContract):
    pass


def test_two_workspaces_below_one_bucket_do_not_see_each_other(s3) -> None:
    one, other = s3.place(), s3.place()
    make(Workspace(one), lr=1.0)
    assert everything(other) == {}
    assert Workspace(other).find("dit", recipe(lr=1.0)) is None


def test_a_store_that_takes_no_writes_is_read(s3, monkeypatch) -> None:
    place = s3.place()
    make(Workspace(place), lr=1.0)
    with s3.read_only():
        assert (Workspace(place).resolve("mine").payload / "model").read_bytes() == b"weights"
        with pytest.raises(MissingInput, match="access is refused"):
            make(Workspace(place), lr=2.0)


def test_a_server_that_is_not_there_ends_in_a_sentence(s3, monkeypatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("RAE_REMOTE_PATIENCE_S", "0.3")
    with pytest.raises(PartialResult, match=r"s3://.* does not answer .*what is done is kept"):
        Workspace(s3.place()).resolve("mine")


def test_missing_credentials_are_named(s3, monkeypatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("RAE_REMOTE_PATIENCE_S", "0.3")
    with pytest.raises(MissingInput, match="no credentials"):
        Workspace(s3.place()).resolve("mine")


@pytest.mark.parametrize(
    "url", ["ftp://bucket/x", "s3:///x", "s3://akid:geheim@bucket/x", "s3://bucket/x?token=geheim"]
)
def test_places_that_are_none_are_refused_without_their_secrets(url: str) -> None:
    with pytest.raises(ConfigError) as refused:
        open_objects(url)
    assert "geheim" not in refused.value.message


def test_credentials_stand_in_nothing_that_is_written_or_said(s3, tmp_path: Path, monkeypatch, caplog) -> None:
    place, said = s3.place(), []
    secrets = [s3.environment[name] for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")]
    with caplog.at_level(logging.DEBUG):
        _ = make(Workspace(place), lr=1.0).payload
        monkeypatch.setenv("RAE_REMOTE_PATIENCE_S", "0.2")
        for endpoint in ("http://127.0.0.1:9", f"http://127.0.0.1:9/{secrets[1]}"):
            monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
            with pytest.raises(RaeError) as error:
                Workspace(place).resolve("mine")
            said.append(f"{error.value.message} {error.value.next_command}")
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.environment["AWS_ENDPOINT_URL"])
    written = [path.read_bytes() for path in s3.cache.rglob("*") if path.is_file()]
    written += [data or b"" for data in everything(place).values()]
    assert written
    for secret in secrets:
        assert not any(secret.encode() in data for data in written)
        assert secret not in " ".join(said) + caplog.text
