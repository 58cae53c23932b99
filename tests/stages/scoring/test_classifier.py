"""Class agreement and transfer accuracy on scikit-learn's digits: what real images reach and class means cannot."""

import numpy as np
import pytest
from sklearn.datasets import load_digits

from rae.stages.scoring.baselines import class_means
from rae.stages.scoring.classifier import (
    FeatureClassifier,
    PixelClassifier,
    class_agreement,
    grey_8x8,
    new_classifier,
    transfer_accuracy,
)
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
    judge = new_classifier(kind, raw_pixels).fit(images[:1437], labels[:1437])
    assert isinstance(judge, PixelClassifier if kind == "pixels" else FeatureClassifier)
    assert class_agreement(judge, images[1437:], labels[1437:]) > (0.95 if kind == "pixels" else 0.85)
    assert class_agreement(judge, images[1437:], (labels[1437:] + 1) % 10) < 0.05


def test_class_means_agree_and_yet_fail_to_transfer(digits: tuple[np.ndarray, np.ndarray]) -> None:
    images, labels = digits
    train, train_labels, real, real_labels = images[:1437], labels[:1437], images[1437:], labels[1437:]
    wanted = np.arange(500) % 10
    means = class_means(train, train_labels, wanted)
    judge = PixelClassifier().fit(train, train_labels)
    assert class_agreement(judge, means, wanted) > 0.95, "class agreement alone is met by a non-generator"
    from_means = transfer_accuracy(PixelClassifier(), means, wanted, real, real_labels)
    from_real = transfer_accuracy(PixelClassifier(), train[:500], train_labels[:500], real, real_labels)
    assert from_means < 0.88
    assert from_real > 0.93


def test_one_class_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least two classes"):
        PixelClassifier().fit(np.zeros((4, 8, 8, 3), np.uint8), np.zeros(4, int))
