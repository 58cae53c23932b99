"""`rae evaluate`: scores of reconstructions and of samples, each with its baselines and its protocol."""

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator, Mapping

import numpy as np
import torch

from rae.stages.job import NOTHING, Job, Result
from rae.stages.models.compatible import check_compatible
from rae.stages.models.encoders import describe, load_encoder
from rae.stages.models.perceptual import EncoderDistance, LpipsDistance, build_perceptual
from rae.stages.models.pixels import to_uint8, to_unit
from rae.stages.models.trained import Autoencoder, Decoder
from rae.stages.models.weights import EncoderSource
from rae.stages.scoring.extractor_files import locate_extractor
from rae.stages.scoring.extractors import Extractor
from rae.stages.scoring.image_sets import ImageSet, SampleImages, SourceImages, check_size
from rae.stages.scoring.load_extractor import load_extractor
from rae.stages.scoring.reconstruction import ReconstructionDistance, ReconstructionScores
from rae.stages.scoring.reference_files import check_reference, read_description
from rae.stages.scoring.references import Reference
from rae.stages.scoring.scores import FEATURES, GenerationScores
from rae.stages.scoring.self_test import self_test
from rae.stages.sections import EvaluateSection
from rae.stages.training.randomness import normal
from rae.stages.training.ranks import Ranks
from rae.store.errors import CorruptData, StaleInput
from rae.store.manifest import Artifact, Json, Manifest, canonical
from rae.store.shards import Source

logger = logging.getLogger("rae.evaluate")

RECONSTRUCTIONS, BY_LATENT_NOISE = "reconstructions.npz", "latent_noise.npz"  # what the report shows
_SHOWN, _SHOWN_BY_LEVEL = 16, 6


def run(
    section: EvaluateSection,
    train: Source,
    held_out: Source,
    encoder_source: EncoderSource,
    inputs: Mapping[str, Artifact],
    job: Job,
) -> Result:
    """Score the decoder on held-out images, and the samples, if there are any, against these or a reference.

    `inputs` are `decoder` and, where there are such, `samples`, `reference` and `reconstruction_reference`. Every rank
    takes its share of the features; the first does the rest. Images are read as they are needed.
    """
    ranks = Ranks.from_environment()
    decoding = Decoder.load(inputs["decoder"].payload, device=job.device)
    known = decoding.encoder
    encoder = load_encoder(encoder_source, known["input_size"], known["feature_index"], job.device)
    check_compatible(describe(encoder), known, "this encoder")
    val, samples = SourceImages(held_out, decoding.image_size), inputs.get("samples")
    extractor, provenance = None, dict[str, Json]()
    if samples is not None or section.reconstruction_distance:
        extractor, provenance = _tested_extractor(section, job, ranks)
    against = _references(section, inputs, extractor, decoding.image_size)
    generation = None
    if samples is not None and extractor is not None:
        sets = SampleImages(samples.payload, samples.manifest.content), SourceImages(train, decoding.image_size), val
        generation = GenerationScores(*sets, extractor, section, job, ranks, against.get("reference"))
    if not ranks.is_main:
        return NOTHING
    distance = build_perceptual(section.perceptual_distance, encoder, section.lpips_weights)
    distance = distance.to(job.device) if distance is not None else None
    frechet = _reconstruction_distance(section, extractor, against.get("reconstruction_reference"))
    by_level, scored = _score_reconstructions(section, Autoencoder(encoder, decoding), distance, frechet, val, job)
    scores: Json = {"reconstruction": by_level[0.0]}
    metrics = {f"reconstruction_{name}": value for name, value in by_level[0.0].items()}
    tried = min(section.reconstructions, len(val.labels))
    seen = generation.held_out if generation is not None else None
    usable = len(seen) if seen is not None else len(val.labels) - (tried - scored)
    protocol = _judged_by(section, held_out, usable, decoding.image_size) | {"reconstructions": scored}
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
        protocol |= {"reference": _card(inputs.get("reference")), "sample": drawn_with(samples.manifest)}
    elif extractor is not None:
        protocol["extractor"] = extractor.protocol()
    if section.reconstruction_distance:
        protocol["reconstruction_reference"] = _card(inputs.get("reconstruction_reference"))
    pictures = [RECONSTRUCTIONS, *([BY_LATENT_NOISE] if section.latent_noise else [])]
    return _written({**scores, "protocol": protocol}, metrics, pictures, provenance, job)


def score_images(
    section: EvaluateSection,
    images: ImageSet,
    train: Source | None,
    held_out: Source | None,
    image_size: int,
    inputs: Mapping[str, Artifact],
    job: Job,
) -> Result:
    """Score images that were made elsewhere as `run` scores samples: the same scores for the same images.

    `inputs` may hold a `reference`, which is needed where there are no held-out images. What drew the images is unknown
    to the protocol. Raises StaleInput for images of another size, and what reading them raises.
    """
    check_size(images, image_size, "these scores are")
    ranks = Ranks.from_environment()
    extractor, provenance = _tested_extractor(section, job, ranks)
    reference = _references(section, inputs, extractor, image_size).get("reference")
    known = SourceImages(train, image_size) if train is not None else None
    val = SourceImages(held_out, image_size) if held_out is not None else None
    generation = GenerationScores(images, known, val, extractor, section, job, ranks, reference)
    if not ranks.is_main:
        return NOTHING
    rows, seen = generation.rows(), generation.held_out
    protocol = _judged_by(section, held_out, len(seen) if seen is not None else 0, image_size)
    protocol |= generation.protocol() | {"reference": _card(inputs.get("reference")), "sample": "unknown"}
    return _written({"generation": rows, "protocol": protocol}, rows["samples"], [], provenance, job)


def _judged_by(section: EvaluateSection, held_out: Source | None, usable: int, image_size: int) -> Json:
    """What all scores of an evaluation have in common."""
    judged_by: Json = {"image_size": image_size, "seed": section.seed}
    if held_out is None:
        return judged_by
    return judged_by | {
        "held_out_digest": hashlib.sha256(canonical(held_out.digests)).hexdigest(),
        "held_out_images": usable,
        "held_out_unusable": len(held_out) - usable,
    }


def _written(scores: Json, metrics: Mapping[str, float], pictures: list[str], provenance: Json, job: Job) -> Result:
    path = job.folder / "scores.json"
    path.write_text(json.dumps(scores, indent=1, sort_keys=True, allow_nan=False))
    content = hashlib.sha256(canonical(scores)).hexdigest()
    shutil.rmtree(job.folder / FEATURES, ignore_errors=True)
    return Result(content, dict(metrics), (path, *(job.folder / name for name in pictures)), provenance)


def _tested_extractor(section: EvaluateSection, job: Job, ranks: Ranks) -> tuple[Extractor, Json]:
    """The extractor, and on the first rank what its self-test found, for the provenance."""
    name, weights, sha256 = section.extractor, section.extractor_weights, section.extractor_sha256
    extractor = load_extractor(name, weights, section.extractor_input_size, job.device, sha256)
    if not ranks.is_main:
        return extractor, {}
    return extractor, {"self_test": self_test(extractor, locate_extractor(name, weights, sha256)).to_json()}


def _reconstruction_distance(
    section: EvaluateSection, extractor: Extractor | None, reference: Reference | None
) -> ReconstructionDistance | None:
    if not section.reconstruction_distance or extractor is None:
        return None
    return ReconstructionDistance(extractor, reference.moments if reference is not None else None)


def _references(
    section: EvaluateSection, inputs: Mapping[str, Artifact], extractor: Extractor | None, image_size: int
) -> dict[str, Reference]:
    """The references by their keys; `StaleInput` for one that this extractor did not take, or of another split."""
    found = {}
    for key, split in (("reference", section.reference_split), ("reconstruction_reference", None)):
        artifact = inputs.get(key)
        if artifact is None or extractor is None:
            continue
        check_reference(artifact, extractor.protocol(), split, image_size)
        found[key] = Reference.load(artifact)
        if found[key].moments.dim != extractor.dim:
            raise StaleInput(
                f"the reference `{artifact.manifest.name}` has {found[key].moments.dim} features an image, and"
                f" `{extractor.name}` makes {extractor.dim}"
            )
        if key == "reconstruction_reference" and found[key].about.split == "train":
            logger.warning(
                "reconstructions are scored against `%s`, which is of training images, for generation: reconstructions"
                " are of held-out images, whose reference `rae evaluate CONFIG --make-reference val` makes",
                artifact.manifest.name,
            )
    return found


def _card(reference: Artifact | None) -> Json:
    """What scores were taken against, for the protocol; held-out images stand in it by their digest anyway."""
    if reference is None:
        return {"images": "held out", "split": "val"}
    about = read_description(reference.payload)
    return {
        "digest": reference.manifest.content,
        "split": about.split,
        "rows": about.rows,
        "image_size": about.image_size,
        "asserted": about.asserted,
    }


def drawn_with(samples: Manifest) -> Json:
    """The settings that samples were drawn with, the transformer's shift, and the id of what guided it, if it did.

    Without the batch size, of which an image does not depend.
    """
    guide = samples.inputs.get("guide")
    settings = {key: value for key, value in samples.config["sample"].items() if key != "batch_size"}
    shift = {"time_dist_shift": samples.metrics["time_dist_shift"]}
    return {**settings, **shift, **({"guide": guide["id"]} if guide else {})}


def _score_reconstructions(
    section: EvaluateSection,
    autoencoder: Autoencoder,
    distance: LpipsDistance | EncoderDistance | None,
    frechet: ReconstructionDistance | None,
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
            if frechet is not None and level == 0:
                frechet.add(batch, made)
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
        rows_by_level = np.stack([kept[level][few] for level in section.latent_noise])
        np.savez(job.folder / BY_LATENT_NOISE, originals=seen[few], reconstructions=rows_by_level)
    by_level = {level: one.means() for level, one in scores.items()}
    if frechet is not None:
        by_level[0.0]["frechet_distance"] = frechet.value()
    return by_level, scored


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
