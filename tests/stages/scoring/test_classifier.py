"""Class agreement and transfer accuracy on scikit-learn's digits: what real images reach and class means cannot."""

import numpy as np
import pytest
from sklearn.datasets import load_digits

from rae.stages.scoring.baselines import class_mean
from rae.stages.scoring.classifier import Classifier, grey_8x8
from rae.store.errors import ConfigError


@pytest.fixture(scope="module")
def digits() -> tuple[np.ndarray, np.ndarray]:
    """1797 digits of 64x64, uint8 RGB."""
    data = load_digits()
    grey = np.rint(data.images * 255 / 16).astype(np.uint8)
    large = grey.repeat(8, axis=1).repeat(8, axis=2)
    return np.repeat(large[..., None], 3, axis=3), data.target


def raw_pixels(images: np.ndarray) -> np.ndarray:
    return images[:, 4::8, 4::8, 0].reshape(len(images), -1).astype(np.float32)


def test_grey_pixels_are_those_of_the_digits(digits: tuple[np.ndarray, np.ndarray]) -> None:
    np.testing.assert_allclose(grey_8x8(digits[0]), load_digits().data, atol=0.5 * 16 / 255 + 1e-4)


def test_grey_pixels_are_area_means() -> None:
    images = np.random.default_rng(0).integers(0, 256, (300, 24, 24, 3), dtype=np.uint8)
    luma = (images * [0.299, 0.587, 0.114]).sum(axis=3) * 16 / 255
    expected = luma.reshape(300, 8, 3, 8, 3).mean(axis=(2, 4)).reshape(300, 64)
    np.testing.assert_allclose(grey_8x8(images), expected, atol=1e-4)


@pytest.mark.parametrize("kind", ["pixels", "features"])
def test_real_digits_agree_and_wrong_labels_do_not(digits: tuple[np.ndarray, np.ndarray], kind: str) -> None:
    images, labels = digits
    inputs = grey_8x8(images) if kind == "pixels" else raw_pixels(images)
    judge = Classifier(kind).fit(inputs[:1437], labels[:1437])
    assert judge.agreement(inputs[1437:], labels[1437:]) > (0.95 if kind == "pixels" else 0.85)
    assert judge.agreement(inputs[1437:], (labels[1437:] + 1) % 10) < 0.05


def test_class_means_agree_and_yet_fail_to_transfer(digits: tuple[np.ndarray, np.ndarray]) -> None:
    images, labels = digits
    inputs = grey_8x8(images)
    train, train_labels, real, real_labels = inputs[:1437], labels[:1437], inputs[1437:], labels[1437:]
    means = grey_8x8(np.stack([class_mean(images[:1437][train_labels == label]) for label in range(10)]))
    judge = Classifier("pixels").fit(train, train_labels)
    assert judge.agreement(means, np.arange(10)) > 0.95, "class agreement alone is met by a non-generator"
    from_means = Classifier("pixels").fit(means.repeat(50, axis=0), np.arange(10).repeat(50))
    from_real = Classifier("pixels").fit(train[:500], train_labels[:500])
    assert from_means.agreement(real, real_labels) < 0.88
    assert from_real.agreement(real, real_labels) > 0.93


def test_one_class_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least two classes"):
        Classifier("pixels").fit(np.zeros((4, 64), np.float32), np.zeros(4, int))
