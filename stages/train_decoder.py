"""`rae train-decoder`: the ViT decoder learns to turn noisy tokens of the frozen encoder back into pixels.

RAE paper, section 3. What it is shown comes from a feed (`rae.stages.training.feeds`).
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from rae.stages.job import Beginning, Job, Result
from rae.stages.models.decoder import DecoderConfig, ViTDecoder, noise_tokens
from rae.stages.models.discriminator import DinoDiscriminator, Discriminator, EncoderDiscriminator
from rae.stages.models.encoders import Encoder, EncoderInfo, load_encoder
from rae.stages.models.geometry import input_size_for
from rae.stages.models.perceptual import EncoderDistance, LpipsDistance, build_perceptual
from rae.stages.models.pixels import to_unit
from rae.stages.models.trained import decoder_payload, read_encoder
from rae.stages.models.weights import EncoderSource, locate_dino
from rae.stages.sections import EncodeSection
from rae.stages.training.adversarial import AdversarialLearner, augment_draws
from rae.stages.training.beginning import begin_decoder
from rae.stages.training.dry_run import Training
from rae.stages.training.feeds import Feed, OnlineFeed, StoredFeed
from rae.stages.training.learner import Learner, Trainee
from rae.stages.training.optimizer import steps_per_epoch
from rae.stages.training.randomness import normal, uniform
from rae.stages.training.ranks import Ranks
from rae.stages.training.sections import TrainDecoderSection
from rae.store.errors import CorruptData
from rae.store.latents import LatentStore
from rae.store.manifest import Artifact
from rae.store.order import GlobalShuffle, IntArray, batch_rows
from rae.store.source import Source

logger = logging.getLogger("rae.train")


@dataclass(frozen=True)
class Batch:
    """Images [B, 3, S, S] in [0, 1], their raw tokens [B, C, H, W] if they are stored, and the noise for the tokens.

    That has levels [B] in [0, 1) and draws [B, C, H, W]; `augment_draws` are those of an adversarial loss. `step` is
    the optimizer step that all are for.
    """

    images: Tensor
    stored: Tensor | None
    level: Tensor
    noise: Tensor
    augment_draws: Tensor
    step: int
    feed: Feed
    rows: IntArray

    @property
    def keys(self) -> Sequence[str]:
        """Names of the samples, read when a message needs them."""
        return self.feed.keys_of(self.rows)

    def split(self, parts: int) -> list["Batch"]:
        """The same samples in equal parts, in order."""
        size = len(self.rows) // parts
        return [self.only(slice(first, first + size)) for first in range(0, len(self.rows), size)]

    def only(self, rows: slice) -> "Batch":
        """Some of the samples."""
        return replace(
            self,
            images=self.images[rows],
            stored=None if self.stored is None else self.stored[rows],
            level=self.level[rows],
            noise=self.noise[rows],
            augment_draws=self.augment_draws[:, rows],
            rows=self.rows[rows],
        )


TokensOf: TypeAlias = Callable[[Batch], tuple[Tensor, Tensor]]  # clean and noised
LossOf: TypeAlias = Callable[[Tensor, Batch], tuple[Tensor, dict[str, Tensor]]]  # of made images: the mean, its parts


@dataclass(frozen=True)
class Given:
    """What the decoder is trained for and from: an encoder, or stored latents, or both."""

    encode: EncodeSection | None
    encoder_source: EncoderSource | None
    source: Source
    latents: Artifact | None

    def load_encoder(self, device: str) -> Encoder | None:
        """The encoder, if it is given."""
        if self.encode is None or self.encoder_source is None:
            return None
        input_size = input_size_for(self.encoder_source, self.encode.image_size, self.encode.encoder_input_size)
        return load_encoder(self.encoder_source, input_size, self.encode.feature_index, device)


def run(section: TrainDecoderSection, given: Given, beginning: Beginning, job: Job) -> Result:
    """Train the decoder of `section` for the tokens that are `given`; returns its payload and the last losses."""
    return prepare(section, given, beginning, job.device).run(job, beginning.checkpoint)


def prepare(section: TrainDecoderSection, given: Given, beginning: Beginning, kind: str) -> Training[Batch]:
    """Build what is trained, on a kind of device, and what trains it."""
    ranks = Ranks.from_environment()
    device = ranks.device(kind)
    encoder = given.load_encoder(str(device))
    feed, info, image_size = open_feed(section, given, encoder)
    config = describe_decoder(section, image_size, info)
    perceptual = build_perceptual(section.perceptual_loss, encoder, section.lpips_weights)
    perceptual = perceptual.to(device) if perceptual is not None else None
    torch.manual_seed(section.seed)  # initial weights
    decoder = ViTDecoder(config)
    decoder.grad_checkpoint = section.grad_checkpoint
    if beginning.init_from is not None:
        begin_decoder(decoder, beginning.init_from, section.init_weights)
    place: dict[str, Any] = {"rows": len(feed), "ranks": ranks}
    per_epoch = steps_per_epoch(section, len(feed))
    reconstruction = reconstruction_of(section, perceptual, per_epoch)
    discriminator, tokens = build_discriminator(section, encoder), tokens_of(section, encoder)
    learner = build_learner(decoder, discriminator, tokens, reconstruction, section, device=device, **place)
    order = GlobalShuffle(len(feed))

    def batch(epoch: int, step: int) -> Batch:
        rows = batch_rows(order, section.batch_size, section.seed, epoch, step, ranks.rank, ranks.world_size)
        return make_batch(section, feed, info, rows, (epoch, step), device)

    def show(batch: Batch) -> Tensor:
        """Images and, below them, what the average makes of their clean tokens."""
        first = batch.only(slice(0, 8))
        return torch.cat([first.images, learner.ema.model(tokens(first)[0]).clamp(0, 1)])

    described = {
        "perceptual_loss": perceptual.description if perceptual is not None else "none",
        "adversarial_loss": discriminator.description if discriminator is not None else "none",
    }
    payload = replace(decoder_payload(config, info.to_json()), metrics=described)
    networks = [network for network in (encoder, perceptual, discriminator) if network is not None]
    every_loss = max(section.start_step(part, per_epoch) for part in ("perceptual", "disc", "gan"))
    return Training(learner, batch, section, payload, networks=networks, every_loss=every_loss, show=show, **place)


def open_feed(section: TrainDecoderSection, given: Given, encoder: Encoder | None) -> tuple[Feed, EncoderInfo, int]:
    """What the section's `feed` shows, the encoder that its tokens are of, and the side of its images in pixels.

    Raises `StaleInput` if the stored latents are of other images than the source's.
    """
    if section.feed == "online":
        assert encoder is not None
        assert given.encode is not None
        image_size = given.encode.image_size
        return OnlineFeed(given.source, image_size, section.resize_size, section.seed), encoder.info, image_size
    assert given.latents is not None
    store, info = LatentStore(given.latents.payload), EncoderInfo.from_json(read_encoder(given.latents.payload))
    if (info.token_dim, *info.grid) != store.shape:
        raise CorruptData(f"{store.folder} holds latents {store.shape}, and its encoder.json describes other tokens")
    section.check_views(store.layout.view_kind)
    encode = given.latents.manifest.config["encode"]
    image_size, resize_size = int(encode["image_size"]), encode.get("resize_size")
    return StoredFeed(given.source, store, image_size, section.seed, resize_size), info, image_size


def make_batch(
    section: TrainDecoderSection,
    feed: Feed,
    info: EncoderInfo,
    rows: IntArray,
    when: tuple[int, int],
    device: torch.device,
) -> Batch:
    """The training rows at `when` (epoch, step of it) with their draws: functions of (seed, purpose, epoch, row)."""
    epoch, step = when
    pixels, stored = feed.batch(rows, epoch)
    return Batch(
        images=to_unit(pixels, device),
        stored=None if stored is None else torch.from_numpy(stored).to(device).float(),
        level=uniform(section.seed, "noise_level", epoch, rows, device),
        noise=normal((info.token_dim, *info.grid), section.seed, "noise", epoch, rows, device),
        augment_draws=augment_draws(section.seed, epoch, rows),
        step=epoch * steps_per_epoch(section, len(feed)) + step,
        feed=feed,
        rows=rows,
    )


def tokens_of(section: TrainDecoderSection, encoder: Encoder | None) -> TokensOf:
    """A batch's clean tokens, stored or made by `encoder`, and noised ones."""

    @torch.no_grad()
    def tokens(batch: Batch) -> tuple[Tensor, Tensor]:
        if batch.stored is not None:
            clean = batch.stored
        else:
            assert encoder is not None
            clean = encoder(batch.images)
        return clean, noise_tokens(clean, section.noise_tau, batch.level, batch.noise)

    return tokens


def reconstruction_of(
    section: TrainDecoderSection, perceptual: LpipsDistance | EncoderDistance | None, per_epoch: int
) -> LossOf:
    """L1 on [0, 1] plus the weighted perceptual distance once that has begun."""
    perceptual_start = section.start_step("perceptual", per_epoch)

    def reconstruction(made: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        pixel = (made - batch.images).abs().mean()
        if perceptual is None:
            return pixel, {"l1": pixel}
        if batch.step < perceptual_start:
            return pixel, {"l1": pixel, "perceptual": torch.zeros_like(pixel)}
        distance = perceptual(made, batch.images).mean()
        return pixel + section.perceptual_weight * distance, {"l1": pixel, "perceptual": distance}

    return reconstruction


def build_learner(
    decoder: ViTDecoder,
    discriminator: Discriminator | None,
    tokens: TokensOf,
    reconstruction: LossOf,
    section: TrainDecoderSection,
    **place: Any,
) -> Trainee[Batch]:
    """The decoder in training, against a discriminator if there is one."""
    if discriminator is not None:
        learner = AdversarialLearner(decoder, discriminator, tokens, reconstruction, section, **place)
        if learner.gan_start >= learner.schedule[1]:
            logger.warning(
                "the adversarial term would begin at step %d and training ends at %d: it has no effect on this decoder;"
                " see `train_decoder.gan_start_epoch`",
                learner.gan_start,
                learner.schedule[1],
            )
        return learner

    def loss(forward: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        _, noised = tokens(batch)
        return reconstruction(forward(noised), batch)

    return Learner(decoder, loss, section, **place)


def build_discriminator(section: TrainDecoderSection, encoder: Encoder | None) -> Discriminator | None:
    """New heads on DINO or on `encoder`; raises `MissingInput` or `CorruptData` for the file of DINO."""
    heads = section.ks, section.norm_type, section.using_spec_norm
    if section.adversarial_loss == "dino":
        discriminator = DinoDiscriminator(section.recipe, *heads)
        discriminator.load_backbone(locate_dino(section.recipe, section.disc_weights))
        return discriminator
    if section.adversarial_loss == "encoder":
        assert encoder is not None
        return EncoderDiscriminator(encoder, *heads)
    return None


def describe_decoder(section: TrainDecoderSection, image_size: int, encoder: EncoderInfo) -> DecoderConfig:
    """The sizes of the decoder: one patch per token, so the image must be a whole number of patches."""
    section.check_sizes(image_size, encoder.grid)
    grid = encoder.grid[0]
    return DecoderConfig(
        token_dim=encoder.token_dim,
        grid=grid,
        hidden_size=section.hidden_size,
        depth=section.depth,
        num_heads=section.num_heads,
        intermediate_size=section.intermediate_size,
        patch_size=image_size // grid,
        image_mean=encoder.mean,
        image_std=encoder.std,
    )
