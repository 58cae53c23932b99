"""A decoder against a discriminator on a small ViT, of milliseconds: for test_adversarial.py and gan_ranks.py.

The discriminator is the real one but for its backbone's width and patches.
"""

from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

from rae.stages.models.decoder import DecoderConfig, ViTDecoder, noise_tokens
from rae.stages.models.discriminator import BACKBONES, DinoDiscriminator
from rae.stages.training.adversarial import AdversarialLearner, augment_draws
from rae.stages.training.randomness import normal, uniform
from rae.stages.training.ranks import Ranks
from rae.stages.training.sections import TrainDecoderSection
from rae.store.order import GlobalShuffle, batch_rows

ALONE = Ranks()
ROWS, C, GRID, SIDE = 10, 8, 2, 32
SMALL = {"patch_size": 32, "embed_dim": 32, "num_heads": 2}
CONFIG = DecoderConfig(
    token_dim=C,
    grid=GRID,
    hidden_size=32,
    depth=2,
    num_heads=2,
    intermediate_size=64,
    patch_size=SIDE // GRID,
    image_mean=(0.5, 0.4, 0.3),
    image_std=(0.2, 0.2, 0.3),
)
SECTION = TrainDecoderSection(
    steps=5,
    batch_size=4,  # 2 steps an epoch
    lr=2e-3,
    schedule="cosine",
    warmup_steps=2,
    clip_grad=1.0,
    ema_decay=0.8,
    noise_tau=0.5,
    disc_start_step=1,
    gan_start_step=2,
    log_every=1,
    checkpoint_every=1,
    keep_checkpoints=9,
)


@dataclass(frozen=True)
class Batch:
    images: Tensor
    clean: Tensor
    noised: Tensor
    augment_draws: Tensor
    keys: list[str]

    def split(self, parts: int) -> list["Batch"]:
        pieces = (one.chunk(parts) for one in (self.images, self.clean, self.noised))
        draws, size = self.augment_draws.chunk(parts, dim=1), len(self.keys) // parts
        keys = [self.keys[first : first + size] for first in range(0, len(self.keys), size)]
        return [Batch(*piece) for piece in zip(*pieces, draws, keys, strict=True)]


def batch_of(rows: np.ndarray, epoch: int, section: TrainDecoderSection = SECTION) -> Batch:
    """Pictures and tokens that have something to do with each other, by row."""
    clean = normal((C, GRID, GRID), section.seed, "token", 0, rows)
    images = clean[:, :3].repeat_interleave(SIDE // GRID, 2).repeat_interleave(SIDE // GRID, 3).mul(0.2).add(0.5)
    level = uniform(section.seed, "noise_level", epoch, rows)
    noised = noise_tokens(clean, section.noise_tau, level, normal(clean.shape[1:], section.seed, "noise", epoch, rows))
    draws = augment_draws(section.seed, epoch, rows)
    return Batch(images.clamp(0, 1), clean, noised, draws, [f"row-{row}" for row in rows])


def batch_for(epoch: int, step: int, ranks: Ranks = ALONE) -> Batch:
    order = GlobalShuffle(ROWS)
    return batch_of(
        batch_rows(order, SECTION.batch_size, SECTION.seed, epoch, step, ranks.rank, ranks.world_size), epoch
    )


def tokens(batch: Batch) -> tuple[Tensor, Tensor]:
    return batch.clean, batch.noised


def reconstruction(made: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    l1 = (made - batch.images).abs().mean()
    edges = (made.diff(dim=3) - batch.images.diff(dim=3)).square().mean()
    return l1 + edges, {"l1": l1, "edges": edges}


def parts(**options: Any) -> tuple[ViTDecoder, DinoDiscriminator]:
    """A decoder and a discriminator with drawn weights, always the same."""
    with torch.random.fork_rng(devices=[]), mock.patch.dict(BACKBONES, {"small": SMALL}):
        torch.manual_seed(0)
        decoder, discriminator = ViTDecoder(CONFIG), DinoDiscriminator("small", ks=3, **options)
        for parameter in discriminator.backbone.parameters():
            nn.init.normal_(parameter, std=0.05)
    return decoder, discriminator


def learner_of(
    section: TrainDecoderSection = SECTION,
    ranks: Ranks = ALONE,
    loss: Any = reconstruction,
    **options: Any,
) -> AdversarialLearner[Batch]:
    device = torch.device("cpu")
    return AdversarialLearner(*parts(**options), tokens, loss, section, rows=ROWS, ranks=ranks, device=device)
