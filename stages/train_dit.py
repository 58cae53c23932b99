"""`rae train-dit`: the diffusion transformer learns from stored latents; no encoder and no image is touched."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rae.stages.job import Beginning, Job, Result
from rae.stages.models.dit import DiTConfig, build_dit
from rae.stages.models.trained import DitDescription, dit_payload, read_encoder
from rae.stages.models.transport import Transport, auto_shift, create_transport
from rae.stages.training.beginning import begin_dit
from rae.stages.training.dry_run import Training
from rae.stages.training.ema import PowerEMAs
from rae.stages.training.learner import Learner
from rae.stages.training.online import Evaluation
from rae.stages.training.randomness import normal, uniform
from rae.stages.training.ranks import Ranks
from rae.stages.training.sections import TrainDitSection
from rae.stages.training.whitening import Whitening
from rae.store.classes import read_classes
from rae.store.errors import ConfigError, StaleInput
from rae.store.latents import LatentStore
from rae.store.manifest import Artifact
from rae.store.order import batch_rows


@dataclass(frozen=True)
class Batch:
    """Whitened latents x [B, C, H, W], labels y [B] with some dropped, times t [B] and noise like x."""

    x: Tensor
    y: Tensor
    t: Tensor
    noise: Tensor
    rows: np.ndarray
    keys_of: Callable[[np.ndarray], Sequence[str]]

    @property
    def keys(self) -> Sequence[str]:
        """Names of the samples, read when a message needs them."""
        return self.keys_of(self.rows)

    def split(self, parts: int) -> list["Batch"]:
        """The same samples in equal parts, in order."""
        tensors = (tensor.chunk(parts) for tensor in (self.x, self.y, self.t, self.noise))
        pieces = zip(*tensors, np.split(self.rows, parts), strict=True)
        return [Batch(x, y, t, noise, rows, self.keys_of) for x, y, t, noise, rows in pieces]


def run(
    section: TrainDitSection,
    latents: Artifact,
    beginning: Beginning,
    job: Job,
    evaluation: Evaluation | None = None,
) -> Result:
    """Train the transformer that `section` describes; returns its payload and the last losses."""
    return prepare(section, latents, beginning, job.device).run(job, beginning.checkpoint, evaluation)


def prepare(section: TrainDitSection, latents: Artifact, beginning: Beginning, kind: str) -> Training[Batch]:
    """Build what is trained, on a kind of device, and what trains it."""
    store = LatentStore(latents.payload)
    section.check_views(store.layout.view_kind)
    num_classes = count_classes(section, store)
    config = describe_dit(section, store.shape, num_classes)
    if section.conditioning == "vectors":
        config = replace(config, conditioning_dim=store.conditioning.shape[1])
    about = DitDescription(
        config=config,
        transport=describe_transport(section, store.shape),
        encoder=read_encoder(latents.payload),
        classes=(read_classes(latents.payload / "classes.json") or ())[:num_classes] or None,
    )
    ranks = Ranks.from_environment()
    device = ranks.device(kind)
    torch.manual_seed(section.seed)  # initial weights
    transport, whitening = about.create_transport(), Whitening(store.stats, device)
    order = store.shuffle(section.shuffle, section.window_parts)

    def batch(epoch: int, step: int) -> Batch:
        place = (ranks.rank, ranks.world_size)
        rows = batch_rows(order, section.batch_size, section.seed, epoch, step, *place)
        return make_batch(store, whitening, rows, epoch, section, transport, num_classes)

    dit = build_dit(config)
    dit.grad_checkpoint = section.grad_checkpoint
    if beginning.init_from is not None:
        begin_dit(dit, beginning.init_from, section.init_weights)
    lengths, every = section.ema_sigma_rel, section.ema_snapshot_every
    averages = PowerEMAs(dit.to(device), lengths, every) if every is not None else None
    loss = partial(mean_loss, transport)
    learner = Learner(dit, loss, section, rows=len(store), ranks=ranks, device=device, power_emas=averages)
    stats = torch.from_numpy(store.stats.mean).float(), torch.from_numpy(store.stats.variance).float()
    return Training(learner, batch, section, dit_payload(about, stats), len(store), ranks)


def mean_loss(transport: Transport, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """The mean over the batch, 0-dim; there is nothing else to log."""
    return transport.training_losses(model, batch.x, batch.y, t=batch.t, noise=batch.noise).mean(), {}


def time_step(
    section: TrainDitSection, latent_shape: tuple[int, int, int], num_classes: int, kind: str, steps: int = 3
) -> float:
    """Median seconds of a training step on drawn latents, on a kind of device, after one that is not counted."""
    device, size = Ranks().device(kind), section.batch_size
    transport = create_transport(**describe_transport(section, latent_shape))
    dit = build_dit(describe_dit(section, latent_shape, num_classes))
    dit.grad_checkpoint = section.grad_checkpoint
    learner = Learner(dit, partial(mean_loss, transport), section, rows=size, ranks=Ranks(), device=device)
    x, noise = torch.randn(2, size, *latent_shape, device=device)
    y = torch.zeros(size, dtype=torch.int64, device=device)
    batch = Batch(x, y, torch.rand(size, device=device), noise, np.arange(size), lambda rows: ["drawn"] * len(rows))
    taken = []
    for step in range(steps + 1):
        began = time.perf_counter()
        learner.step(batch, step)
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[1:])


def count_classes(section: TrainDitSection, store: LatentStore) -> int:
    """The size of the class table: as configured, or as the labels say; labels outside it are refused."""
    if section.conditioning == "vectors":
        return 0
    labels = store.labels
    found = int(labels.max()) + 1 if len(labels) else 0
    unlabelled = int((labels < 0).sum())
    num_classes = section.num_classes
    if num_classes is None:
        num_classes = 0 if unlabelled == len(labels) else found
    if num_classes and unlabelled:
        raise ConfigError(
            f"{unlabelled} of {len(labels)} latents have no label; set `train_dit.num_classes` to 0 to train without"
        )
    if num_classes and found > num_classes:
        (key,) = store.keys_of([labels.argmax()])
        raise ConfigError(
            f"`train_dit.num_classes` is {num_classes}, and the label of `{key}` is {found - 1}; labels count from 0"
        )
    return num_classes


def describe_dit(section: TrainDitSection, latent_shape: tuple[int, int, int], num_classes: int) -> DiTConfig:
    """The sizes of the transformer for latents (C, H, W); refuses one narrower than a token."""
    channels, height, width = latent_shape
    if height != width:
        raise StaleInput(f"the latents' grid is {height}x{width}, and the transformer takes square grids")
    section.check_width(channels)
    return DiTConfig(
        model=section.model,
        in_channels=channels,
        input_size=height,
        hidden_size=section.hidden_size,
        depth=section.depth,
        num_heads=section.num_heads,
        mlp_ratio=section.mlp_ratio,
        class_dropout_prob=section.class_dropout_prob,
        num_classes=num_classes,
        use_qknorm=section.use_qknorm,
    )


def describe_transport(section: TrainDitSection, latent_shape: tuple[int, int, int]) -> dict[str, Any]:
    """The arguments of `create_transport`; shift `auto` is sqrt(C*H*W / 4096), at least 1 (RAE paper, section 4.2)."""
    shift = auto_shift(*latent_shape) if section.time_dist_shift == "auto" else section.time_dist_shift
    keys = ("path_type", "prediction", "loss_weight", "time_dist_type")
    return {key: getattr(section, key) for key in keys} | {"time_dist_shift": shift}


def make_batch(
    store: LatentStore,
    whitening: Whitening,
    rows: np.ndarray,
    epoch: int,
    section: TrainDitSection,
    transport: Transport,
    num_classes: int,
) -> Batch:
    """The training rows with all their draws: each a function of (seed, purpose, epoch, row)."""
    seed, device = section.seed, whitening.device
    views = store.draw_views(rows, seed, epoch)
    x = whitening(store.rows(rows, views))
    y = torch.from_numpy(store.labels[rows]).to(device)
    dropped = uniform(seed, "label_dropout", epoch, rows, device) < section.class_dropout_prob
    if section.conditioning == "vectors":
        part, place = store.places(rows)
        slots = part * store.layout.rows_per_part + place
        y = torch.from_numpy(store.conditioning[slots]).to(device).masked_fill(dropped[:, None], torch.nan)
    else:
        y = torch.where(dropped, num_classes, y) if num_classes else torch.zeros_like(y)
    t = transport.sample_times(uniform(seed, "time", epoch, rows, device))
    noise = normal(store.shape, seed, "noise", epoch, rows, device)
    return Batch(x, y, t, noise, rows, store.keys_of)
