"""`rae sample`: latents drawn from the transformer, decoded to images.

An image depends on (seed, index, class) alone: its noise has a generator of its own, and every batch, the last one
too, is run at full size, so that kernels round alike.
"""

import hashlib
import os
import time
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch

from rae.stages.job import Job, Result
from rae.stages.models.pixels import to_uint8
from rae.stages.models.samplers import sample_ode
from rae.stages.models.trained import Decoder, Dit, check_compatible
from rae.stages.sections import SampleSection
from rae.stages.training.randomness import normal
from rae.store.artifacts import Artifact
from rae.store.errors import ConfigError


def run(section: SampleSection, dit: Artifact, decoder: Artifact, job: Job) -> Result:
    """Draw what is missing of the images, a batch at a time."""
    model = Dit.load(dit.payload, section.weights, job.device)
    decode = Decoder.load(decoder.payload, device=job.device)
    check_compatible(model.about.encoder, decode.encoder)
    labels = choose_labels(section, model.num_classes)
    files, began = [], time.monotonic()
    content = hashlib.sha256()
    for number, first in enumerate(range(0, len(labels), section.batch_size)):
        indices = np.arange(first, min(first + section.batch_size, len(labels)))
        name = f"images/batch-{number:06d}.npz"
        path = job.folder / name
        path.parent.mkdir(exist_ok=True)
        images = _taken_over(name, path, labels[indices], job)
        if images is None:
            images = draw(model, decode, labels[indices], indices, section)
            _save(path, images, labels[indices])
        content.update(images.tobytes() + labels[indices].astype("<i8").tobytes())
        files.append(path)
        job.progress(int(indices[-1]) + 1, len(labels), "images")
        job.check_stop()
    seconds = time.monotonic() - began
    metrics = {"images": len(labels), "images_per_second": round(len(labels) / max(seconds, 1e-9), 3)}
    return Result(content.hexdigest(), metrics, tuple(files))


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


def draw_all(dit: Dit, decoder: Decoder, labels: np.ndarray, section: SampleSection) -> np.ndarray:
    """Images uint8 [N, S, S, 3] for labels [N], indexed from 0."""
    indices = np.arange(len(labels))
    starts = range(0, len(labels), section.batch_size)
    batches = [slice(first, first + section.batch_size) for first in starts]
    return np.concatenate([draw(dit, decoder, labels[batch], indices[batch], section) for batch in batches])


@torch.inference_mode()
def draw(dit: Dit, decoder: Decoder, labels: np.ndarray, indices: np.ndarray, section: SampleSection) -> np.ndarray:
    """Images uint8 [B, S, S, 3] for labels [B] at the indices [B], computed in a batch of the full size."""
    device = dit.mean.device
    padding = section.batch_size - len(indices)
    padded = np.pad(indices, (0, padding), mode="edge")
    y = torch.from_numpy(np.pad(labels, (0, padding), mode="edge")).to(device)
    noise = normal(dit.latent_shape, section.seed, "sample", 0, padded, device)
    with torch.autocast(device.type, torch.bfloat16, enabled=section.precision == "bf16"):
        latents = sample_ode(
            dit,
            noise,
            y,
            transport=dit.about.create_transport(),
            sampler=section.sampler,
            num_steps=section.num_steps,
            guidance_scale=section.guidance_scale,
            guidance_interval=section.guidance_interval,
            null_label=dit.num_classes,
        )
        images = decoder(dit.raw(latents.float()))
    return to_uint8(images)[: len(indices)]


def _taken_over(name: str, path: Path, labels: np.ndarray, job: Job) -> np.ndarray | None:
    """A batch that an earlier attempt at this recipe finished, linked or copied into this one."""
    for attempt in job.earlier:
        try:
            with np.load(attempt / name, allow_pickle=False) as batch:
                images: np.ndarray = batch["images"]
                found = batch["labels"]
        except (OSError, ValueError, KeyError, BadZipFile):
            continue
        if np.array_equal(found, labels):
            _save(path, images, labels)
            return images
    return None


def _save(path: Path, images: np.ndarray, labels: np.ndarray) -> None:
    """Whole or not at all: a batch cut short by a crash must not pass for one."""
    temporary = path.with_suffix(".partial")
    with open(temporary, "wb") as file:
        np.savez(file, images=images, labels=labels)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
