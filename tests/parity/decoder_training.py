"""Optimizer steps of the official decoder recipe with its adversarial loss, as our learner takes them.

The discriminator's weights are drawn as the fixture says, not carried.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from parity.autoencoder import decoder_from_official
from parity.drawn import drawn_discriminator
from parity.fixture import below, close, close_after_training, read
from parity.schedule import schedule_from_official
from rae.stages.models.decoder import ViTDecoder
from rae.stages.models.diffaug import DRAWS
from rae.stages.training.adversarial import AdversarialLearner
from rae.stages.training.ranks import Ranks
from rae.stages.training.sections import TrainDecoderSection

# What the fixture logs, and what our learner calls it. Officially a part that has not begun is logged as zero.
NUMBERS = {"l1": "l1", "gen": "gen_loss", "weight": "d_weight", "disc": "disc_loss"}


@dataclass(frozen=True)
class Batch:
    """Images [B, 3, S, S], their clean and noised tokens [B, C, H, W]."""

    images: Tensor
    clean: Tensor
    noised: Tensor
    augment_draws: Tensor
    keys: tuple[str, ...] = ()


def check_decoder_training(path: Path) -> None:
    """With two threads and the kernels that the fixture was made with: in the heads, gradients of real and made images
    all but cancel, and Adam makes whole steps of what rounding leaves. So every sum has to be taken in that order.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        check_steps(*read(path))
    finally:
        torch.set_num_threads(threads)


def check_steps(about: dict[str, str], tensors: dict[str, Tensor]) -> None:
    official, io, initial = json.loads(about["training"]), below(tensors, "io/"), below(tensors, "init/")
    learner = learner_from_official(about, official, initial)
    initial_heads = {key: value.clone() for key, value in learner.heads.state_dict(prefix="heads.").items()}
    grid = learner.model.config.grid
    taken: dict[str, list[float]] = {name: [] for name in (*NUMBERS, "logits_fake", "lr", "disc_lr")}
    for step, inputs in enumerate(zip(io["image"], io["latent_clean"], io["latent_noisy"], strict=True)):
        images, clean, noised = inputs
        clean, noised = (tokens.transpose(1, 2).unflatten(2, (grid, grid)) for tokens in (clean, noised))
        draws = torch.zeros(3, len(images), len(DRAWS))
        numbers = learner.step(Batch(images, clean, noised, draws), step)
        for name, ours in NUMBERS.items():
            taken[name].append(float(numbers[ours]))
        taken["logits_fake"].append(-float(numbers["gen_loss"]))
        taken["lr"].append(learner.optimizer.param_groups[0]["lr"])
        taken["disc_lr"].append(learner.disc_optimizer.param_groups[0]["lr"] if step >= learner.disc_start else 0.0)
    for name, numbers in taken.items():
        close(torch.tensor(numbers, dtype=torch.float64), io[f"log/{name}"], name)
    for group, prefix in (("model", "final/"), ("ema", "ema/")):
        ours, theirs = learner.tensors()[group], below(tensors, prefix)
        close_after_training(moved(ours), moved(theirs), initial)
        for key in ours.keys() - moved(ours).keys():
            close(ours[key], theirs[key], key)
    carried, heads = below(tensors, "final_disc_bias_and_norm/"), learner.heads.state_dict(prefix="heads.")
    assert carried.keys() <= heads.keys()
    close_after_training({key: heads[key] for key in carried}, carried, initial_heads)


def moved(decoder: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights that training moves. The others are moved by rounding alone: the keys' biases, which no softmax over
    keys can see, and the table of positions, which the official EMA averages with itself.
    """
    return {key: value for key, value in decoder.items() if not key.endswith(("key.bias", "pos_embed"))}


def learner_from_official(
    about: dict[str, str], official: dict[str, Any], initial: dict[str, Tensor]
) -> AdversarialLearner[Batch]:
    assert not official["perceptual_weight"]
    assert not official["augment_prob"]
    assert official["gen_loss"] == "vanilla"
    section = TrainDecoderSection(
        steps=official["steps"],
        batch_size=1,  # of one row: an epoch is a step
        betas=official["betas"],
        clip_grad=official["clip_grad"],
        ema_decay=official["ema_decay"],
        augment_prob=official["augment_prob"],
        **{key: official[key] for key in ("gan_start_step", "disc_start_step", "disc_weight", "max_d_weight")},
        disc_loss=official["disc_loss"],
        **schedule_from_official(official.get("scheduler"), official["lr"]),
    )
    decoder = ViTDecoder(decoder_from_official(about))
    decoder.load_state_dict(initial)

    def tokens(batch: Batch) -> tuple[Tensor, Tensor]:
        return batch.clean, batch.noised

    def reconstruction(made: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        l1 = (made - batch.images).abs().mean()
        return l1, {"l1": l1}

    discriminator = drawn_discriminator(**json.loads(about["discriminator"]), note=about["weights"])
    learner = AdversarialLearner(
        decoder, discriminator, tokens, reconstruction, section, rows=1, ranks=Ranks(), device=torch.device("cpu")
    )
    for block in discriminator.backbone.blocks:
        block.attn.fused_attn = False
    for optimizer in (learner.optimizer, learner.disc_optimizer):
        optimizer.param_groups[0]["fused"] = False
    return learner
