"""The same run at any scale: replicas, shards and accumulated parts make what one process makes, but for rounding."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rae.stages.job import Job
from rae.stages.models.power_ema import find_snapshots
from rae.stages.models.saving import read_tensors
from rae.stages.training.checkpoints import find_model, load
from rae.stages.training.learner import Learner
from rae.stages.training.metrics_log import read
from rae.stages.training.ranks import Ranks
from rae.stages.training.sections import TrainDecoderSection, TrainDitSection
from rae.store.errors import ConfigError, CorruptData
from tests.conftest import one_thread
from tests.stages.training.dit_ranks import RUNS, SECTION, first_gradients, loss, run, small_dit

SCRIPT = Path(__file__).with_name("dit_ranks.py")
ALONE = Ranks()


def torchrun(processes: int, out: Path, *names: str) -> None:
    out.mkdir(parents=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(SCRIPT), str(out), *names], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One process: the folder of its run, and its first gradients."""
    out = tmp_path_factory.mktemp("scales")
    with one_thread():
        gradients = first_gradients(SECTION.model_copy(update={"clip_grad": 0.0}), ALONE)
        run(SECTION, Job(out / "whole"), ALONE)
    return out, gradients


@pytest.fixture(scope="module")
def two(alone):
    out = alone[0] / "two"
    names = (
        "ddp",
        "accumulated",
        "bf16",
        "fsdp2",
        "fsdp2_accumulated",
        "fsdp2_resumed",
        "fsdp2_taken_over",
        "fsdp2_skipping",
        "fsdp2_full_disk",
        "fsdp2_lengths",
    )
    torchrun(2, out, *names)
    return out


@pytest.fixture(scope="module")
def four(alone):
    out = alone[0] / "four"
    torchrun(4, out, "ddp", "fsdp2")
    return out


def losses(folder):
    return [line["loss"] for line in read(folder / "metrics.jsonl")]


def assert_near(left, right, rel=1e-5):
    assert left.keys() == right.keys()
    for name, tensor in right.items():
        assert (left[name] - tensor).norm() <= rel * tensor.norm() + 1e-8, name


SCALES = [
    ("two", "ddp"),
    ("two", "accumulated"),
    ("two", "fsdp2"),
    ("two", "fsdp2_accumulated"),
    ("four", "ddp"),
    ("four", "fsdp2"),
]


@pytest.mark.parametrize(("processes", "name"), SCALES)
def test_gradients_losses_and_weights_are_those_of_one_process(alone, processes, name, request):
    out, gradients = alone
    folder = request.getfixturevalue(processes)
    assert min(gradient.norm() for gradient in gradients.values()) > 1e-4
    assert_near(load_file(folder / f"{name}.safetensors"), gradients)
    assert losses(folder / name) == pytest.approx(losses(out / "whole"), rel=1e-5)
    assert len(losses(folder / name)) == 20
    for weights in ("model", "ema"):
        ours, theirs = (load_file(where / f"{weights}.safetensors") for where in (folder / name, out / "whole"))
        assert_near(ours, theirs, rel=1e-4)


def test_accumulation_is_the_larger_batch_for_one_process(alone, tmp_path):
    out, gradients = alone
    section = SECTION.model_copy(update={"grad_accum_steps": 4})
    with one_thread():
        assert_near(first_gradients(section.model_copy(update={"clip_grad": 0.0}), ALONE), gradients)
        run(section, Job(tmp_path), ALONE)
    assert losses(tmp_path) == pytest.approx(losses(out / "whole"), rel=1e-5)
    assert section.in_recipe() == SECTION.in_recipe()


def test_bf16_on_two_ranks_is_near_float32(alone, two):
    found, wanted = losses(two / "bf16"), losses(alone[0] / "whole")
    assert found == pytest.approx(wanted, rel=0.05)
    assert found != wanted


def test_a_sharded_checkpoint_is_read_by_one_process(alone, two, tmp_path):
    """It holds what a whole one holds, goes on in one process, and a model is found in it."""
    folder = two / "fsdp2" / "checkpoints" / "step-00000010"
    shards = sorted(path.name for path in (folder / "model").iterdir())
    assert len(shards) == 2
    assert not (folder / "model.safetensors").exists()
    sharded, whole = load(folder), load(alone[0] / "whole" / "checkpoints" / "step-00000010")
    assert sharded.tensors.keys() == whole.tensors.keys()
    for group, tensors in whole.tensors.items():
        assert_near(sharded.tensors[group], tensors, rel=1e-4)
    earlier = tmp_path / "earlier"
    shutil.copytree(two / "fsdp2", earlier)
    shutil.rmtree(earlier / "checkpoints" / "step-00000020")
    with one_thread():
        run(SECTION, Job(tmp_path / "on", earlier=(earlier,)), ALONE)
    assert losses(tmp_path / "on") == pytest.approx(losses(alone[0] / "whole"), rel=1e-5)
    found = find_model([two / "fsdp2"], "ema", 10)
    assert found is not None
    assert_near(read_tensors(found[0] / "ema.safetensors"), sharded.tensors["ema"], rel=0)


def test_shards_go_on_from_what_one_process_saved(alone, two):
    assert losses(two / "fsdp2_taken_over") == pytest.approx(losses(alone[0] / "whole"), rel=1e-5)
    assert losses(two / "fsdp2_taken_over")[:10] == losses(alone[0] / "whole")[:10]


def test_shards_resumed_are_the_whole_run_to_the_bit(two):
    assert losses(two / "fsdp2_resumed") == losses(two / "fsdp2")
    for weights in ("model", "ema"):
        resumed, whole = (load_file(two / name / f"{weights}.safetensors") for name in ("fsdp2_resumed", "fsdp2"))
        assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())


def test_shards_skip_the_steps_that_one_process_skips(two, tmp_path):
    """And a checkpoint saved right after one is in shards like any other."""
    section = SECTION.model_copy(update={"max_skipped_steps": 20})
    with one_thread():
        run(section, Job(tmp_path), ALONE)
    skipped = [
        [line["step"] for line in read(where / "metrics.jsonl") if "skipped" in line]
        for where in (two / "fsdp2_skipping", tmp_path)
    ]
    assert skipped[0] == skipped[1] != []
    ours, theirs = (load_file(where / "ema.safetensors") for where in (two / "fsdp2_skipping", tmp_path))
    assert_near(ours, theirs, rel=1e-4)


def test_averages_whose_length_is_chosen_later_are_those_of_one_process(two, tmp_path):
    section = SECTION.model_copy(update={"ema_sigma_rel": (0.05, 0.1), "ema_snapshot_every": 10})
    with one_thread():
        run(section, Job(tmp_path), ALONE)
    assert len(find_snapshots(tmp_path)) == 4
    for path in find_snapshots(tmp_path):
        assert_near(load_file(two / "fsdp2_lengths" / path.relative_to(tmp_path)), load_file(path), rel=1e-4)


def test_a_damaged_shard_is_found(two, tmp_path):
    shutil.copytree(two / "fsdp2" / "checkpoints" / "step-00000020", tmp_path / "step-00000020")
    shard = next((tmp_path / "step-00000020" / "ema").iterdir())
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(CorruptData, match="its sha256 differs"):
        load(tmp_path / "step-00000020")


def test_a_disk_that_is_full_for_one_rank_stops_all_and_leaves_the_checkpoint_before(two):
    said = json.loads((two / "full_disk.json").read_text())
    assert [kind for kind, _ in said] == ["PartialResult"] * 2
    assert all("the disk is full: the checkpoint of step 20 could not be written" in message for _, message in said)
    kept = two / "fsdp2_full_disk" / "checkpoints"
    assert [path.name for path in kept.iterdir()] == ["step-00000010"]
    assert load(kept / "step-00000010").step == 10


def test_milestones_are_whole_models(alone, two, tmp_path):
    with one_thread():
        run(SECTION.model_copy(update={"checkpoint_every": 5}), Job(tmp_path), ALONE)
    wanted = load(tmp_path / "checkpoints" / "step-00000005").tensors
    for name in ("ddp", "fsdp2"):
        for weights in ("model", "ema"):
            assert_near(load_file(two / f"{name}@step=5" / f"{weights}.safetensors"), wanted[weights], rel=1e-4)


def test_a_finished_run_stores_its_weights_once(alone, two):
    for folder in (alone[0] / "whole", two / "ddp"):
        for name in ("model.safetensors", "ema.safetensors"):
            assert os.path.samefile(folder / name, folder / "checkpoints" / "step-00000020" / name)


def test_sizes_that_do_not_divide_are_refused():
    section = SECTION.model_copy(update={"grad_accum_steps": 2})
    with pytest.raises(ConfigError, match="`batch_size` 8 does not divide into `grad_accum_steps` 2 parts on each of"):
        Learner(small_dit(), loss, section, rows=26, ranks=Ranks(0, 3), device=torch.device("cpu"))
    with pytest.raises(ValueError, match="does not divide into `grad_accum_steps` 3 parts"):
        TrainDitSection(steps=1, batch_size=8, grad_accum_steps=3)
    with pytest.raises(ValueError, match="`parallel: fsdp2` needs `adversarial_loss: none`"):
        TrainDecoderSection(steps=1, parallel="fsdp2")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_on_two_ranks_it_learns_the_same(alone, tmp_path):
    torchrun(2, tmp_path / "two", "compiled")
    with one_thread():
        run(SECTION.model_copy(update={"steps": RUNS["compiled"]["steps"]}), Job(tmp_path / "plain"), ALONE)
    assert losses(tmp_path / "two" / "compiled") == pytest.approx(losses(tmp_path / "plain"), rel=1e-4)
