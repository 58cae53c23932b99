"""Run by test_adversarial.py, alone or by torchrun: one adversarial training among any number of processes.

`gan_ranks.py OUT PARTS` writes its log and final weights below OUT; each rank's share of a batch goes in PARTS parts.
"""

import os
import sys
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from small_gan import ROWS, SECTION, Batch, batch_for, learner_of, reconstruction

from rae.stages.job import Job
from rae.stages.models.payload import Payload
from rae.stages.training.loop import train
from rae.stages.training.ranks import Ranks

RANKS = Ranks.from_environment()


def main(out: Path, parts: int) -> None:
    section = SECTION.model_copy(update={"grad_accum_steps": parts})
    learner = learner_of(section, ranks=RANKS)
    batch = partial(batch_for, ranks=RANKS)
    train(learner, batch, section, Payload("decoder.json", {}), rows=ROWS, job=Job(out), ranks=RANKS)
    weights = [RANKS.gather(value) for value in learner.heads.state_dict().values()]
    assert all(torch.equal(first, other) for first, *others in weights for other in others)
    if RANKS.is_main:
        save_file(learner.tensors()["model"], out / "trained.safetensors")
    skip(out / "skipped")


def skip(out: Path) -> None:
    """A loss that is not finite for one row, and so on one rank."""
    section = SECTION.model_copy(update={"max_skipped_steps": 5})

    def spoilt(made: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss, parts = reconstruction(made, batch)
        return (loss * torch.nan if "row-7" in batch.keys else loss), parts

    learner = learner_of(section, RANKS, spoilt)
    batch = partial(batch_for, ranks=RANKS)
    train(learner, batch, section, Payload("decoder.json", {}), rows=ROWS, job=Job(out), ranks=RANKS)
    for group in learner.tensors().values():
        for value in group.values():
            assert all(torch.equal(value, other) for other in RANKS.gather(value))


if __name__ == "__main__":
    torch.set_num_threads(1)
    with RANKS.process_group(torch.device("cpu")):
        main(Path(sys.argv[1]), int(sys.argv[2]))
    os._exit(0)  # gloo's threads can abort an interpreter that shuts down around them, after all is done
