"""Garbage is collected in a loop, without a grace period, while a run is at work: nothing that it needs vanishes."""

import json
import time
from collections.abc import Callable
from pathlib import Path

from rae.store.artifacts import Workspace
from rae.store.removal import Collector
from tests.conftest import Rae, Warm


def superseded(rae: Rae, kind: str) -> Path:
    """What was made before under this name, and has none any more."""
    ref = rae.workspace / "refs" / kind / "tiny.json"
    folder = rae.workspace / "objects" / kind / json.loads(ref.read_text())["id"]
    ref.unlink()
    return folder


def test_a_run_ends_the_same_while_garbage_is_collected(
    finished: Rae, rae_with: Callable[..., Rae], warm: Warm
) -> None:
    rae = rae_with("decoder", "dit")  # of which the run needs none: it begins with shards
    old = [superseded(rae, kind) for kind in ("decoder", "dit")]
    options = ["-s", "train_decoder.steps=7", "-s", "train_dit.steps=9", "-s", "train_dit.publish_at=[3]"]
    running = warm.start(rae.words("run", *options))
    gone, rounds, began = [], 0, time.monotonic()
    while not (rae.workspace / "reports" / "tiny.html").exists() and "next:" not in running.err():
        collector = Collector(Workspace(rae.workspace), grace=0.0, unfinished=True)
        gone += [rae.workspace / one.key for one in collector.find() if collector.remove(one)]
        rounds += 1
        time.sleep(0.01)
        assert time.monotonic() - began < 300, running.err()
    running.wait().succeeded()
    assert rounds > 10
    assert set(old) <= set(gone)
    assert not [path for path in gone if path not in old]
    for kind in ("shards", "latents"):
        assert rae.payload(kind) == finished.payload(kind)
    for ref in ("decoder/tiny", "dit/tiny", "dit/tiny@step=3", "samples/tiny"):
        rae("verify", ref, "-w", rae.workspace).succeeded()
    assert not list((rae.workspace / "leases").iterdir())
