"""Judges of class: does an image show what was asked for, and can one learn the classes from generated images alone?

They see an image as a row of inputs: its grey pixels, or an extractor's features. Labels are int [N], 0 or more.
"""

from typing import Any, Literal, Self

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


class Classifier:
    """Learns labels from inputs [N, D], and says them of others.

    `pixels` is a support vector machine with an RBF kernel on grey pixels in 0..16 (`grey_8x8`), scikit-learn's own for
    its digits; `features` a logistic regression on an extractor's standardised features (a linear probe).
    """

    def __init__(self, kind: Literal["pixels", "features"]) -> None:
        self._model: Any = (
            SVC(gamma=0.001, C=10)
            if kind == "pixels"
            else make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
        )

    def fit(self, inputs: NDArray[np.float32], labels: NDArray[np.integer]) -> Self:
        """Learns the classes. Raises ConfigError for fewer than two."""
        if len(np.unique(labels)) < 2:
            raise ConfigError("A classifier needs images of at least two classes to learn from.")
        self._model.fit(inputs, labels)
        return self

    def agreement(self, inputs: NDArray[np.float32], labels: NDArray[np.integer]) -> float:
        """Share of inputs in [0, 1] whose class is the one of `labels`.

        Trained on real images and asked of generated ones: class agreement. Trained on generated images alone and asked
        of real held-out ones: the classification accuracy score of Ravuri and Vinyals 2019 (arXiv:1905.10887), which is
        high only if the generated images are right, varied and close to the real ones; one mean picture per class does
        not reach it.
        """
        return float((self._model.predict(inputs) == labels).mean())


def grey_8x8(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Grey pixels [N, 64] in 0..16 of images [N, H, W, 3], each the mean over its part of the image."""
    out = np.empty((len(images), 64), np.float32)
    for start in range(0, len(images), _BLOCK):
        grey = images[start : start + _BLOCK] @ np.asarray(_GREY, np.float32) * np.float32(16 / 255)
        out[start : start + _BLOCK] = F.adaptive_avg_pool2d(torch.from_numpy(grey)[:, None], 8).flatten(1).numpy()
    return out
