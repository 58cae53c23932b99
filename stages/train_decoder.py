"""`rae train-decoder`: the ViT decoder learns to turn noisy tokens of the frozen encoder back into pixels.

Fed online (RAE paper, section 3): every image is read by its address in the shards, cropped, and encoded as it comes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rae.stages.images import BadImage, center_crop, decode, resized_crop
from rae.stages.job import Beginning, Job, Result
from rae.stages.models.decoder import DecoderConfig, ViTDecoder, noise_tokens
from rae.stages.models.discriminator import DinoDiscriminator
from rae.stages.models.encoders import Encoder, describe, load_encoder
from rae.stages.models.geometry import input_size_for
from rae.stages.models.perceptual import build_perceptual
from rae.stages.models.pixels import to_unit
from rae.stages.models.trained import decoder_payload
from rae.stages.models.weights import EncoderSource, locate_dino
from rae.stages.sections import EncodeSection, TrainDecoderSection
from rae.stages.training.adversarial import AdversarialLearner, augment_draws
from rae.stages.training.beginning import begin_decoder
from rae.stages.training.loop import Learner, Trainee, train
from rae.stages.training.optimizer import steps_per_epoch
from rae.stages.training.randomness import normal, uniform
from rae.stages.training.ranks import Ranks
from rae.store.errors import CorruptData
from rae.store.order import GlobalShuffle, batch_rows, draw
from rae.store.shards import Source


@dataclass(frozen=True)
class Batch:
    """Images [B, 3, S, S] in [0, 1], and the noise for their tokens: levels [B] in [0, 1) and draws [B, C, H, W].

    `step` is the optimizer step that they are for; `augment_draws` are those of an adversarial loss.
    """

    images: Tensor
    level: Tensor
    noise: Tensor
    augment_draws: Tensor
    step: int
    keys: Sequence[str]


class Crops:
    """Training images by row: decoded, resized and cropped as (seed, epoch, row) says."""

    def __init__(self, source: Source, section: TrainDecoderSection, image_size: int) -> None:
        self._source, self._section, self._size = source, section, image_size

    def __len__(self) -> int:
        return len(self._source)

    def batch(self, rows: np.ndarray, epoch: int) -> np.ndarray:
        """Pixels uint8 [B, S, S, 3]. A row that cannot be used shows the next usable one, so it never trains."""
        across, down = (draw(self._section.seed, f"crop_{axis}", epoch, rows) for axis in "xy")
        crops = [self._crop(int(row), (x, y)) for row, x, y in zip(rows, across, down, strict=True)]
        return np.stack(crops)

    def _crop(self, row: int, position: tuple[float, float]) -> np.ndarray:
        for candidate in range(row, row + len(self._source)):
            usable = candidate % len(self._source)
            if self._source.reason(usable) is not None:
                continue
            try:
                image = decode(self._source.read(usable))
                if self._section.resize_size is None:
                    return center_crop(image, self._size)
                return resized_crop(image, self._section.resize_size, self._size, position)
            except BadImage:
                continue
        raise CorruptData("none of the training images can be decoded")


def run(
    section: TrainDecoderSection,
    encode: EncodeSection,
    source: Source,
    encoder_source: EncoderSource,
    beginning: Beginning,
    job: Job,
) -> Result:
    """Train the decoder of `section` for the encoder of `encoder_source`; returns its payload and the last losses."""
    ranks = Ranks.from_environment()
    device = ranks.device(job.device)
    input_size = input_size_for(encoder_source, encode.image_size, encode.encoder_input_size)
    encoder = load_encoder(encoder_source, input_size, encode.feature_index, str(device))
    config = describe_decoder(section, encode, encoder)
    perceptual = build_perceptual(section.perceptual_loss, encoder, section.lpips_weights)
    perceptual = perceptual.to(device) if perceptual is not None else None
    crops = Crops(source, section, encode.image_size)
    torch.manual_seed(section.seed)  # initial weights

    per_epoch = steps_per_epoch(section, len(crops))
    perceptual_start = section.start_step("perceptual", per_epoch)

    def tokens(batch: Batch) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            clean = encoder(batch.images)
            return clean, noise_tokens(clean, section.noise_tau, batch.level, batch.noise)

    def reconstruction(made: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        pixel = (made - batch.images).abs().mean()
        if perceptual is None:
            return pixel, {"l1": pixel}
        if batch.step < perceptual_start:
            return pixel, {"l1": pixel, "perceptual": torch.zeros_like(pixel)}
        distance = perceptual(made, batch.images).mean()
        return pixel + section.perceptual_weight * distance, {"l1": pixel, "perceptual": distance}

    def loss(forward: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        _, noised = tokens(batch)
        return reconstruction(forward(noised), batch)

    order = GlobalShuffle(len(crops))

    def batch(epoch: int, step: int) -> Batch:
        place = (ranks.rank, ranks.world_size)
        rows = batch_rows(order, section.batch_size, section.seed, epoch, step, *place)
        images = to_unit(crops.batch(rows, epoch), device)
        level = uniform(section.seed, "noise_level", epoch, rows, device)
        noise = normal((encoder.token_dim, *encoder.grid), section.seed, "noise", epoch, rows, device)
        draws = augment_draws(section.seed, epoch, rows)
        return Batch(images, level, noise, draws, epoch * per_epoch + step, [source.keys[row] for row in rows])

    decoder = ViTDecoder(config)
    decoder.grad_checkpoint = section.grad_checkpoint
    if beginning.init_from is not None:
        begin_decoder(decoder, beginning.init_from, section.init_weights)
    learner: Trainee[Batch]
    if section.adversarial_loss == "dino":
        discriminator = build_discriminator(section)
        learner = AdversarialLearner(
            decoder, discriminator, tokens, reconstruction, section, rows=len(crops), ranks=ranks, device=device
        )
    else:
        learner = Learner(decoder, loss, section, rows=len(crops), ranks=ranks, device=device)
    described = {
        "perceptual_loss": perceptual.description if perceptual is not None else "none",
        "adversarial_loss": f"DINO {section.recipe}" if section.adversarial_loss == "dino" else "none",
    }
    payload = replace(decoder_payload(config, describe(encoder)), metrics=described)
    places: dict[str, Any] = {"rows": len(crops), "job": job, "ranks": ranks, "continued": beginning.checkpoint}
    return train(learner, batch, section, payload, **places)


def build_discriminator(section: TrainDecoderSection) -> DinoDiscriminator:
    """The discriminator with DINO's weights and new heads; raises `MissingInput` or `CorruptData` for its file."""
    discriminator = DinoDiscriminator(section.recipe, section.ks, section.norm_type, section.using_spec_norm)
    discriminator.load_backbone(locate_dino(section.recipe, section.disc_weights))
    return discriminator


def describe_decoder(section: TrainDecoderSection, encode: EncodeSection, encoder: Encoder) -> DecoderConfig:
    """The sizes of the decoder: one patch per token, so the image must be a whole number of patches."""
    section.check_sizes(encode.image_size, encoder.grid)
    grid = encoder.grid[0]
    return DecoderConfig(
        token_dim=encoder.token_dim,
        grid=grid,
        hidden_size=section.hidden_size,
        depth=section.depth,
        num_heads=section.num_heads,
        intermediate_size=section.intermediate_size,
        patch_size=encode.image_size // grid,
        image_mean=encoder.mean,
        image_std=encoder.std,
    )
