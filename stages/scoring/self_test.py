"""`rae evaluate --self-test`: does an extractor make the features here that it made where its values were stored?

The features of eight synthetic images are compared with `self_test.json`, whose values tests/parity/extractor_values.py
computed in float64 without this package's code. Where no values are stored for an extractor, that is said, and of
Inception's what can be compared on any machine: ours against torch-fidelity's own forward.
"""

import json
from dataclasses import asdict, dataclass
from importlib import resources
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rae.stages.scoring.extractor_files import ExtractorFiles
from rae.stages.scoring.extractors import Extractor
from rae.stages.scoring.load_extractor import torch_fidelity_features
from rae.store.manifest import Json, differing_fields

SIDES = (64, 320)  # so that a resize to 224 or 299 enlarges and shrinks
TOLERANCE = 1e-3
"""Largest difference from the stored values, in standard deviations of the features: another processor's rounding makes
1e-5, another resize 0.1."""
GROUPS = 32


@dataclass(frozen=True)
class Agreement:
    """What was found of an extractor.

    `verified` is None where nothing could be compared with stored values; `deviation` is in standard deviations of the
    features; `said` tells a person.
    """

    extractor: str
    verified: bool | None
    said: str
    deviation: float | None = None

    def to_json(self) -> Json:
        """JSON-ready."""
        return asdict(self)


def self_test(extractor: Extractor, files: ExtractorFiles) -> Agreement:
    """Compare an extractor, loaded from `files`, with what is stored for it."""
    features = {side: extractor(synthetic_images(side)) for side in SIDES}
    stored = stored_values().get(extractor.name)
    if stored is not None:
        fields = "; ".join(differing_fields(extractor.protocol(), stored["protocol"]))
        if fields:
            return unverified(extractor.name, f"values are stored for another protocol ({fields})")
        found = np.concatenate([summary(features[side]) for side in SIDES])
        deviation = _deviation(found, np.asarray(stored["values"]))
        agrees = deviation <= TOLERANCE
        told = "agree with" if agrees else "are not"
        return Agreement(
            extractor.name,
            agrees,
            f"features of {len(found)} synthetic images {told} the stored values (largest difference {deviation:.1e}"
            " standard deviations)",
            deviation,
        )
    if extractor.name == "inception":
        return _against_torch_fidelity(extractor.name, features, files)
    return unverified(extractor.name, "no values are stored for it")


def _against_torch_fidelity(name: str, features: dict[int, NDArray[np.float32]], files: ExtractorFiles) -> Agreement:
    own = [torch_fidelity_features(files, synthetic_images(side)) for side in SIDES]
    deviation = _deviation(np.concatenate(list(features.values())), np.concatenate(own))
    if deviation > TOLERANCE:
        return Agreement(name, False, f"features are not torch-fidelity's own ({deviation:.1e} off)", deviation)
    return unverified(
        name,
        "no values of the true weights are stored; with the weights at hand (sha256"
        f" {files.digest[:8]}...) features equal torch-fidelity's own forward in float64, image by image, to"
        f" {deviation:.1e} standard deviations",
        deviation,
    )


def unverified(name: str, reason: str, deviation: float | None = None) -> Agreement:
    """An extractor of which nothing can be compared with stored values here."""
    return Agreement(name, None, f"agreement was not verified on this machine: {reason}", deviation)


def _deviation(found: NDArray[Any], stored: NDArray[Any]) -> float:
    return float(np.abs(found - stored).max() / stored.std())


def stored_values() -> dict[str, Any]:
    """For each extractor, its `protocol` and the `summary` of its features, float64 [8, 33]."""
    text = resources.files("rae.stages.scoring").joinpath("self_test.json").read_text(encoding="utf-8")
    values: dict[str, Any] = json.loads(text)
    return values


def summary(features: NDArray[Any]) -> NDArray[np.float64]:
    """What is stored of features [N, D]: the means of `GROUPS` consecutive groups, and the deviation of all.

    float64 [N, GROUPS + 1]; every feature has a part in it, since most of one image's are zero.
    """
    wide = features.astype(np.float64)
    groups = np.array_split(wide, GROUPS, axis=1)
    return np.stack([*(group.mean(axis=1) for group in groups), wide.std(axis=1)], axis=1)


def synthetic_images(side: int) -> NDArray[np.uint8]:
    """A gradient, a chequerboard, rings and noise, uint8 [4, side, side, 3], in whole numbers: alike everywhere."""
    y, x, c = np.meshgrid(np.arange(side), np.arange(side), np.arange(3), indexing="ij")
    gradient = np.stack([x[..., 0] * 255, y[..., 0] * 255, (x + y)[..., 0] * 127], axis=-1) // (side - 1)
    board = ((x // 8 + y // 8) % 2) * (255 - 60 * c) + 20 * c
    rings = ((2 * x - side) ** 2 + (2 * y - side) ** 2) * (c + 1) // side % 256
    noise = ((x * 73856093) ^ (y * 19349663) ^ (c * 83492791)) % 65521 % 256
    return np.stack([gradient, board, rings, noise]).astype(np.uint8)
