"""Judges of class: does an image show what was asked for, and can one learn the classes from generated images alone?

Images are uint8 [N, H, W, 3] with labels int [N], 0 or more.
"""

from collections.abc import Callable
from typing import Any, Literal, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC
from torch.nn import functional as F

from rae.store.errors import ConfigError

_GREY = (0.299, 0.587, 0.114)  # ITU-R BT.601 luma of R, G, B
_BLOCK = 256  # images in memory as float32 at a time

FeaturesOf = Callable[[NDArray[np.uint8]], NDArray[np.float32]]
"""Images to features [N, D]: an extractor."""


class Classifier(Protocol):
    """Learns labels from images, and says them of others."""

    def fit(self, images: NDArray[np.uint8], labels: NDArray[np.integer]) -> Self: ...
    def predict(self, images: NDArray[np.uint8]) -> NDArray[np.integer]: ...


class PixelClassifier:
    """A support vector machine with an RBF kernel on 8x8 grey pixels in 0..16: scikit-learn's own for its digits."""

    def __init__(self) -> None:
        self._model = SVC(gamma=0.001, C=10)

    def fit(self, images: NDArray[np.uint8], labels: NDArray[np.integer]) -> Self:
        """Learns the classes. Raises ConfigError for fewer than two."""
        _fit(self._model, grey_8x8(images), labels)
        return self

    def predict(self, images: NDArray[np.uint8]) -> NDArray[np.integer]:
        """Labels [N]."""
        predicted: NDArray[np.integer] = self._model.predict(grey_8x8(images))
        return predicted


class FeatureClassifier:
    """A logistic regression on an extractor's standardised features (a linear probe)."""

    def __init__(self, features_of: FeaturesOf) -> None:
        self._features_of = features_of
        self._model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))

    def fit(self, images: NDArray[np.uint8], labels: NDArray[np.integer]) -> Self:
        """Learns the classes. Raises ConfigError for fewer than two."""
        _fit(self._model, self._features_of(images), labels)
        return self

    def predict(self, images: NDArray[np.uint8]) -> NDArray[np.integer]:
        """Labels [N]."""
        predicted: NDArray[np.integer] = self._model.predict(self._features_of(images))
        return predicted


def new_classifier(kind: Literal["pixels", "features"], features_of: FeaturesOf) -> Classifier:
    """An untrained classifier of this kind; `features_of` serves `features`."""
    return PixelClassifier() if kind == "pixels" else FeatureClassifier(features_of)


def class_agreement(classifier: Classifier, images: NDArray[np.uint8], labels: NDArray[np.integer]) -> float:
    """Share of images in [0, 1] in which `classifier`, trained on real images, sees the class that was asked for."""
    return float((classifier.predict(images) == labels).mean())


def transfer_accuracy(
    classifier: Classifier,
    generated: NDArray[np.uint8],
    generated_labels: NDArray[np.integer],
    real: NDArray[np.uint8],
    real_labels: NDArray[np.integer],
) -> float:
    """Accuracy in [0, 1] on real held-out images of an untrained `classifier` that learns from generated ones alone.

    High only if the generated images are right, varied and close to the real ones (the classification accuracy score
    of Ravuri and Vinyals 2019, arXiv:1905.10887): one mean picture per class does not reach it. Raises ConfigError if
    the generated images show fewer than two classes.
    """
    return class_agreement(classifier.fit(generated, generated_labels), real, real_labels)


def grey_8x8(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Grey pixels [N, 64] in 0..16, each the mean over its part of the image."""
    out = np.empty((len(images), 64), np.float32)
    for start in range(0, len(images), _BLOCK):
        grey = images[start : start + _BLOCK] @ np.asarray(_GREY, np.float32) * np.float32(16 / 255)
        out[start : start + _BLOCK] = F.adaptive_avg_pool2d(torch.from_numpy(grey)[:, None], 8).flatten(1).numpy()
    return out


def _fit(model: Any, inputs: NDArray[np.float32], labels: NDArray[np.integer]) -> None:
    if len(np.unique(labels)) < 2:
        raise ConfigError("A classifier needs images of at least two classes to learn from.")
    model.fit(inputs, labels)
