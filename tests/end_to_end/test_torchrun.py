"""Several processes make what one makes: the same latents to the bit, the same training but for rounding."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rae as api
from rae.store.artifacts import Workspace
from rae.store.samples import read_batches
from tests.conftest import TINY, Rae, one_thread


def manifests(workspace: Path) -> dict[str, dict[str, Any]]:
    """The manifest of each kind; of milestones, of `milestone`."""
    found = [json.loads(path.read_bytes()) for path in workspace.glob("objects/*/*/manifest.json")]
    return {"milestone" if "milestone" in one["recipe"] else one["kind"]: one for one in found}


def test_two_processes_run_the_whole_pipeline(finished: Rae, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "rae.pipeline.cli", "run", str(finished.config), "-w", str(tmp_path / "w"), "--to", "sample"]
    command += ["-s", "train_dit.publish_at=[3]", "-s", f"train_dit.evaluate_every={TINY['train_dit']['steps']}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = manifests(finished.workspace), manifests(tmp_path / "w")
    milestone = two.pop("milestone")
    assert (milestone["kind"], milestone["metrics"]["steps"]) == ("dit", 3)
    assert set(two) == {"shards", "latents", "decoder", "dit", "samples"}
    for kind, manifest in two.items():
        assert manifest["id"] == one[kind]["id"], kind
    assert two["latents"]["content"] == one["latents"]["content"]
    for kind in ("decoder", "dit"):
        assert two[kind]["metrics"]["loss"] == pytest.approx(one[kind]["metrics"]["loss"], rel=1e-4)
    assert two["samples"]["metrics"]["images"] == one["samples"]["metrics"]["images"]
    place, workspace = str(tmp_path / "w"), Workspace(tmp_path / "w")
    log = (workspace.resolve("dit/tiny").payload / "metrics.jsonl").read_text().splitlines()
    (scored,) = [line for line in map(json.loads, log) if "ema_frechet_distance" in line]
    expected = one["scores"]["metrics"]["frechet_distance"]
    assert scored["ema_frechet_distance"] == pytest.approx(expected, rel=0.01)
    dit, decoder = api.load_dit("tiny", place), api.load_decoder("tiny", place)
    labels = [index % dit.num_classes for index in range(TINY["sample"]["num_images"])]
    settings = {key: TINY["sample"][key] for key in ("num_steps", "batch_size")}
    with one_thread():
        alone = api.sample(dit, decoder, labels, **settings)
    batches = list(read_batches(workspace.resolve("samples/tiny").payload))
    assert [label for batch in batches for label in batch.labels] == labels
    np.testing.assert_array_equal(np.concatenate([batch.images for batch in batches]), alone)


def test_two_processes_take_the_scores_of_one(finished: Rae, tmp_path: Path) -> None:
    other = finished.copy(tmp_path / "two", "shards", "latents", "decoder", "dit", "samples")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "rae.pipeline.cli", "evaluate", str(other.config), "-w", str(other.workspace)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = (manifests(rae.workspace)["scores"] for rae in (finished, other))
    assert two["id"] == one["id"]
    for name in ("frechet_distance", "precision", "recall", "density", "coverage", "transfer_accuracy"):
        assert two["metrics"][name] == pytest.approx(one["metrics"][name], rel=1e-6), name
    assert not list(other.workspace.rglob("features")), "features are gone once the scores are there"
