"""`rae evaluate`: scores of reconstructions and of samples, each with its baselines and its protocol."""

import hashlib
import json
import shutil
from collections.abc import Iterator

import numpy as np
import torch

from rae.stages.job import NOTHING, Job, Result
from rae.stages.models.encoders import describe, load_encoder
from rae.stages.models.perceptual import EncoderDistance, LpipsDistance, build_perceptual
from rae.stages.models.pixels import to_uint8, to_unit
from rae.stages.models.trained import Autoencoder, Decoder, check_compatible
from rae.stages.models.weights import EncoderSource
from rae.stages.scoring.extractor_files import ExtractorFiles, locate_extractor
from rae.stages.scoring.extractors import Extractor
from rae.stages.scoring.image_sets import ImageSet, SampleImages, SourceImages
from rae.stages.scoring.load_extractor import load_extractor
from rae.stages.scoring.reconstruction import ReconstructionScores
from rae.stages.scoring.reference_files import check_reference, read_description
from rae.stages.scoring.references import Reference
from rae.stages.scoring.scores import FEATURES, GenerationScores
from rae.stages.scoring.self_test import self_test
from rae.stages.sections import EvaluateSection
from rae.stages.training.randomness import normal
from rae.stages.training.ranks import Ranks
from rae.store.errors import CorruptData
from rae.store.manifest import Artifact, Json, Manifest, canonical
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
    """Score the decoder on held-out images, and the samples, if there are any, against these or a `reference`.

    Every rank takes its share of the features; the first does the rest. Images are read as they are needed.
    """
    ranks = Ranks.from_environment()
    decoding = Decoder.load(decoder.payload, device=job.device)
    known = decoding.encoder
    encoder = load_encoder(encoder_source, known["input_size"], known["feature_index"], job.device)
    check_compatible(describe(encoder), known, "this encoder")
    val = SourceImages(held_out, decoding.image_size)
    generation, provenance = None, dict[str, Json]()
    if samples is not None:
        extractor = _extractor(section, job)
        if ranks.is_main:
            provenance["self_test"] = self_test(extractor, _extractor_files(section)).to_json()
        against = None
        if reference is not None:
            check_reference(reference, extractor.protocol(), section.reference_split, decoding.image_size)
            against = Reference.load(reference)
        sets = SampleImages(samples.payload, samples.manifest.content), SourceImages(train, decoding.image_size), val
        generation = GenerationScores(*sets, extractor, section, job, ranks, against)
    if not ranks.is_main:
        return NOTHING
    distance = build_perceptual(section.perceptual_distance, encoder, section.lpips_weights)
    distance = distance.to(job.device) if distance is not None else None
    by_level, scored = _score_reconstructions(section, Autoencoder(encoder, decoding), distance, val, job)
    scores: Json = {"reconstruction": by_level[0.0]}
    metrics = {f"reconstruction_{name}": value for name, value in by_level[0.0].items()}
    tried = min(section.reconstructions, len(val.labels))
    usable = len(generation.held_out) if generation is not None else len(val.labels) - (tried - scored)
    protocol: Json = {
        "held_out_digest": hashlib.sha256(canonical(held_out.digests)).hexdigest(),
        "held_out_images": usable,
        "held_out_unusable": len(held_out) - usable,
        "image_size": decoding.image_size,
        "reconstructions": scored,
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
    if samples is not None and generation is not None:
        scores["generation"] = generation.rows()
        metrics |= scores["generation"]["samples"]
        protocol |= generation.protocol()
        protocol |= {"reference": _reference_card(reference, section), "sample": drawn_with(samples.manifest)}
    scores["protocol"] = protocol
    path = job.folder / "scores.json"
    path.write_text(json.dumps(scores, indent=1, sort_keys=True, allow_nan=False))
    content = hashlib.sha256(canonical(scores)).hexdigest()
    pictures = [RECONSTRUCTIONS, *([BY_LATENT_NOISE] if section.latent_noise else [])]
    shutil.rmtree(job.folder / FEATURES, ignore_errors=True)
    return Result(content, metrics, (path, *(job.folder / name for name in pictures)), provenance)


def _extractor(section: EvaluateSection, job: Job) -> Extractor:
    weights, sha256 = section.extractor_weights, section.extractor_sha256
    return load_extractor(section.extractor, weights, section.extractor_input_size, job.device, sha256)


def _extractor_files(section: EvaluateSection) -> ExtractorFiles:
    return locate_extractor(section.extractor, section.extractor_weights, section.extractor_sha256)


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


def _score_reconstructions(
    section: EvaluateSection,
    autoencoder: Autoencoder,
    distance: LpipsDistance | EncoderDistance | None,
    images: ImageSet,
    job: Job,
) -> tuple[dict[float, dict[str, float]], int]:
    """Scores of encode-decode on the first held-out images, by the level of noise on their tokens; 0 is always there.

    Also how many were scored. Writes the pictures that the report shows.
    """
    count = min(section.reconstructions, len(images.labels))
    shown = _spread(count, _SHOWN)
    scores = {level: ReconstructionScores(distance, job.device) for level in (0.0, *section.latent_noise)}
    originals: list[np.ndarray] = []
    pictures: dict[float, list[np.ndarray]] = {level: [] for level in scores}
    scored = 0
    for first in range(0, count, section.batch_size):
        rows = np.arange(first, min(first + section.batch_size, count))
        batch, usable = images.read(rows.tolist())
        batch, rows = batch[usable], rows[usable]
        scored += len(rows)
        originals.append(batch[np.isin(rows, shown)])
        if not len(rows):
            continue
        for level, made in _reconstructed(autoencoder, batch, rows, list(scores), section.seed):
            scores[level].add(batch, made)
            pictures[level].append(made[np.isin(rows, shown)])
        job.progress(first + len(usable), count, "reconstructions")
        job.check_stop()
    if not scored:
        raise CorruptData(f"none of the {count} held-out images can be decoded")
    seen = np.concatenate(originals)
    kept = {level: np.concatenate(pieces) for level, pieces in pictures.items()}
    np.savez(job.folder / RECONSTRUCTIONS, originals=seen, reconstructions=kept[0.0])
    if section.latent_noise:
        few = _spread(len(seen), _SHOWN_BY_LEVEL)
        by_level = np.stack([kept[level][few] for level in section.latent_noise])
        np.savez(job.folder / BY_LATENT_NOISE, originals=seen[few], reconstructions=by_level)
    return {level: one.means() for level, one in scores.items()}, scored


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
