import errno
import math
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rae.stages.job import Job
from rae.stages.models.payload import Payload
from rae.stages.training.learner import Learner
from rae.stages.training.loop import train
from rae.stages.training.metrics_log import read
from rae.stages.training.randomness import normal
from rae.stages.training.ranks import Ranks
from rae.stages.training.section import TrainingSection
from rae.store.errors import PartialResult, RaeError
from rae.store.order import GlobalShuffle, batch_rows

ROWS = 10
PAYLOAD = Payload("model.json", {"what": "points"})
SECTION = TrainingSection(
    steps=9,  # 3 steps an epoch
    batch_size=3,
    lr=0.05,
    schedule="cosine",
    warmup_steps=2,
    clip_grad=1.0,
    ema_decay=0.8,
    log_every=4,
    checkpoint_every=2,
)


@dataclass
class Points:
    """Rows of a made-up data set; the input is noised anew in each epoch."""

    rows: np.ndarray
    inputs: Tensor
    targets: Tensor

    @property
    def keys(self) -> list[str]:
        return [f"point-{row}" for row in self.rows]


def points(section: TrainingSection) -> Callable[[int, int], Points]:
    def batch(epoch: int, step: int) -> Points:
        rows = batch_rows(GlobalShuffle(ROWS), section.batch_size, section.seed, epoch, step)
        clean = normal((4,), section.seed, "point", 0, rows)
        return Points(rows, clean + 0.1 * normal((4,), section.seed, "noise", epoch, rows), clean.flip(1))

    return batch


def loss(forward: nn.Module, batch: Points) -> tuple[Tensor, dict[str, Tensor]]:
    output = forward(batch.inputs)
    return F.mse_loss(output, batch.targets), {"l1": F.l1_loss(output, batch.targets)}


def learner_of(section: TrainingSection, loss: Any = loss) -> Learner[Points]:
    torch.manual_seed(section.seed)
    model = nn.Sequential(nn.Linear(4, 32), nn.GELU(), nn.Linear(32, 4))
    return Learner(model, loss, section, rows=ROWS, ranks=Ranks(), device=torch.device("cpu"))


def run(section: TrainingSection, job: Job, loss: Any = loss, make: Any = None) -> tuple[Learner[Points], Any]:
    learner = learner_of(section, loss)
    result = train(learner, make or points(section), section, PAYLOAD, rows=ROWS, job=job, ranks=Ranks())
    return learner, result.metrics


def numbers_of(folder: Path) -> list[dict[str, Any]]:
    """The log without what a clock says."""
    return [{k: v for k, v in line.items() if k not in ("images_per_s", "data_wait")} for line in log_of(folder)]


def log_of(folder: Path) -> list[dict[str, Any]]:
    return read(folder / "metrics.jsonl")


def assert_same(left: Learner[Points], right: Learner[Points]) -> None:
    for group, tensors in left.tensors().items():
        for name, tensor in tensors.items():
            assert torch.equal(right.tensors()[group][name], tensor), f"{group} {name}"


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    learner, result = run(SECTION, Job(folder))
    return learner, result, folder


def test_it_learns_and_says_how(uninterrupted):
    learner, result, folder = uninterrupted
    assert result["steps"] == 9
    assert result["epochs"] == 3
    assert result["seconds"] > 0
    assert 0 <= result["data_wait"] <= 1
    assert result["images_per_s"] == pytest.approx(27 / result["seconds"])
    lines = log_of(folder)
    assert [line["step"] for line in lines] == [4, 8, 9]
    assert lines[0].keys() == {"step", "epoch", "loss", "l1", "grad_norm", "lr", "images_per_s", "data_wait"}
    assert lines[-1]["loss"] == result["loss"] < 0.7 * lines[0]["loss"]
    assert not torch.equal(learner.model[0].weight, learner.ema.model[0].weight)
    folders = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert folders == ["step-00000008", "step-00000009"]


def test_the_loop_is_the_plain_one(uninterrupted, tmp_path):
    """Written out with torch's own scheduler, clipping and averaged model: the same weights."""
    section = SECTION
    torch.manual_seed(section.seed)
    model = nn.Sequential(nn.Linear(4, 32), nn.GELU(), nn.Linear(32, 4))
    average = {name: weight.clone() for name, weight in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), section.lr, section.betas, weight_decay=0.0, foreach=False)
    losses = []
    for step in range(9):
        rate = section.lr * (step + 1) / 2
        if step >= 2:
            cosine = 0.5 * (1 + math.cos(math.pi * (step - 2) / 7))
            rate = section.final_lr + (section.lr - section.final_lr) * cosine
        optimizer.param_groups[0]["lr"] = rate
        value, _ = loss(model, points(section)(step // 3, step % 3))
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(value.item())
        for name, weight in model.state_dict().items():
            average[name] = 0.8 * average[name] + 0.2 * weight
    learner, _, folder = uninterrupted
    for name, weight in model.state_dict().items():
        assert torch.allclose(learner.model.state_dict()[name], weight, atol=1e-6)
        assert torch.allclose(learner.ema.model.state_dict()[name], average[name], atol=1e-6)
    logged = [line["loss"] for line in log_of(folder)]
    assert logged == pytest.approx([np.mean(losses[:4]), np.mean(losses[4:8]), losses[8]], rel=1e-5)


@pytest.mark.parametrize("killed_at", range(9))
def test_killed_at_any_step_and_resumed_is_uninterrupted_to_the_bit(uninterrupted, tmp_path, killed_at):
    calls = iter(range(100))

    def killing(forward, batch):
        if next(calls) == killed_at:
            raise KeyboardInterrupt
        return loss(forward, batch)

    first, second = tmp_path / "first", tmp_path / "second"
    with pytest.raises(KeyboardInterrupt):
        run(SECTION, Job(first), killing)
    learner, result = run(SECTION, Job(second, earlier=(first,)))
    assert_same(uninterrupted[0], learner)
    assert numbers_of(second) == numbers_of(uninterrupted[2])
    assert result["loss"] == uninterrupted[1]["loss"]


@pytest.mark.parametrize("stopped_after", range(1, 10))
def test_stopped_after_any_step_and_resumed_loses_no_step(uninterrupted, tmp_path, stopped_after):
    asked = []

    def check_stop():
        if asked and asked[-1] >= stopped_after:
            raise PartialResult("stopped by SIGTERM")

    stopping = Job(
        tmp_path / "first",
        progress=lambda done, total, unit, **numbers: asked.append(done),
        stopping=lambda: asked[-1] >= stopped_after,
        check_stop=check_stop,
    )
    with pytest.raises(PartialResult, match="SIGTERM"):
        run(SECTION, stopping)
    assert asked[-1] == stopped_after
    resumed = []
    job = Job(
        tmp_path / "second",
        earlier=(tmp_path / "first",),
        progress=lambda done, total, unit, **numbers: resumed.append(done),
    )
    learner, result = run(SECTION, job)
    assert resumed == list(range(stopped_after + 1, 10))
    assert_same(uninterrupted[0], learner)
    assert numbers_of(tmp_path / "second") == numbers_of(uninterrupted[2])
    assert result["steps"] == 9


def test_time_adds_up_over_resumes(tmp_path):
    def slow(forward, batch):
        slow.calls += 1
        if slow.calls == 5:
            raise KeyboardInterrupt
        time.sleep(0.02)
        return loss(forward, batch)

    slow.calls = 0
    with pytest.raises(KeyboardInterrupt):
        run(SECTION, Job(tmp_path / "first"), slow)
    _, result = run(SECTION, Job(tmp_path / "second", earlier=(tmp_path / "first",)), slow)
    assert result["seconds"] >= 9 * 0.02


def test_a_finished_run_has_nothing_to_do(uninterrupted, tmp_path):
    def never(forward, batch):
        raise AssertionError("a finished run trained on")

    learner, result = run(SECTION, Job(tmp_path, earlier=(uninterrupted[2],)), never)
    assert_same(uninterrupted[0], learner)
    assert result == uninterrupted[1]
    assert log_of(tmp_path) == log_of(uninterrupted[2])


@pytest.mark.parametrize("change", [{"workers": 0}, {"workers": 3}, {"log_every": 1, "checkpoint_every": 9}])
def test_runtime_settings_do_not_change_the_result(uninterrupted, tmp_path, change):
    section = SECTION.model_copy(update=change)
    assert section.in_recipe() == SECTION.in_recipe()
    assert_same(uninterrupted[0], run(section, Job(tmp_path))[0])


def test_progress_has_the_loss_and_the_speed(tmp_path):
    told = []
    run(SECTION, Job(tmp_path, progress=lambda done, total, unit, **numbers: told.append((done, total, unit, numbers))))
    assert [entry[:3] for entry in told] == [(step, 9, "steps") for step in range(1, 10)]
    for *_, numbers in told:
        assert numbers.keys() == {"loss", "images_per_s", "data_wait"}
        assert numbers["loss"] > 0
        assert numbers["images_per_s"] > 0


def test_waiting_for_data_is_counted(tmp_path):
    def slow(epoch, step):
        time.sleep(0.02)
        return points(SECTION)(epoch, step)

    _, result = run(SECTION.model_copy(update={"workers": 0}), Job(tmp_path), make=slow)
    assert result["data_wait"] * result["seconds"] >= 9 * 0.02


def test_a_loss_that_is_not_finite_names_step_and_samples_and_spares_the_weights(tmp_path):
    def exploding(forward, batch):
        value, numbers = loss(forward, batch)
        return (value * math.nan if 5 in batch.rows else value), numbers

    first = next(step for step in range(9) if 5 in points(SECTION)(*divmod(step, 3)).rows)
    named = ", ".join(points(SECTION)(*divmod(first, 3)).keys)
    with pytest.raises(RaeError, match=f"the loss became nan at step {first + 1}, on samples {named}$"):
        run(SECTION, Job(tmp_path), exploding)


def test_many_samples_are_not_all_named(tmp_path):
    section = SECTION.model_copy(update={"batch_size": 10})
    with pytest.raises(RaeError, match=r"became inf at step 1, on samples (point-\d, ){7}point-\d and 2 more$"):
        run(section, Job(tmp_path), lambda forward, batch: (forward(batch.inputs).square().sum() * math.inf, {}))


def test_weights_ruined_by_the_last_gradient_are_not_saved(tmp_path):
    def steep(forward, batch):
        value, numbers = loss(forward, batch)
        steep.calls += 1
        # Finite itself, and with an infinite derivative.
        return (value + (0 * value).sqrt() if steep.calls == 4 else value), numbers

    steep.calls = 0
    with pytest.raises(RaeError, match="the grad_norm became nan at step 4, on samples point"):
        run(SECTION, Job(tmp_path), steep)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]


def test_a_full_disk_stops_with_what_was_saved(tmp_path, monkeypatch):
    def filling(forward, batch):
        filling.calls += 1
        if filling.calls == 4:
            monkeypatch.setattr(os, "fsync", full)
        return loss(forward, batch)

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    filling.calls = 0
    with pytest.raises(PartialResult, match="disk is full"):
        run(SECTION, Job(tmp_path), filling)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]


def test_bf16_computes_in_bf16_and_keeps_float32_weights(uninterrupted, tmp_path):
    seen = []

    def watching(forward, batch):
        seen.append(forward(batch.inputs).dtype)
        return loss(forward, batch)

    section = SECTION.model_copy(update={"precision": "bf16"})
    learner, result = run(section, Job(tmp_path), watching)
    assert set(seen) == {torch.bfloat16}
    assert {tensor.dtype for group in learner.tensors().values() for tensor in group.values()} == {torch.float32}
    assert result["loss"] == pytest.approx(uninterrupted[1]["loss"], rel=0.05)
    assert result["loss"] != uninterrupted[1]["loss"]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_a_compiled_model_learns_the_same_under_the_same_names(uninterrupted, tmp_path):
    learner, _ = run(SECTION.model_copy(update={"compile": True}), Job(tmp_path))
    for group, tensors in uninterrupted[0].tensors().items():
        assert learner.tensors()[group].keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert torch.allclose(learner.tensors()[group][name], tensor, atol=1e-5), f"{group} {name}"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_in_bf16_a_resumed_run_is_close_to_the_whole(tmp_path):
    section = SECTION.model_copy(update={"precision": "bf16"})
    device = torch.device("cuda")

    def on_device(forward, batch):
        return loss(forward, Points(batch.rows, batch.inputs.to(device), batch.targets.to(device)))

    def trained(steps, job):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 32), nn.GELU(), nn.Linear(32, 4))
        part = section.model_copy(update={"steps": steps, "schedule": "constant"})
        learner = Learner(model, on_device, part, rows=ROWS, ranks=Ranks(), device=device)
        assert learner.optimizer.defaults["fused"]
        train(learner, points(part), part, PAYLOAD, rows=ROWS, job=job, ranks=Ranks())
        return learner

    whole = trained(9, Job(tmp_path / "whole"))
    trained(5, Job(tmp_path / "half"))
    resumed = trained(9, Job(tmp_path / "resumed", earlier=(tmp_path / "half",)))
    for name, weight in whole.ema.model.state_dict().items():
        assert weight.device.type == "cuda"
        assert torch.allclose(resumed.ema.model.state_dict()[name], weight, atol=1e-4)
