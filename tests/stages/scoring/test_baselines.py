"""The trivial baselines have exactly the moments that they claim."""

import tempfile
from pathlib import Path

import numpy as np
import pytest

from rae.stages.scoring import baselines
from rae.stages.scoring.baselines import Baselines, make_baselines
from rae.stages.scoring.image_sets import ArrayImages
from rae.store.errors import ConfigError


def made(images: np.ndarray, labels: np.ndarray, wanted: np.ndarray, seed: int = 0) -> tuple[Baselines, np.ndarray]:
    """The baselines, and the Gaussian's draws."""
    with tempfile.TemporaryDirectory() as folder:
        both = make_baselines(ArrayImages(images, labels), wanted, seed, Path(folder) / "draws.npy")
        return both, both.gaussian.read(range(len(wanted)))[0]


def class_means(images: np.ndarray, labels: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    both, _ = made(images, labels, wanted)
    return both.means.read(both.mean_of.tolist())[0]


def pixel_gaussian(images: np.ndarray, labels: np.ndarray, wanted: np.ndarray, seed: int) -> np.ndarray:
    return made(images, labels, wanted, seed)[1]


def two_classes() -> tuple[np.ndarray, np.ndarray]:
    """Dark and light pictures of 4x4; their pixels vary together along a ramp, within 0..255."""
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 2
    ramp = np.linspace(0, 1, 48).reshape(4, 4, 3)
    values = 60 + 120 * labels[:, None, None, None] + rng.standard_normal((60, 1, 1, 1)) * 10 * ramp
    return np.rint(values).clip(0, 255).astype(np.uint8), labels


def test_class_means_repeat_the_mean_of_the_wanted_class() -> None:
    images, labels = two_classes()
    drawn = class_means(images, labels, np.array([1, 0, 1]))
    assert drawn.dtype == np.uint8
    np.testing.assert_array_equal(drawn[0], np.rint(images[labels == 1].astype(float).mean(axis=0)))
    np.testing.assert_array_equal(drawn[0], drawn[2])
    assert drawn[1].mean() < 70
    assert drawn[0].mean() > 170


def test_gaussian_draws_have_the_mean_and_covariance_of_the_class() -> None:
    images, labels = two_classes()
    drawn = pixel_gaussian(images, labels, np.repeat([0, 1], 4000), seed=3).reshape(2, 4000, 48).astype(float)
    for label in (0, 1):
        members = images[labels == label].reshape(-1, 48).astype(float)
        np.testing.assert_allclose(drawn[label].mean(axis=0), members.mean(axis=0), atol=0.6)
        # Sampling error of a variance of 100 from 4000 draws is 2.2; rounding to whole grey levels adds 1/12.
        np.testing.assert_allclose(np.cov(drawn[label].T), np.cov(members.T), atol=9)


def test_a_gaussian_draw_depends_on_seed_index_and_label_alone() -> None:
    images, labels = two_classes()
    many = pixel_gaussian(images, labels, np.array([0, 1, 0, 1]), seed=1)
    few = pixel_gaussian(images, labels, np.array([0, 1]), seed=1)
    np.testing.assert_array_equal(many[:2], few)
    assert (many[0] != many[2]).any()
    assert (few != pixel_gaussian(images, labels, np.array([0, 1]), seed=2)).any()


def test_draws_are_clipped_to_pixels() -> None:
    images = np.zeros((50, 2, 2, 3), np.uint8)
    images[::2] = 255
    drawn = pixel_gaussian(images, np.zeros(50, int), np.zeros(100, int), seed=0)
    assert (drawn == 0).any()
    assert (drawn == 255).any()
    assert np.abs(drawn.astype(int) - 127).min() < 60, "a Gaussian fills the gap between black and white"


def test_no_label_asks_for_all_images_labelled_or_not() -> None:
    images, labels = two_classes()
    wanted = np.full(3, -1)
    for known in (labels, np.full(60, -1)):
        assert (class_means(images, known, wanted) == np.rint(images.astype(float).mean(axis=0))).all()
        assert pixel_gaussian(images, known, wanted, seed=0).shape == (3, 4, 4, 3)


def test_one_image_of_a_class_is_its_own_gaussian() -> None:
    images, labels = two_classes()
    np.testing.assert_array_equal(pixel_gaussian(images[:1], labels[:1], np.array([0]), seed=0), images[:1])


def test_a_class_without_images_is_named() -> None:
    images, labels = two_classes()
    for make in (class_means, lambda *sets: pixel_gaussian(*sets, seed=0)):
        with pytest.raises(ConfigError, match="class 7"):
            make(images, labels, np.array([0, 7]))


def test_a_large_class_is_seen_through_some_of_its_images(monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = two_classes()
    monkeypatch.setattr(baselines, "MOST_MEMBERS", 4)
    ones = images[labels == 1]
    expected = np.rint(ones[[0, 9, 19, 29]].astype(float).mean(axis=0))
    np.testing.assert_array_equal(class_means(images, labels, np.array([1]))[0], expected)
