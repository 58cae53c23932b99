"""All scores of generated images, each beside what real images and two trivial baselines reach on the same terms."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rae.stages.job import Job
from rae.stages.scoring.baselines import make_baselines
from rae.stages.scoring.classifier import Classifier, grey_8x8
from rae.stages.scoring.distances import inception_score, kernel_distance
from rae.stages.scoring.extractors import Extractor
from rae.stages.scoring.feature_rows import FeatureRows, Gathered
from rae.stages.scoring.features import Features, extract
from rae.stages.scoring.frechet import Moments, frechet_distance
from rae.stages.scoring.image_sets import ImageSet, Rows, usable_blocks
from rae.stages.scoring.neighbours import Manifold
from rae.stages.scoring.references import Reference
from rae.stages.sections import EvaluateSection
from rae.stages.training.ranks import Ranks
from rae.store.errors import ConfigError
from rae.store.manifest import Json

FEATURES = "features"
"""The folder, in an attempt's own, in which features lie until the scores are there."""

_REAL, _TRANSFER = 1, 2  # keep the draws of one seed apart


@dataclass(frozen=True)
class Seen:
    """A set of images as a classifier sees it: inputs [N, D] and labels [N]."""

    inputs: NDArray[np.float32]
    labels: NDArray[np.integer]

    def take(self, rows: NDArray[np.intp]) -> "Seen":
        """Some of them, in this order."""
        return Seen(self.inputs[rows], self.labels[rows])


@dataclass(frozen=True)
class Row:
    """A row of the table: features, and what the classifier sees, if there is one."""

    features: FeatureRows
    seen: Seen | None


class GenerationScores:
    """Scores of the images `samples` against the held-out images or a reference, with the training images to judge by.

    Without training images (None) there are no classes and no baselines, without held-out ones no classes, and a
    `reference` is needed. Features are taken by all ranks, on the disk, and an earlier attempt's are taken over; memory
    holds no set of images. Raises ConfigError for a set without images.
    """

    def __init__(
        self,
        samples: ImageSet,
        train: ImageSet | None,
        held_out: ImageSet | None,
        extractor: Extractor,
        config: EvaluateSection,
        job: Job,
        ranks: Ranks | None = None,
        reference: Reference | None = None,
    ) -> None:
        for what, images in (("generated", samples), ("training", train), ("held-out", held_out)):
            if images is not None and not len(images.labels):
                raise ConfigError(f"There are no {what} images, and a score needs them.")
        self._samples, self._train, self._held_out = samples, train, held_out
        self._extractor, self._config, self._job = extractor, config, job
        self._with_classes = (
            config.classifier != "none"
            and train is not None
            and held_out is not None
            and len(np.unique(train.labels)) > 1
            and all(images.labels.min() >= 0 for images in (samples, train, held_out))
        )
        self.held_out = self._features(held_out, ranks) if held_out is not None else None
        self.samples = self._features(samples, ranks)
        self._reference = reference
        self._train_features: Features | None = None
        if train is not None and self._with_classes and config.classifier == "features":
            self._train_features = self._features(train, ranks)
        # Against training images, it is held-out ones that show what can be hoped for.
        against_train = config.reference_split == "train"
        self._known_real = self.held_out if against_train else self._train_features
        if self._known_real is not None:
            self._real_rows = self._draw(len(self._known_real), len(samples.labels), _REAL)
        self._drawn: ImageSet | None = None  # of these, features are still to be taken
        if self._known_real is None and train is not None and not against_train:
            self._drawn = Rows(train, self._draw(len(train.labels), len(samples.labels), _REAL))
            self._features(self._drawn, ranks)

    def rows(self) -> dict[str, dict[str, float]]:
        """Scores by row, then by metric.

        Rows: `samples`; `real`, as many other real images drawn by `config.seed` (all, if there are fewer): training
        images, or held-out ones if the reference is of training images; with `config.baselines` also `class_means` and
        `pixel_gaussian`, made from the training images for the same labels. Metrics:

        - `class_agreement`: a classifier of the kind `config.classifier`, trained on the training images, sees the
          class asked for. In the row `real` it judges the held-out images, since it knows the training images by heart.
        - `transfer_accuracy`: one of the same kind, trained on `config.transfer_images` of the row's images alone, is
          right on held-out images.
        - `precision`, `recall`, `density`, `coverage`, `frechet_distance`: in the features of the extractor. A
          reference of moments alone gives the last one only.
        - `kernel_distance`: with `config.kid_subset_size`. `inception_score`: if the extractor is Inception.

        Where classes mean nothing the first two are left out: with `classifier: none`, if any image has no label (-1),
        or if the training images are all of one class. `transfer_accuracy` is also left out of a row of fewer than two
        classes.

        Raises ConfigError if a label asked for has no training image, or if there are too few images for a metric;
        CorruptData for features that are not finite.
        """
        train = self._seen(self._train, self._train_features)
        held_out = self._seen(self._held_out, self.held_out)
        rows = {
            "samples": Row(self.samples, self._seen(self._samples, self.samples)),
            **self._real(held_out if self._config.reference_split == "train" else train),
            **(self._baselines(self._train) if self._config.baselines and self._train is not None else {}),
        }
        scores: dict[str, dict[str, float]] = {row: {} for row in rows}
        if train is not None and held_out is not None:
            for name, metric, value in self._class_scores(rows, train, held_out):
                scores[name][metric] = value
        if self._reference is not None:
            moments, real = self._reference.moments, self._reference.features
        else:
            assert self.held_out is not None
            moments, real = Moments.of(self.held_out), self.held_out
        manifold = Manifold(real, self._config.nearest_k) if real is not None else None
        for name, row in rows.items():
            if manifold is not None:
                scores[name] |= manifold.judge(row.features)._asdict()
            scores[name]["frechet_distance"] = frechet_distance(moments, row.features)
            if self._config.kid_subset_size is not None and real is not None:
                scores[name]["kernel_distance"] = kernel_distance(row.features, real, self._config.kid_subset_size)[0]
            if self._extractor.head is not None:
                scores[name]["inception_score"] = inception_score(row.features, self._extractor.head)[0]
        return scores

    def protocol(self) -> Json:
        """What these scores were measured with, besides how the samples were drawn."""
        balance = zip(*np.unique(self.samples.labels, return_counts=True), strict=True)
        judged_by = {"train_digest": self._train.digest} if self._with_classes and self._train is not None else {}
        return {
            "extractor": self._extractor.protocol(),
            "images": len(self.samples),
            "labels": {str(label): int(count) for label, count in balance},
            "classifier": self._config.classifier,
            **judged_by,
            "transfer_images": self._config.transfer_images,
            "nearest_k": self._config.nearest_k,
            "kid_subset_size": self._config.kid_subset_size,
        }

    def _features(self, images: ImageSet, ranks: Ranks | None = None) -> Features:
        job = self._job
        earlier = [attempt / FEATURES for attempt in job.earlier]
        return extract(
            self._extractor,
            images,
            job.folder / FEATURES,
            earlier=earlier,
            ranks=ranks,
            progress=job.progress,
            check_stop=job.check_stop,
        )

    def _draw(self, of: int, count: int, purpose: int) -> NDArray[np.intp]:
        """`count` of `of` rows without repetition, or all if there are fewer, in an order that the seed decides."""
        rows: NDArray[np.intp] = np.random.default_rng((self._config.seed, purpose)).permutation(of)[:count]
        return rows

    def _seen(self, images: ImageSet | None, features: Features | None) -> Seen | None:
        """What the classifier sees of a set; None without classes."""
        if images is None or not self._with_classes:
            return None
        if self._config.classifier == "features":
            assert features is not None
            return Seen(features.take(np.arange(len(features))), features.labels)
        blocks = [(grey_8x8(pixels), labels) for pixels, labels in usable_blocks(images)]
        return Seen(*(np.concatenate(column) for column in zip(*blocks, strict=True)))

    def _real(self, seen: Seen | None) -> dict[str, Row]:
        """The row of real images, if there are any to draw it from; `seen` is the set that they are drawn from."""
        if self._known_real is not None:
            rows = self._real_rows
            return {"real": Row(Gathered(self._known_real, rows), seen.take(rows) if seen is not None else None)}
        if self._drawn is None:
            return {}
        features = self._features(self._drawn)
        return {"real": Row(features, self._seen(self._drawn, features))}

    def _baselines(self, train: ImageSet) -> dict[str, Row]:
        path = self._job.folder / "pixel_gaussian.npy"
        made = make_baselines(train, self.samples.labels, self._config.seed, path)
        means, draws = self._features(made.means), self._features(made.gaussian)
        seen, drawn = self._seen(made.means, means), self._seen(made.gaussian, draws)
        path.unlink()
        repeated = Row(Gathered(means, made.mean_of), seen.take(made.mean_of) if seen is not None else None)
        return {"class_means": repeated, "pixel_gaussian": Row(draws, drawn)}

    def _class_scores(self, rows: dict[str, Row], train: Seen, held_out: Seen) -> Iterator[tuple[str, str, float]]:
        """(row, metric, value) of the two metrics that need classes."""
        kind = self._config.classifier
        assert kind != "none"
        judge = Classifier(kind).fit(train.inputs, train.labels)
        for name, row in rows.items():
            assert row.seen is not None
            judged = held_out if name == "real" else row.seen
            yield name, "class_agreement", judge.agreement(judged.inputs, judged.labels)
            lesson = row.seen.take(self._draw(len(row.seen.labels), self._config.transfer_images, _TRANSFER))
            if len(np.unique(lesson.labels)) > 1:
                pupil = Classifier(kind).fit(lesson.inputs, lesson.labels)
                yield name, "transfer_accuracy", pupil.agreement(held_out.inputs, held_out.labels)
