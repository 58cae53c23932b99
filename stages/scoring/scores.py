"""All scores of generated images, each beside what real images and two trivial baselines reach on the same terms."""

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256

import numpy as np
from numpy.typing import NDArray

from rae.stages.scoring.baselines import class_means, pixel_gaussian
from rae.stages.scoring.classifier import FeaturesOf, class_agreement, new_classifier, transfer_accuracy
from rae.stages.scoring.frechet import Moments, frechet_distance
from rae.stages.scoring.neighbours import prdc
from rae.stages.scoring.references import Reference
from rae.stages.sections import EvaluateSection
from rae.store.errors import ConfigError

_REAL, _TRANSFER = 1, 2  # keep the draws of one seed apart


@dataclass(frozen=True)
class LabelledImages:
    """Images uint8 [N, H, W, 3] and their labels int [N]; -1 is "no label"."""

    images: NDArray[np.uint8]
    labels: NDArray[np.integer]

    def draw(self, count: int, seed: tuple[int, int]) -> "LabelledImages":
        """`count` of them without repetition, or all if there are fewer, in an order that `seed` decides."""
        rows = np.random.default_rng(seed).permutation(len(self.labels))[:count]
        return LabelledImages(self.images[rows], self.labels[rows])


def score_generation(
    generated: NDArray[np.uint8],
    labels: NDArray[np.integer],
    train_images: NDArray[np.uint8],
    train_labels: NDArray[np.integer],
    val_images: NDArray[np.uint8],
    val_labels: NDArray[np.integer],
    extractor: FeaturesOf,
    config: EvaluateSection,
    reference: Reference | None = None,
) -> dict[str, dict[str, float]]:
    """Scores by row, then by metric, against the held-out images or a reference. Images are uint8 [N, H, W, 3].

    Rows: `samples`, the generated images; `real`, as many other real images drawn by `config.seed` (all, if there are
    fewer): training images, or held-out ones if the reference is of training images; `class_means` and
    `pixel_gaussian`, baselines made from the training images for the same labels. Metrics:

    - `class_agreement`: a classifier of the kind `config.classifier`, trained on the training images, sees the class
      asked for. In the row `real` it judges the held-out images, since it knows the training images by heart.
    - `transfer_accuracy`: one of the same kind, trained on `config.transfer_images` of the row's images alone, is
      right on held-out images.
    - `precision`, `recall`, `density`, `coverage`, `frechet_distance`: in the features of `extractor`. A reference of
      moments alone gives the last one only.

    Where classes mean nothing the first two are left out: with `classifier: none`, if any image has no label (-1), or
    if the training images are all of one class.
    `transfer_accuracy` is also left out of a row of fewer than two classes.

    Raises ConfigError if a label asked for has no training image, or if there are too few images for a metric.
    """
    for what, images in (("generated", generated), ("training", train_images), ("held-out", val_images)):
        if not len(images):
            raise ConfigError(f"There are no {what} images, and a score needs them.")
    train, val = LabelledImages(train_images, train_labels), LabelledImages(val_images, val_labels)
    samples = LabelledImages(generated, labels)
    rows = {
        "samples": samples,
        "real": (val if config.reference_split == "train" else train).draw(len(labels), (config.seed, _REAL)),
        "class_means": LabelledImages(class_means(train.images, train.labels, labels), labels),
        "pixel_gaussian": LabelledImages(pixel_gaussian(train.images, train.labels, labels, config.seed), labels),
    }
    features_of = _Remembered(extractor)
    scores: dict[str, dict[str, float]] = {row: {} for row in rows}
    if all(of.min() >= 0 for of in (labels, train_labels, val_labels)):
        for row, metric, value in _class_scores(rows, train, val, features_of, config):
            scores[row][metric] = value
    real_features = features_of(val.images) if reference is None else reference.features_array()
    moments = Moments.of(features_of(val.images)) if reference is None else reference.moments
    for row, drawn in rows.items():
        features = features_of(drawn.images)
        if real_features is not None:
            scores[row] |= prdc(real_features, features, config.nearest_k)._asdict()
        scores[row]["frechet_distance"] = frechet_distance(moments, features)
    return scores


def _class_scores(
    rows: dict[str, LabelledImages],
    train: LabelledImages,
    val: LabelledImages,
    features_of: FeaturesOf,
    config: EvaluateSection,
) -> Iterator[tuple[str, str, float]]:
    """(row, metric, value) of the two metrics that need classes."""
    if config.classifier == "none" or len(np.unique(train.labels)) < 2:
        return
    judge = new_classifier(config.classifier, features_of).fit(train.images, train.labels)
    for row, drawn in rows.items():
        judged = val if row == "real" else drawn
        yield row, "class_agreement", class_agreement(judge, judged.images, judged.labels)
        lesson = drawn.draw(config.transfer_images, (config.seed, _TRANSFER))
        if len(np.unique(lesson.labels)) > 1:
            pupil = new_classifier(config.classifier, features_of)
            accuracy = transfer_accuracy(pupil, lesson.images, lesson.labels, val.images, val.labels)
            yield row, "transfer_accuracy", accuracy


class _Remembered:
    """An extractor that runs once for each distinct image: class means repeat, and classifiers ask again."""

    def __init__(self, features_of: FeaturesOf) -> None:
        self._features_of = features_of
        self._known: dict[bytes, NDArray[np.float32]] = {}

    def __call__(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        digests = [sha256(image.tobytes()).digest() for image in images]
        new = {digest: i for i, digest in enumerate(digests) if digest not in self._known}
        if new:
            self._known |= zip(new, self._features_of(images[list(new.values())]), strict=True)
        return np.stack([self._known[digest] for digest in digests])
