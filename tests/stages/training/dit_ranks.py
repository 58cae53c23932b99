"""Run by test_parallel.py, alone or by torchrun: one small transformer's training among any number of processes.

`dit_ranks.py OUT NAME...` writes the runs of these names below OUT, each as checkpoints and a log.
"""

import errno
import json
import os
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from rae.stages.job import Job
from rae.stages.models.dit import DiTConfig, DiTDH
from rae.stages.models.payload import Payload
from rae.stages.models.transport import create_transport
from rae.stages.training.ema import PowerEMAs
from rae.stages.training.learner import Learner
from rae.stages.training.loop import train
from rae.stages.training.parallel import gathered
from rae.stages.training.randomness import normal, uniform
from rae.stages.training.ranks import Ranks
from rae.stages.training.sections import TrainDitSection
from rae.store.errors import RaeError
from rae.store.order import GlobalShuffle, batch_rows

ROWS, C, GRID, CLASSES = 26, 6, 2, 3
PAYLOAD = Payload("dit.json", {"what": "a small one"})
SECTION = TrainDitSection(
    steps=20,
    batch_size=8,
    lr=2e-3,
    schedule="cosine",
    warmup_steps=2,
    clip_grad=0.5,
    ema_decay=0.8,
    log_every=1,
    checkpoint_every=10,
    keep_checkpoints=9,
)
CONFIG = DiTConfig(
    model="DiT-DH",
    in_channels=C,
    input_size=GRID,
    hidden_size=(8, 12),
    depth=(2, 1),
    num_heads=(2, 1),
    mlp_ratio=2.0,
    class_dropout_prob=0.1,
    num_classes=CLASSES,
    use_qknorm=False,
)
RUNS = {
    "ddp": {},
    "accumulated": {"grad_accum_steps": 2},
    "bf16": {"precision": "bf16"},
    "fsdp2": {"parallel": "fsdp2"},
    "fsdp2_accumulated": {"parallel": "fsdp2", "grad_accum_steps": 2},
    "fsdp2_skipping": {
        "parallel": "fsdp2",
        "grad_accum_steps": 2,
        "max_skipped_steps": 20,
        "checkpoint_every": 1,
    },
    "fsdp2_lengths": {"parallel": "fsdp2", "ema_sigma_rel": (0.05, 0.1), "ema_snapshot_every": 10},
    "fsdp2_full_disk": {"parallel": "fsdp2"},
    "fsdp2_resumed": {"parallel": "fsdp2"},
    "fsdp2_taken_over": {"parallel": "fsdp2"},
    "compiled": {"compile": True, "steps": 5},
}


@dataclass
class Batch:
    x: Tensor
    y: Tensor
    t: Tensor
    noise: Tensor
    rows: np.ndarray

    @property
    def keys(self):
        return self.rows.tolist()

    def split(self, parts):
        pieces = (tensor.chunk(parts) for tensor in (self.x, self.y, self.t, self.noise))
        return [Batch(*piece) for piece in zip(*pieces, np.split(self.rows, parts), strict=True)]


def batch_of(ranks):
    def batch(epoch, step):
        rows = batch_rows(GlobalShuffle(ROWS), 8, SECTION.seed, epoch, step, ranks.rank, ranks.world_size)
        x, noise = (normal((C, GRID, GRID), 0, what, when, rows) for what, when in (("x", 0), ("noise", epoch)))
        return Batch(x, torch.from_numpy(rows % CLASSES), uniform(0, "time", epoch, rows), noise, rows)

    return batch


def loss(forward, batch):
    losses = create_transport().training_losses(forward, batch.x, batch.y, t=batch.t, noise=batch.noise)
    return losses.mean(), {}


def nan_for_row_7(forward, batch):
    value, numbers = loss(forward, batch)
    return (value * float("nan") if 7 in batch.rows else value), numbers


def small_dit():
    """With weights drawn everywhere: as initialised, most gradients of the first step are zero."""
    torch.manual_seed(1)
    dit = DiTDH(CONFIG)
    for parameter in dit.parameters():
        nn.init.normal_(parameter, std=0.2)
    return dit


def run(section, job, ranks):
    chosen = nan_for_row_7 if section.max_skipped_steps else loss
    dit, every = small_dit(), section.ema_snapshot_every
    averages = PowerEMAs(dit, section.ema_sigma_rel, every) if every else None
    placed = {"rows": ROWS, "ranks": ranks, "device": torch.device("cpu")}
    learner = Learner(dit, chosen, section, power_emas=averages, **placed)
    result = train(learner, batch_of(ranks), section, PAYLOAD, rows=ROWS, job=job, ranks=ranks)
    return learner, result


def first_gradients(section, ranks):
    learner = Learner(small_dit(), loss, section, rows=ROWS, ranks=ranks, device=torch.device("cpu"))
    learner.step(batch_of(ranks)(0, 0), 0)
    return gathered({name: parameter.grad for name, parameter in learner.model.named_parameters()}, ranks)


def half_done(whole, job, ranks):
    """A job that goes on from what the run `whole` had done when it was interrupted."""
    half = job.folder.with_name(f"{job.folder.name}_from")
    if ranks.is_main:
        shutil.copytree(whole, half)
        shutil.rmtree(half / "checkpoints" / "step-00000020")
    ranks.barrier()
    return replace(job, earlier=(half,), milestones=frozenset())


def run_out_of_space(section, job, ranks):
    """What a rank says when the last one has no room for the third group of tensors of its second checkpoint."""
    flushes, fsync = [], os.fsync

    def filling(handle):
        flushes.append(handle)
        if ranks.rank == ranks.world_size - 1 and len(flushes) == 6:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(handle)

    with mock.patch("os.fsync", filling):
        try:
            run(section, job, ranks)
        except RaeError as error:
            return [type(error).__name__, error.message]


def main(out, names):
    ranks = Ranks.from_environment()
    with ranks.process_group(torch.device("cpu")):
        for name in names:
            section = SECTION.model_copy(update=RUNS[name])
            gradients = first_gradients(section.model_copy(update={"clip_grad": 0.0}), ranks)
            if ranks.is_main:
                save_file(gradients, out / f"{name}.safetensors")

            def publish(step, write, also=None, name=name):
                folder = out / f"{name}@step={step}"
                folder.mkdir()
                write(folder)

            job = Job(out / name, milestones=frozenset({min(5, section.steps)}), publish=publish)
            if name == "fsdp2_resumed":
                job = half_done(out / "fsdp2", job, ranks)
            if name == "fsdp2_taken_over":  # from one process
                job = half_done(out.parent / "whole", job, ranks)
            if name == "fsdp2_full_disk":
                facts = ranks.gather(run_out_of_space(section, job, ranks))
                (out / "full_disk.json").write_text(json.dumps(facts))
                continue
            run(section, job, ranks)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), sys.argv[2:])
    os._exit(0)  # gloo's threads can abort an interpreter that shuts down around them, after all is done
