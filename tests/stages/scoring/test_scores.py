"""The whole table of scores, on scikit-learn's digits."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits
from torch import Tensor, nn

from rae.stages.job import Job
from rae.stages.scoring.extractors import Extractor, Preprocessing
from rae.stages.scoring.image_sets import ArrayImages
from rae.stages.scoring.scores import GenerationScores
from rae.stages.sections import EvaluateSection
from rae.store.errors import ConfigError

Sets = dict[str, np.ndarray]
PIXELS = EvaluateSection(classifier="pixels", transfer_images=300)


class Pixels(nn.Module):
    """A stand-in for an extractor that tests what is done with features: the pixels of the digits."""

    def __init__(self) -> None:
        super().__init__()
        self.images: list[np.ndarray] = []

    def forward(self, x: Tensor) -> Tensor:
        self.images.extend(x.numpy())
        return x[:, 0].flatten(1)


def score(
    images: Sets, config: EvaluateSection, network: nn.Module | None = None, head: np.ndarray | None = None
) -> dict[str, dict[str, float]]:
    """The table for sets of arrays, in a folder of its own."""
    extractor = Extractor(
        "pixels", network or Pixels(), Preprocessing("bicubic-clamped", 8), dim=64, digest="", head=head
    )
    sets = [
        ArrayImages(images[one], images[labels])
        for one, labels in (("generated", "labels"), ("train_images", "train_labels"), ("val_images", "val_labels"))
    ]
    with tempfile.TemporaryDirectory() as folder:
        return GenerationScores(*sets, extractor, config, Job(Path(folder))).rows()


@pytest.fixture(scope="module")
def sets() -> Sets:
    """Digits of 8x8: 900 to train on, 400 held out, and 400 more real ones that play the generator."""
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    grey = np.rint(data.images[order] * 255 / 16).astype(np.uint8)
    images, labels = np.repeat(grey[..., None], 3, axis=3), data.target[order]
    return {
        "generated": images[1300:1700],
        "labels": labels[1300:1700],
        "train_images": images[:900],
        "train_labels": labels[:900],
        "val_images": images[900:1300],
        "val_labels": labels[900:1300],
    }


@pytest.fixture(scope="module")
def scores(sets: Sets) -> dict[str, dict[str, float]]:
    return score(sets, PIXELS)


def test_every_row_has_every_metric(scores: dict[str, dict[str, float]]) -> None:
    assert list(scores) == ["samples", "real", "class_means", "pixel_gaussian"]
    metrics = ["class_agreement", "transfer_accuracy", "precision", "recall", "density", "coverage", "frechet_distance"]
    assert all(list(row) == metrics for row in scores.values())
    assert all(type(value) is float for row in scores.values() for value in row.values())


def test_a_perfect_generator_scores_as_real_images_do(scores: dict[str, dict[str, float]]) -> None:
    samples, real = scores["samples"], scores["real"]
    assert min(samples["class_agreement"], real["class_agreement"]) > 0.95
    assert min(samples["transfer_accuracy"], real["transfer_accuracy"]) > 0.9
    assert samples["precision"] == pytest.approx(real["precision"], abs=0.1)
    assert samples["recall"] == pytest.approx(real["recall"], abs=0.1)
    assert samples["frechet_distance"] == pytest.approx(real["frechet_distance"], rel=0.3)


def test_no_baseline_passes_for_real_images(scores: dict[str, dict[str, float]]) -> None:
    assert scores["class_means"]["class_agreement"] > 0.95, "why agreement alone proves nothing"
    assert scores["class_means"]["transfer_accuracy"] < scores["real"]["transfer_accuracy"] - 0.05
    assert scores["class_means"]["recall"] == 0
    assert scores["class_means"]["frechet_distance"] > 2 * scores["real"]["frechet_distance"]
    assert scores["pixel_gaussian"]["recall"] < scores["real"]["recall"] - 0.1


def test_real_agreement_is_judged_on_images_that_the_judge_has_not_learnt(sets: Sets) -> None:
    wrong = sets | {"val_labels": (sets["val_labels"] + 1) % 10}
    assert score(wrong, PIXELS)["real"]["class_agreement"] < 0.05


def test_scores_repeat_to_the_bit_and_features_are_taken_once(sets: Sets, scores: dict[str, dict[str, float]]) -> None:
    network = Pixels()
    assert score(sets, PIXELS, network) == scores
    assert len(network.images) == 400 + 400 + 400 + 16 + 400, "held out, samples, real, a mean per class, Gaussian"


def test_a_linear_probe_takes_features_of_training_images_once(sets: Sets) -> None:
    network = Pixels()
    score(sets, EvaluateSection(classifier="features", baselines=False), network)
    assert len(network.images) == 400 + 400 + 912


def test_metrics_that_are_asked_for_or_possible_are_added(sets: Sets) -> None:
    head = np.random.default_rng(0).standard_normal((20, 64)).astype(np.float32)
    config = EvaluateSection(classifier="none", kid_subset_size=50, baselines=False)
    scores = score(sets, config, head=head)
    assert list(scores) == ["samples", "real"]
    assert list(scores["samples"])[-3:] == ["frechet_distance", "kernel_distance", "inception_score"]
    assert scores["samples"]["inception_score"] > 1
    with pytest.raises(ConfigError, match="subsets of 1000 needs that many images"):
        score(sets, EvaluateSection(classifier="none", kid_subset_size=1000))


def test_without_labels_class_metrics_are_absent(sets: Sets) -> None:
    unlabelled = sets | {key: np.full_like(sets[key], -1) for key in ("labels", "train_labels", "val_labels")}
    for row in score(unlabelled, PIXELS).values():
        assert list(row) == ["precision", "recall", "density", "coverage", "frechet_distance"]
    unconditional = sets | {"labels": np.full_like(sets["labels"], -1)}
    assert "class_agreement" not in score(unconditional, PIXELS)["samples"]
    without = score(sets, EvaluateSection(classifier="none"))
    assert all("class_agreement" not in row for row in without.values())


def test_one_class_of_training_images_leaves_the_metrics_that_need_no_class(sets: Sets) -> None:
    one = sets | {key: np.zeros_like(sets[key]) for key in ("labels", "train_labels", "val_labels")}
    for row in score(one, PIXELS).values():
        assert list(row) == ["precision", "recall", "density", "coverage", "frechet_distance"]


def test_one_requested_class_teaches_nothing_to_transfer(sets: Sets) -> None:
    threes = sets["labels"] == 3
    only = sets | {"generated": sets["generated"][threes], "labels": sets["labels"][threes]}
    scores = score(only, PIXELS)
    assert "transfer_accuracy" not in scores["samples"]
    assert scores["samples"]["class_agreement"] > 0.9
    assert "transfer_accuracy" in scores["real"]


def test_a_linear_probe_can_be_the_judge(sets: Sets) -> None:
    probe = EvaluateSection(classifier="features", transfer_images=300)
    scores = score(sets, probe)
    assert min(scores[row]["class_agreement"] for row in ("samples", "real", "class_means")) > 0.9
    assert scores["class_means"]["transfer_accuracy"] < scores["real"]["transfer_accuracy"]


@pytest.mark.parametrize(("key", "what"), [("generated", "generated"), ("val_images", "held-out")])
def test_an_empty_set_is_named(sets: Sets, key: str, what: str) -> None:
    labels = "labels" if key == "generated" else "val_labels"
    with pytest.raises(ConfigError, match=f"no {what} images"):
        score(sets | {key: sets[key][:0], labels: sets[labels][:0]}, PIXELS)
