"""`rae sample`: latents drawn from the transformer, decoded to images.

An image depends on (seed, index, class) alone: all its noise comes from generators of its own, and every batch, the
last one too, is run at full size, so that kernels round alike. The adaptive sampler integrates each image alone.
"""

import hashlib
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rae.stages.job import NOTHING, Job, Result
from rae.stages.models.compatible import check_compatible, check_guide
from rae.stages.models.pixels import rounded_up, to_uint8
from rae.stages.models.samplers import Progress, sample_ode
from rae.stages.models.sde import sample_sde
from rae.stages.models.trained import Decoder, Dit
from rae.stages.sections import SampleSection
from rae.stages.training.randomness import normal
from rae.stages.training.ranks import Ranks
from rae.store.conditioning import read_vectors
from rae.store.errors import ConfigError, CorruptData
from rae.store.samples import SampleBatch, batch_path, read_batch, write_batch


def run(section: SampleSection, dit: Path, decoder: Path, guide: Path | None, job: Job) -> Result:
    """Draw what is missing of the images, a batch at a time, with the models in these folders.

    `section.weights` are those of a guide, too.
    """
    model = Dit.load(dit, section.weights, job.device, section.ema_sigma_rel)
    decode = Decoder.load(decoder, device=job.device)
    check_compatible(model.about.encoder, decode.encoder)
    weaker = Dit.load(guide, section.weights, job.device) if guide is not None else None
    if weaker is not None:
        check_guide(model, weaker)
    labels = choose_labels(section, model.num_classes)
    asked = choose_vectors(section, model.config.conditioning_dim)
    asked = labels if asked is None else asked
    # An unconditional transformer has one row for everything, and its images show no class in particular.
    recorded = labels if model.num_classes else np.full_like(labels, -1)
    ranks = Ranks.from_environment()
    starts = range(0, len(labels), section.batch_size)
    paths = [batch_path(job.folder, number) for number in range(len(starts))]
    paths[0].parent.mkdir(exist_ok=True)
    began = time.monotonic()
    for path, first in list(zip(paths, starts, strict=True))[ranks.rank :: ranks.world_size]:
        indices = np.arange(first, min(first + section.batch_size, len(labels)))
        if not _take_over(path, recorded[indices], job):

            def progress(done: int, total: int, first: int = first, count: int = len(indices)) -> None:
                job.progress(first + count * done // total, len(labels), "images")

            images = draw(model, decode, asked[indices], indices, section, weaker, progress)
            write_batch(path, SampleBatch(to_uint8(images), recorded[indices], rounded_up(images)))
        job.progress(int(indices[-1]) + 1, len(labels), "images")
        job.check_stop()
    ranks.barrier()
    if not ranks.is_main:
        return NOTHING
    seconds = time.monotonic() - began
    metrics = {
        "images": len(labels),
        "images_per_second": round(len(labels) / max(seconds, 1e-9), 3),
        "time_dist_shift": model.about.transport["time_dist_shift"],  # scores carry it in their protocol
    }
    return Result(_digest(paths), metrics, tuple(paths))


def choose_labels(section: SampleSection, num_classes: int) -> np.ndarray:
    """The label of every image [N], int64: the listed classes in turn, or all of them (balanced)."""
    classes = section.classes or tuple(range(num_classes)) or (0,)
    if num_classes and max(classes) >= num_classes:
        raise ConfigError(
            f"`sample.classes` asks for class {max(classes)}, and the transformer knows 0 to {num_classes - 1}"
        )
    if not num_classes and section.classes:
        raise ConfigError("`sample.classes` is given, and the transformer is unconditional (num_classes 0)")
    return np.resize(np.array(classes, np.int64), section.num_images)


def choose_vectors(section: SampleSection, conditioning_dim: int) -> np.ndarray | None:
    """The vector of every image [N, D], float32: the file's in turn; None of a transformer that takes none."""
    if section.conditioning is None and not conditioning_dim:
        return None
    if not conditioning_dim:
        raise ConfigError("`sample.conditioning` is given, and the transformer takes no vectors")
    if section.conditioning is None:
        raise ConfigError(
            f"the transformer takes vectors of {conditioning_dim} numbers: name a file of them, `sample.conditioning`,"
            " such as conditioning.npy beside its latents"
        )
    vectors = read_vectors(Path(section.conditioning))
    if vectors.shape[1] != conditioning_dim:
        raise ConfigError(
            f"`sample.conditioning` holds vectors of {vectors.shape[1]} numbers, and the transformer takes"
            f" {conditioning_dim}"
        )
    return vectors[np.arange(section.num_images) % len(vectors)]


def draw_all(
    dit: Dit, decoder: Decoder, labels: np.ndarray, section: SampleSection, guide: Dit | None = None
) -> np.ndarray:
    """Images uint8 [N, S, S, 3] for labels [N], indexed from 0."""
    indices = np.arange(len(labels))
    starts = range(0, len(labels), section.batch_size)
    batches = [slice(first, first + section.batch_size) for first in starts]
    drawn = (draw(dit, decoder, labels[batch], indices[batch], section, guide) for batch in batches)
    return np.concatenate([to_uint8(images) for images in drawn])


@torch.inference_mode()
def draw(
    dit: Dit,
    decoder: Decoder,
    labels: np.ndarray,
    indices: np.ndarray,
    section: SampleSection,
    guide: Dit | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Images [B, 3, S, S] in [0, 1] for labels [B] at the indices [B], computed in a batch of the full size."""
    rows = np.arange(section.batch_size).clip(max=len(indices) - 1)  # the last image fills the batch
    drawn = np.arange(len(indices)) if section.sampler == "adaptive" else rows
    device = dit.mean.device
    with torch.autocast(device.type, torch.bfloat16, enabled=section.precision == "bf16"):
        latents = _latents(dit, labels[drawn], indices[drawn], section, guide, progress)
        images: Tensor = decoder(dit.raw(latents[rows].float()))
    finite = images.isfinite().flatten(1).all(dim=1)
    if not bool(finite.all()):
        raise CorruptData(
            f"image {indices[rows[int(finite.int().argmin())]]} is not finite: the transformer's or the decoder's"
            " weights are damaged, or sampling diverges with these settings"
        )
    return images[: len(indices)]


def _latents(
    dit: Dit,
    labels: np.ndarray,
    indices: np.ndarray,
    section: SampleSection,
    guide: Dit | None,
    progress: Progress | None,
) -> Tensor:
    """Whitened latents float32 [B, C, H, W] by the section's sampler."""
    device = dit.mean.device
    settings: dict[str, Any] = {
        "transport": dit.about.create_transport(),
        "num_steps": section.num_steps,
        "guidance_scale": section.guidance_scale,
        "guidance_interval": section.guidance_interval,
        "null_label": dit.null_label,
        "guide": guide,
        "progress": progress,
    }

    def noise(purpose: str, step: int) -> Tensor:
        return normal(dit.latent_shape, section.seed, purpose, step, indices, device)

    start, y = noise("sample", 0), torch.from_numpy(labels).to(device)
    if section.sampler == "sde":
        for key in ("diffusion_form", "diffusion_norm", "last_step", "last_step_size"):
            settings[key] = getattr(section, key)
        return sample_sde(dit, start, y, step_noise=partial(noise, "sample_sde"), **settings)
    for key in ("sampler", "atol", "rtol"):
        settings[key] = getattr(section, key)
    return sample_ode(dit, start, y, **settings)


def _take_over(path: Path, labels: np.ndarray, job: Job) -> bool:
    """Copy a batch that an earlier attempt at this recipe finished into this attempt; False if there is none."""
    for attempt in job.earlier:
        try:
            batch = read_batch(attempt / path.relative_to(job.folder))
        except CorruptData:
            continue
        if np.array_equal(batch.labels, labels):
            write_batch(path, batch)
            return True
    return False


def _digest(paths: list[Path]) -> str:
    """sha256 over images, labels and how images were rounded, in index order, whatever the batches."""
    images, labels, bits = hashlib.sha256(), hashlib.sha256(), hashlib.sha256()
    for path in paths:
        batch = read_batch(path)
        images.update(batch.images.tobytes())
        labels.update(batch.labels.astype("<i8").tobytes())
        bits.update(batch.rounded_up.tobytes())
    return hashlib.sha256(images.digest() + labels.digest() + bits.digest()).hexdigest()
