"""A whole workspace in a bucket: killed on one machine, continued on an empty one."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rae.store.artifacts import Workspace
from rae.store.remote import open_objects
from tests.conftest import TINY, Rae


def wait_for(place: str, ending: str, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not any(one.key.endswith(ending) for one in open_objects(place).below("")):
        assert time.monotonic() < deadline, f"nothing that ends in {ending} has come to {place}"
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("verb", "kind", "settings", "seen"),
    [
        ("train-dit", "dit", ["train_dit.steps=200", "train_dit.checkpoint_every=10"], "checkpoint.json"),
        ("encode", "latents", [], "parts/000003.json"),
    ],
)
def test_what_was_killed_goes_on_on_an_empty_machine(
    finished: Rae, s3, tmp_path: Path, monkeypatch, verb: str, kind: str, settings: list[str], seen: str
) -> None:
    place = s3.place()
    finished("push", f"{'latents' if kind == 'dit' else 'shards'}/tiny", "--to", place, "-w", finished.workspace)
    words = [word for setting in settings for word in ("-s", setting)]
    rae = Rae(tmp_path / "first", TINY)
    rae.workspace = place
    environment = os.environ | {"OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(tmp_path / "xdg")}
    command = [sys.executable, "-m", "rae.pipeline.cli", *rae.words(verb, *words)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(place, seen)
    process.kill()
    process.wait()
    assert [one.kind for one in Workspace(place).unfinished()] == [kind]
    monkeypatch.setenv("RAE_CACHE", str(tmp_path / "empty"))
    ran = rae.verb(verb, *words).succeeded()
    if kind == "dit":
        assert "continued from step" in ran.out + ran.err
    whole = finished.copy(tmp_path / "whole", "shards", *(["latents"] if kind == "dit" else []))
    whole.verb(verb, *words).succeeded()
    assert Workspace(place).resolve(f"{kind}/tiny").manifest.content == whole.content(kind)
    assert not list(Workspace(place).unfinished())
