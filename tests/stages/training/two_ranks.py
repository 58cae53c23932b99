"""Run by test_ranks.py, alone or by torchrun: one training among any number of processes. Writes below argv[1]."""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from rae.stages.job import Job
from rae.stages.models.payload import Payload
from rae.stages.training.learner import Learner
from rae.stages.training.loop import train
from rae.stages.training.randomness import normal
from rae.stages.training.ranks import Ranks
from rae.stages.training.section import TrainingSection
from rae.store.errors import PartialResult, RaeError
from rae.store.order import GlobalShuffle, batch_rows

ROWS = 26
SECTION = TrainingSection(
    steps=20, batch_size=8, lr=0.02, clip_grad=1.0, ema_decay=0.8, log_every=1, checkpoint_every=100
)
RANKS = Ranks.from_environment()
CPU = torch.device("cpu")


@dataclass
class Points:
    rows: np.ndarray
    inputs: torch.Tensor

    @property
    def keys(self):
        return self.rows.tolist()


def batch(epoch, step):
    rows = batch_rows(GlobalShuffle(ROWS), SECTION.batch_size, SECTION.seed, epoch, step, RANKS.rank, RANKS.world_size)
    return Points(rows, normal((4,), SECTION.seed, "point", 0, rows))


def loss(forward, batch):
    output = forward(batch.inputs)
    return F.mse_loss(output, batch.inputs.flip(1)), {"l1": F.l1_loss(output, batch.inputs.flip(1))}


def nan_for_row_7(forward, batch):
    value, numbers = loss(forward, batch)
    return (value * float("nan") if 7 in batch.rows else value), numbers


def learner(loss, section=SECTION):
    torch.manual_seed(RANKS.rank)  # on purpose not the same: rank 0's weights hold
    model = nn.Sequential(nn.Linear(4, 32), nn.GELU(), nn.Linear(32, 4))
    return Learner(model, loss, section, rows=ROWS, ranks=RANKS, device=CPU)


def run(job, loss=loss, section=SECTION):
    made = learner(loss, section)
    train(made, batch, section, Payload("model.json", {}), rows=ROWS, job=job, ranks=RANKS)
    return made


def message(job, loss=loss):
    try:
        run(job, loss)
    except (PartialResult, RaeError) as error:
        return [type(error).__name__, error.message]


def stop_asked_of_the_last_rank_alone(folder):
    told = []

    def check_stop():
        if asked():
            raise PartialResult("SIGTERM")

    def asked():
        return RANKS.rank == RANKS.world_size - 1 and len(told) == 3

    def progress(done, total, unit, **numbers):
        pass

    def counting(forward, batch):
        told.append(batch)
        return loss(forward, batch)

    return message(Job(folder, progress=progress, stopping=asked, check_stop=check_stop), counting)


def main(out: Path) -> None:
    first = learner(loss, SECTION.model_copy(update={"clip_grad": 0.0}))
    first.step(batch(0, 0), 0)
    gradients = {name: parameter.grad.clone() for name, parameter in first.model.named_parameters()}
    trained = run(Job(out / "whole"))
    facts = {
        "batches": RANKS.gather([batch(*divmod(step, 3)).rows.tolist() for step in range(20)]),
        "any": [RANKS.any(RANKS.is_main), RANKS.any(False)],
        "mean": RANKS.all_reduce_mean(torch.tensor([float(RANKS.rank), 2.0])).tolist(),
        "broadcast": RANKS.gather(RANKS.broadcast(f"from {RANKS.rank}")),
        "stopped": RANKS.gather(stop_asked_of_the_last_rank_alone(out / "stopped")),
        "non_finite": RANKS.gather(message(Job(out / "non_finite"), nan_for_row_7)),
    }
    resumed = run(Job(out / "resumed", earlier=(out / "stopped",)))
    patient = run(Job(out / "patient"), nan_for_row_7, SECTION.model_copy(update={"max_skipped_steps": 20}))
    weights = [RANKS.gather(weight) for group in patient.tensors().values() for weight in group.values()]
    facts["patient_alike"] = all(torch.equal(first, other) for first, *others in weights for other in others)
    if RANKS.is_main:
        save_file(gradients, out / "gradients.safetensors")
        save_file(trained.ema.model.state_dict(), out / "trained.safetensors")
        save_file(resumed.ema.model.state_dict(), out / "resumed.safetensors")
        save_file(patient.ema.model.state_dict(), out / "patient.safetensors")
        (out / "facts.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    torch.set_num_threads(1)
    with RANKS.process_group(CPU):
        main(Path(sys.argv[1]))
    os._exit(0)  # gloo's threads can abort an interpreter that shuts down around them, after all is done
