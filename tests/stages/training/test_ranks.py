import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rae.stages.training.metrics_log import read
from rae.stages.training.ranks import Ranks
from rae.store.errors import ConfigError

SCRIPT = Path(__file__).parent / "two_ranks.py"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same training by one process and by two."""
    folders = {}
    for name, launcher in (("one", []), ("two", TORCHRUN)):
        folder = folders[name] = tmp_path_factory.mktemp(name)
        command = [sys.executable, *launcher, str(SCRIPT), str(folder)]
        done = subprocess.run(
            command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    return folders


@pytest.fixture(scope="module")
def facts(runs):
    return {name: json.loads((folder / "facts.json").read_text()) for name, folder in runs.items()}


def test_two_processes_see_the_global_batches_of_one(facts):
    (whole,) = facts["one"]["batches"]
    left, right = facts["two"]["batches"]
    assert [a + b for a, b in zip(left, right, strict=True)] == whole
    assert all(len(a) == len(b) == 4 for a, b in zip(left, right, strict=True))


def test_first_gradients_are_those_of_one_process(runs):
    one, two = (load_file(runs[name] / "gradients.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, gradient in one.items():
        assert (two[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def test_losses_and_weights_are_those_of_one_process(runs):
    one, two = (read(runs[name] / "whole" / "metrics.jsonl") for name in ("one", "two"))
    for key in ("loss", "l1", "grad_norm", "lr"):
        assert [line[key] for line in two] == pytest.approx([line[key] for line in one], rel=1e-5)
    assert len(one) == 20
    one, two = (load_file(runs[name] / "trained.safetensors") for name in ("one", "two"))
    for name, weight in one.items():
        assert torch.allclose(two[name], weight, atol=1e-5)


def test_ranks_agree(facts):
    assert facts["one"]["any"] == facts["two"]["any"] == [True, False]
    assert facts["one"]["mean"] == [0.0, 2.0]
    assert facts["two"]["mean"] == [0.5, 2.0]
    assert facts["two"]["broadcast"] == ["from 0", "from 0"]


def test_a_stop_asked_of_one_rank_stops_all_after_the_same_step(runs, facts):
    stopped = "training stopped at step 3 of 20; its checkpoint is saved"
    assert facts["one"]["stopped"] == [["PartialResult", "SIGTERM"]]
    assert facts["two"]["stopped"] == [["PartialResult", stopped], ["PartialResult", "SIGTERM"]]
    for folder in runs.values():
        assert [path.name for path in (folder / "stopped" / "checkpoints").iterdir()] == ["step-00000003"]


def test_a_resumed_run_of_two_processes_is_the_whole_one_to_the_bit(runs):
    for folder in runs.values():
        whole, resumed = load_file(folder / "trained.safetensors"), load_file(folder / "resumed.safetensors")
        assert all(torch.equal(resumed[name], weight) for name, weight in whole.items())
        lines, again = (read(folder / run / "metrics.jsonl") for run in ("whole", "resumed"))
        assert [line["loss"] for line in again] == [line["loss"] for line in lines]


def test_a_loss_that_is_not_finite_on_one_rank_is_reported_by_all(facts):
    step = next(step for step, rows in enumerate(facts["one"]["batches"][0]) if 7 in rows)
    share = next(shares[step] for shares in facts["two"]["batches"] if 7 in shares[step])
    named = f"the loss became nan at step {step + 1}, on samples {', '.join(map(str, share))}"
    assert facts["two"]["non_finite"] == [["NonFinite", named]] * 2


def test_a_step_that_one_rank_cannot_take_is_skipped_by_all(runs, facts):
    steps = [step + 1 for step, rows in enumerate(facts["one"]["batches"][0]) if 7 in rows]
    assert len(steps) > 2
    for name, folder in runs.items():
        lines = read(folder / "patient" / "metrics.jsonl")
        assert [line["step"] for line in lines if "skipped" in line] == steps
        assert facts[name]["patient_alike"]
    one, two = (load_file(runs[name] / "patient.safetensors") for name in ("one", "two"))
    for name, weight in one.items():
        assert torch.allclose(two[name], weight, atol=1e-5)


def test_the_environment_says_who_we_are(monkeypatch):
    for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(key, raising=False)
    assert Ranks.from_environment() == Ranks(0, 1, 0)
    for key, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(key, value)
    ranks = Ranks.from_environment()
    assert ranks == Ranks(5, 8, 1)
    assert not ranks.is_main
    assert str(ranks.device("cuda")) == "cuda:1"
    assert str(ranks.device("cpu")) == "cpu"
    monkeypatch.setenv("RANK", "first")
    with pytest.raises(ConfigError, match="must be whole numbers"):
        Ranks.from_environment()
