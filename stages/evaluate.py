"""`rae evaluate`: scores of reconstructions and of samples, each with its baselines and its protocol."""

import hashlib
import json
from collections.abc import Iterator

import numpy as np
import torch

from rae.stages.images import BadImage, center_crop, decode
from rae.stages.job import NOTHING, Job, Result
from rae.stages.models.encoders import Encoder, describe, load_encoder
from rae.stages.models.pixels import to_uint8, to_unit
from rae.stages.models.trained import Autoencoder, Decoder, check_compatible
from rae.stages.models.weights import EncoderSource
from rae.stages.scoring.extractors import load_extractor
from rae.stages.scoring.reconstruction import psnr_db, ssim
from rae.stages.scoring.scores import score_generation
from rae.stages.sections import EvaluateSection
from rae.stages.training.ranks import Ranks
from rae.store.artifacts import Artifact
from rae.store.errors import CorruptData
from rae.store.manifest import Json, canonical
from rae.store.shards import Source

_SHOWN = 16  # reconstructions kept for the report


def run(
    section: EvaluateSection,
    train: Source,
    held_out: Source,
    encoder_source: EncoderSource,
    decoder: Artifact,
    samples: Artifact | None,
    job: Job,
) -> Result:
    """Score the decoder on held-out images, and the samples, if there are any, against them."""
    if not Ranks.from_environment().is_main:
        return NOTHING
    decoding = Decoder.load(decoder.payload, device=job.device)
    known = decoding.encoder
    encoder = load_encoder(encoder_source, known["input_size"], known["feature_index"], job.device)
    check_compatible(describe(encoder), known, "this encoder")
    size = decoding.image_size
    val_images, val_labels = load_images(held_out, size, job, "held-out images")
    scores: dict[str, Json] = {"reconstruction": _score_reconstruction(section, encoder, decoding, val_images, job)}
    metrics = {f"reconstruction_{name}": value for name, value in scores["reconstruction"].items()}
    protocol: Json = {
        "held_out_digest": hashlib.sha256(canonical(held_out.digests)).hexdigest(),
        "held_out_images": len(val_images),
        "held_out_unusable": len(held_out) - len(val_images),
        "image_size": size,
        "reconstructions": min(len(val_images), section.reconstructions),
        "seed": section.seed,
    }
    if samples is not None:
        extractor = load_extractor(
            section.extractor, section.extractor_weights, section.extractor_input_size, job.device
        )
        train_images, train_labels = load_images(train, size, job, "training images")
        generated, labels = load_samples(samples)
        scores["generation"] = score_generation(
            generated, labels, train_images, train_labels, val_images, val_labels, extractor, section
        )
        metrics |= scores["generation"]["samples"]
        protocol |= {
            "extractor": extractor.protocol(),
            "images": len(generated),
            "labels": {
                str(label): int(count) for label, count in zip(*np.unique(labels, return_counts=True), strict=True)
            },
            "classifier": section.classifier,
            "transfer_images": section.transfer_images,
            "nearest_k": section.nearest_k,
            "sample": samples.manifest.config["sample"],
        }
    scores["protocol"] = protocol
    path = job.folder / "scores.json"
    path.write_text(json.dumps(scores, indent=1, sort_keys=True, allow_nan=False))
    content = hashlib.sha256(canonical(scores)).hexdigest()
    return Result(content, metrics, (path, job.folder / "reconstructions.npz"))


def load_images(source: Source, size: int, job: Job, unit: str) -> tuple[np.ndarray, np.ndarray]:
    """Every usable image as uint8 [N, size, size, 3], centre-cropped, and the labels [N]; -1 is none."""
    images, labels = [], []
    for row in range(len(source)):
        if source.reason(row) is None:
            try:
                images.append(center_crop(decode(source.read(row)), size))
            except BadImage:
                continue  # counted in the protocol; of a training image, the latents' index has the reason
            labels.append(int(source.labels[row]))
        job.progress(row + 1, len(source), unit)
        job.check_stop()
    if not images:
        raise CorruptData(f"none of the {len(source)} {unit} can be decoded")
    return np.stack(images), np.array(labels, np.int64)


def load_samples(samples: Artifact) -> tuple[np.ndarray, np.ndarray]:
    """The images uint8 [N, S, S, 3] and labels [N] of a samples artifact, in index order."""
    batches = [np.load(path, allow_pickle=False) for path in sorted(samples.payload.glob("images/batch-*.npz"))]
    if not batches:
        raise CorruptData(f"{samples.payload} holds no images")
    return tuple(np.concatenate([batch[key] for batch in batches]) for key in ("images", "labels"))  # type: ignore[return-value]


def _score_reconstruction(
    section: EvaluateSection, encoder: Encoder, decoder: Decoder, images: np.ndarray, job: Job
) -> dict[str, float]:
    """PSNR and SSIM of encode-decode, without noise, on the first held-out images."""
    originals = images[: section.reconstructions]
    made = []
    for batch in _reconstructed(Autoencoder(encoder, decoder), originals, section.batch_size):
        made.append(batch)
        job.progress(sum(map(len, made)), len(originals), "reconstructions")
        job.check_stop()
    reconstructions = np.concatenate(made)
    chosen = np.linspace(0, len(originals) - 1, min(_SHOWN, len(originals))).astype(int)
    np.savez(job.folder / "reconstructions.npz", originals=originals[chosen], reconstructions=reconstructions[chosen])
    return {"psnr_db": psnr_db(originals, reconstructions), "ssim": ssim(originals, reconstructions)}


@torch.inference_mode()
def _reconstructed(autoencoder: Autoencoder, images: np.ndarray, batch_size: int) -> Iterator[np.ndarray]:
    device = next(autoencoder.parameters()).device
    for first in range(0, len(images), batch_size):
        batch = to_unit(images[first : first + batch_size], device)
        yield to_uint8(autoencoder.decode(autoencoder.encode(batch)))
