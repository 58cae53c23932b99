"""The official (ADM's) centre crop, pixel for pixel."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rae.stages.images import center_crop

FOLDER = Path(os.environ.get("RAE_PARITY_DIR") or Path(__file__).parent)


def _cases() -> list[object]:
    files = [np.load(path, allow_pickle=False) for path in sorted(FOLDER.glob("center_crop*.npz"))]
    return [
        pytest.param(file[name], file[name.replace("in/", "out/", 1)], id=name.removeprefix("in/"))
        for file in files
        for name in file.files
        if name.startswith("in/")
    ]


def test_there_are_cases() -> None:
    assert _cases(), f"no center_crop*.npz in {FOLDER}"


@pytest.mark.parametrize(("image", "expected"), _cases())
def test_center_crop_is_pixel_exact(image: np.ndarray, expected: np.ndarray) -> None:
    cropped = center_crop(Image.fromarray(image), expected.shape[0])
    np.testing.assert_array_equal(cropped, expected)
