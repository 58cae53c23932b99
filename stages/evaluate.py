"""`rae evaluate`: scores of reconstructions and of samples, each with its baselines and its protocol."""

import hashlib
import json
from collections.abc import Iterator

import numpy as np
import torch

from rae.stages.images import BadImage, center_crop, decode
from rae.stages.job import NOTHING, Job, Result
from rae.stages.models.encoders import describe, load_encoder
from rae.stages.models.perceptual import EncoderDistance, LpipsDistance, build_perceptual
from rae.stages.models.pixels import to_uint8, to_unit
from rae.stages.models.trained import Autoencoder, Decoder, check_compatible
from rae.stages.models.weights import EncoderSource
from rae.stages.scoring.extractors import Extractor
from rae.stages.scoring.load_extractor import load_extractor
from rae.stages.scoring.reconstruction import ReconstructionScores
from rae.stages.scoring.reference_files import check_reference, read_description
from rae.stages.scoring.references import Reference
from rae.stages.scoring.scores import score_generation
from rae.stages.sections import EvaluateSection
from rae.stages.training.randomness import normal
from rae.stages.training.ranks import Ranks
from rae.store.errors import CorruptData
from rae.store.manifest import Artifact, Json, Manifest, canonical
from rae.store.samples import read_batches
from rae.store.shards import Source

RECONSTRUCTIONS, BY_LATENT_NOISE = "reconstructions.npz", "latent_noise.npz"  # what the report shows
_SHOWN, _SHOWN_BY_LEVEL = 16, 6


def run(
    section: EvaluateSection,
    train: Source,
    held_out: Source,
    encoder_source: EncoderSource,
    decoder: Artifact,
    samples: Artifact | None,
    reference: Artifact | None,
    job: Job,
) -> Result:
    """Score the decoder on held-out images, and the samples, if there are any, against these or a `reference`."""
    if not Ranks.from_environment().is_main:
        return NOTHING
    decoding = Decoder.load(decoder.payload, device=job.device)
    known = decoding.encoder
    encoder = load_encoder(encoder_source, known["input_size"], known["feature_index"], job.device)
    check_compatible(describe(encoder), known, "this encoder")
    size = decoding.image_size
    extractor = _extractor(section, job) if samples is not None else None
    if reference is not None and extractor is not None:
        check_reference(reference, extractor.protocol(), section.reference_split, size)
    val_images, val_labels = load_images(held_out, size, job, "held-out images")
    distance = build_perceptual(section.perceptual_distance, encoder, section.lpips_weights)
    distance = distance.to(job.device) if distance is not None else None
    by_level = _score_reconstructions(section, Autoencoder(encoder, decoding), distance, val_images, job)
    scores: Json = {"reconstruction": by_level[0.0]}
    metrics = {f"reconstruction_{name}": value for name, value in by_level[0.0].items()}
    protocol: Json = {
        "held_out_digest": hashlib.sha256(canonical(held_out.digests)).hexdigest(),
        "held_out_images": len(val_images),
        "held_out_unusable": len(held_out) - len(val_images),
        "image_size": size,
        "reconstructions": min(len(val_images), section.reconstructions),
        "seed": section.seed,
    }
    if distance is not None:
        protocol["perceptual_distance"] = {"description": distance.description, "digest": distance.digest}
    if section.latent_noise:
        scores["latent_noise"] = [{"level": level, **by_level[level]} for level in section.latent_noise]
        metrics |= {
            f"reconstruction_{name}_at_noise_{level:g}": value
            for level in section.latent_noise
            for name, value in by_level[level].items()
        }
    if samples is not None and extractor is not None:
        rows, measured_with = _score_samples(section, train, val_images, val_labels, samples, reference, extractor, job)
        scores["generation"] = rows
        metrics |= rows["samples"]
        protocol |= measured_with
    scores["protocol"] = protocol
    path = job.folder / "scores.json"
    path.write_text(json.dumps(scores, indent=1, sort_keys=True, allow_nan=False))
    content = hashlib.sha256(canonical(scores)).hexdigest()
    pictures = [RECONSTRUCTIONS, *([BY_LATENT_NOISE] if section.latent_noise else [])]
    return Result(content, metrics, (path, *(job.folder / name for name in pictures)))


def _extractor(section: EvaluateSection, job: Job) -> Extractor:
    return load_extractor(
        section.extractor,
        section.extractor_weights,
        section.extractor_input_size,
        job.device,
        section.extractor_sha256,
    )


def _score_samples(
    section: EvaluateSection,
    train: Source,
    val_images: np.ndarray,
    val_labels: np.ndarray,
    samples: Artifact,
    reference: Artifact | None,
    extractor: Extractor,
    job: Job,
) -> tuple[dict[str, dict[str, float]], Json]:
    """Rows of scores, samples and baselines, and the protocol that they were taken under."""
    train_images, train_labels = load_images(train, val_images.shape[1], job, "training images")
    generated, labels = load_samples(samples)
    against = Reference.load(reference) if reference is not None else None
    rows = score_generation(
        generated, labels, train_images, train_labels, val_images, val_labels, extractor, section, against
    )
    balance = zip(*np.unique(labels, return_counts=True), strict=True)
    return rows, {
        "extractor": extractor.protocol(),
        "reference": _reference_card(reference, section),
        "images": len(generated),
        "labels": {str(label): int(count) for label, count in balance},
        "classifier": section.classifier,
        "transfer_images": section.transfer_images,
        "nearest_k": section.nearest_k,
        "sample": drawn_with(samples.manifest),
    }


def _reference_card(reference: Artifact | None, section: EvaluateSection) -> Json:
    """What samples were scored against, for the protocol; the held-out images stand in it by their digest anyway."""
    if reference is None:
        return {"images": "held out", "split": section.reference_split}
    about = read_description(reference.payload)
    return {
        "digest": reference.manifest.content,
        "split": about.split,
        "rows": about.rows,
        "image_size": about.image_size,
        "asserted": about.asserted,
    }


def drawn_with(samples: Manifest) -> Json:
    """The settings that samples were drawn with, the transformer's shift, and the id of what guided it, if it did."""
    guide = samples.inputs.get("guide")
    shift = {"time_dist_shift": samples.metrics["time_dist_shift"]}
    return {**samples.config["sample"], **shift, **({"guide": guide["id"]} if guide else {})}


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
    batches = list(read_batches(samples.payload))
    return np.concatenate([batch.images for batch in batches]), np.concatenate([batch.labels for batch in batches])


def _score_reconstructions(
    section: EvaluateSection,
    autoencoder: Autoencoder,
    distance: LpipsDistance | EncoderDistance | None,
    images: np.ndarray,
    job: Job,
) -> dict[float, dict[str, float]]:
    """Scores of encode-decode on the first held-out images, by the level of noise on their tokens; 0 is always there.

    Writes the pictures that the report shows.
    """
    originals = images[: section.reconstructions]
    shown = _spread(len(originals), _SHOWN)
    scores = {level: ReconstructionScores(distance, job.device) for level in (0.0, *section.latent_noise)}
    pictures: dict[float, list[np.ndarray]] = {level: [] for level in scores}
    for first in range(0, len(originals), section.batch_size):
        batch = originals[first : first + section.batch_size]
        rows = np.arange(first, first + len(batch))
        for level, made in _reconstructed(autoencoder, batch, rows, list(scores), section.seed):
            scores[level].add(batch, made)
            pictures[level].append(made[np.isin(rows, shown)])
        job.progress(first + len(batch), len(originals), "reconstructions")
        job.check_stop()
    kept = {level: np.concatenate(pieces) for level, pieces in pictures.items()}
    np.savez(job.folder / RECONSTRUCTIONS, originals=originals[shown], reconstructions=kept[0.0])
    if section.latent_noise:
        few = _spread(len(shown), _SHOWN_BY_LEVEL)
        by_level = np.stack([kept[level][few] for level in section.latent_noise])
        np.savez(job.folder / BY_LATENT_NOISE, originals=originals[shown][few], reconstructions=by_level)
    return {level: one.means() for level, one in scores.items()}


def _spread(count: int, shown: int) -> np.ndarray:
    """At most `shown` places at equal distances among `count`, each once."""
    return np.linspace(0, count - 1, min(shown, count)).astype(int)


@torch.inference_mode()
def _reconstructed(
    autoencoder: Autoencoder, images: np.ndarray, rows: np.ndarray, levels: list[float], seed: int
) -> Iterator[tuple[float, np.ndarray]]:
    """Each level with what the decoder makes of tokens + level * noise, which is drawn once per (seed, row)."""
    device = autoencoder.encoder.device
    tokens = autoencoder.encode(to_unit(images, device))
    noise = normal(tokens.shape[1:], seed, "latent_noise", 0, rows, device) if any(levels) else None
    for level in levels:
        noisy = tokens if noise is None or level == 0 else tokens + level * noise
        yield level, to_uint8(autoencoder.decode(noisy))
