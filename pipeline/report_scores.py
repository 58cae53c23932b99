"""The report's table of scores: what each number means, which way is better, and what it was measured with."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rae.store.errors import CorruptData
from rae.store.manifest import Artifact, Json


@dataclass(frozen=True)
class Metric:
    """A column: how it is written, which way is better, and what it says in one or two sentences."""

    name: str
    higher_is_better: bool
    digits: str
    meaning: str


@dataclass(frozen=True)
class Row:
    """A set of pictures that is scored, and what it is."""

    name: str
    meaning: str
    is_baseline: bool = False


@dataclass(frozen=True)
class Cell:
    """A score as text, and the length of its bar in percent."""

    text: str
    bar: float


@dataclass(frozen=True)
class Scores:
    """What `scores.json` holds; `latent_noise` has a `level` and the scores of reconstructions with it, by level.

    `self_test` says whether the extractor made the features that are stored of it, on the machine that took the scores.
    """

    reconstruction: dict[str, float]
    generation: dict[str, dict[str, float]]
    protocol: Json
    latent_noise: list[dict[str, float]]
    self_test: str | None = None


METRICS = (
    Metric(
        "class_agreement",
        True,
        ".3f",
        "share of pictures in which a classifier trained on the real training images sees the class that was asked"
        " for. It asks nothing else: one fixed picture per class can reach 1.000, so this number alone does not show"
        " a generator. The row `real` judges held-out images, since the classifier knows the training images.",
    ),
    Metric(
        "transfer_accuracy",
        True,
        ".3f",
        "a classifier of the same kind, trained on {transfer_images} of the row's pictures alone, is right on this"
        " share of the real held-out images. Pictures that are recognisable but all alike teach it little.",
    ),
    Metric(
        "precision",
        True,
        ".3f",
        "share of the row's pictures that lie no farther from some {real} image than its {nearest_k} nearest {real}"
        " neighbours, in the extractor's features. Says that pictures look real, not that they vary.",
    ),
    Metric(
        "recall",
        True,
        ".3f",
        "the same with the roles changed: share of the {real} images that lie no farther from some picture of the"
        " row than its {nearest_k} nearest neighbours in the row. Says how much of the real variety is made; one"
        " picture per class, repeated, reaches nearly 0.",
    ),
    Metric(
        "density",
        True,
        ".3f",
        "how many real balls of the same kind hold a picture of the row, divided by {nearest_k}: real pictures reach"
        " about 1, and one picture per class, amid its class, can reach far more. Like precision, but one odd {real}"
        " image cannot make everything look real.",
    ),
    Metric(
        "coverage",
        True,
        ".3f",
        "share of the {real} images whose ball holds some picture of the row. Like recall, but pictures far from"
        " everything cannot make up for those that are missing.",
    ),
    Metric(
        "frechet_distance",
        False,
        ".4g",
        "distance between Gaussians fitted to the extractor's features of the row and of the {real} images. It falls"
        " with the number of pictures and depends on the extractor{called}: the row `real` is what can be hoped for"
        " here.",
    ),
    Metric(
        "kernel_distance",
        False,
        ".4g",
        "squared distance between the kernel means of the row's features and of the reference's (KID), over random"
        " subsets. It does not fall with the number of pictures, and may be slightly negative.",
    ),
    Metric(
        "inception_score",
        True,
        ".4g",
        "how sure Inception is of each picture's ImageNet class, and how many classes it sees: from 1 up. It knows"
        " nothing of the reference.",
    ),
)
ROWS = (
    Row("samples", "the transformer's samples, decoded"),
    Row("real", "as many other real images: what a perfect generator scores"),
    Row("class_means", "one mean picture per class, repeated", is_baseline=True),
    Row("pixel_gaussian", "draws from one Gaussian over pixels per class", is_baseline=True),
)


def read_scores(artifact: Artifact) -> Scores:
    """Read a scores artifact; `CorruptData` if it does not hold what evaluation writes."""
    path = artifact.payload / "scores.json"
    try:
        value = json.loads(path.read_bytes())
        generation = {row: _numbers(scores) for row, scores in value.get("generation", {}).items()}
        latent_noise = [_numbers(scores) for scores in value.get("latent_noise", [])]
        if any({"level", "psnr_db", "ssim"} - scores.keys() for scores in latent_noise):
            raise ValueError("a level of noise lacks its scores")
        reconstruction, protocol = _numbers(value.get("reconstruction", {})), dict(value["protocol"])
        return Scores(reconstruction, generation, protocol, latent_noise, _self_test(artifact))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptData(f"{path} does not hold scores ({type(error).__name__}: {error})") from error


def _self_test(artifact: Artifact) -> str | None:
    found = artifact.manifest.provenance.get("self_test")
    return str(found.get("said")) if isinstance(found, dict) else None


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items() if math.isfinite(float(value))}


def columns(scores: Scores) -> list[Metric]:
    """The metrics that were taken, in the order of the report."""
    taken = {name for row in scores.generation.values() for name in row}
    return [metric for metric in METRICS if metric.name in taken]


def meaning(metric: Metric, protocol: Json) -> str:
    """The metric's sentence, with this protocol's numbers."""
    fields = dict(protocol_fields(protocol))
    return metric.meaning.format(
        transfer_images=protocol.get("transfer_images", "some"),
        nearest_k=protocol.get("nearest_k", "k"),
        real="reference" if "reference.digest" in fields else "held-out",
        called="" if fields.get("extractor.name") == "inception" else " (with this one it is no FID of any paper)",
    )


def cell(scores: Scores, row: Row, metric: Metric) -> Cell | None:
    """One score; None where the row has no such score."""
    value = scores.generation.get(row.name, {}).get(metric.name)
    if value is None:
        return None
    column = [one[metric.name] for one in scores.generation.values() if metric.name in one]
    full = (
        max(column) if not metric.higher_is_better else max(1.0, *column) if metric.name == "inception_score" else 1.0
    )
    return Cell(format(value, metric.digits), round(100 * min(max(value / full, 0.0), 1.0), 1) if full else 0.0)


def matched_by_baselines(scores: Scores) -> list[str]:
    """The metrics on which a baseline is at least as good as the samples."""
    names = []
    for metric in columns(scores):
        samples = scores.generation.get("samples", {}).get(metric.name)
        sign = 1 if metric.higher_is_better else -1
        rivals = [scores.generation.get(row.name, {}).get(metric.name) for row in ROWS if row.is_baseline]
        if samples is not None and any(rival is not None and sign * rival >= sign * samples for rival in rivals):
            names.append(metric.name)
    return names


def protocol_card(protocol: Json) -> list[tuple[str, str]]:
    """What the scores were measured with, as (dotted name, text), nested settings after plain ones."""
    return [(name, protocol_value(value)) for name, value in protocol_fields(protocol)]


def protocol_fields(protocol: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The fields of a protocol by dotted name, nested ones after plain ones; the balance of labels is one field."""
    for key, value in sorted(protocol.items(), key=lambda item: isinstance(item[1], dict)):
        if isinstance(value, dict) and key != "labels":
            yield from protocol_fields(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def protocol_value(value: Any) -> str:
    """A value of a protocol as a person reads it; a dictionary is a balance of labels."""
    if isinstance(value, dict):
        return _balance(value)
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    return (
        ", ".join(map(protocol_value, value))
        if isinstance(value, list)
        else f"{value:,}"
        if isinstance(value, int)
        else str(value)
    )


def _balance(labels: Mapping[str, Any]) -> str:
    """`10 classes, 50 images each`."""
    counts = sorted(int(count) for count in labels.values())
    if not counts:
        return "none"
    each = f"{counts[0]:,}" if counts[0] == counts[-1] else f"{counts[0]:,} to {counts[-1]:,}"
    return f"{len(counts):,} classes, {each} images each" if len(counts) > 1 else f"one class, {each} images"
