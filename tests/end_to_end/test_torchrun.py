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


def two_processes(rae: Rae, verb: str, workspace: Path, *words: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "rae.pipeline.cli", verb, str(rae.config), "-w", str(workspace), *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(workspace.parent / "cache")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def settings(**values: object) -> list[str]:
    return [word for key, value in values.items() for word in ("-s", f"{key.replace('__', '.')}={value}")]


def test_two_processes_run_the_whole_pipeline(finished: Rae, tmp_path: Path) -> None:
    accumulated = settings(train_decoder__grad_accum_steps=2, train_dit__grad_accum_steps=4)
    watched = settings(train_dit__publish_at="[3]", train_dit__evaluate_every=TINY["train_dit"]["steps"])
    two_processes(finished, "run", tmp_path / "w", "--to", "sample", *watched, *accumulated)
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
    sampler = {key: TINY["sample"][key] for key in ("num_steps", "batch_size")}
    with one_thread():
        alone = api.sample(dit, decoder, labels, **sampler)
    batches = list(read_batches(workspace.resolve("samples/tiny").payload))
    assert [label for batch in batches for label in batch.labels] == labels
    np.testing.assert_array_equal(np.concatenate([batch.images for batch in batches]), alone)


def test_two_processes_take_the_scores_of_one(finished: Rae, tmp_path: Path) -> None:
    other = finished.copy(tmp_path / "two", "shards", "latents", "decoder", "dit", "samples")
    two_processes(other, "evaluate", other.workspace)
    one, two = (manifests(rae.workspace)["scores"] for rae in (finished, other))
    assert two["id"] == one["id"]
    for name in ("frechet_distance", "precision", "recall", "density", "coverage", "transfer_accuracy"):
        assert two["metrics"][name] == pytest.approx(one["metrics"][name], rel=1e-6), name
    assert not list(other.workspace.rglob("features")), "features are gone once the scores are there"


def test_shards_continue_what_one_process_finished_and_a_milestone_of_theirs_guides(
    finished: Rae, tmp_path: Path
) -> None:
    one, two = (finished.copy(tmp_path / name, "shards", "latents", "decoder", "dit") for name in ("one", "two"))
    half = finished.artifact("dit/tiny")["id"]
    longer = settings(train_dit__continue_from=half, train_dit__steps=12, train_dit__publish_at="[10]")
    guided = settings(sample__guide="step=10", sample__guidance_scale=1.5)
    one.verb("run", *longer, *guided, "--to", "sample").succeeded()
    sharded = settings(train_dit__parallel="fsdp2")
    two_processes(two, "run", two.workspace, "--to", "sample", *longer, *guided, *sharded)
    for ref in ("dit/tiny", "dit/tiny@step=10", "samples/tiny"):
        ours, theirs = two.artifact(ref), one.artifact(ref)
        assert ours["recipe"] == theirs["recipe"]
        if ref.startswith("dit"):
            assert ours["metrics"]["loss"] == pytest.approx(theirs["metrics"]["loss"], rel=1e-4)
    assert list(Path(two.artifact("dit/tiny")["path"]).rglob("step-00000012/optimizer/shard-*"))
    two("verify", "dit/tiny", "-w", two.workspace).succeeded()
    further = settings(train_dit__continue_from=two.artifact("dit/tiny")["id"], train_dit__steps=13)
    two.verb("train-dit", *further).succeeded()  # by one process, from shards
