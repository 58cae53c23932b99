"""The official (ADM's) centre crop, pixel for pixel."""

from pathlib import Path

import numpy as np
from PIL import Image

from rae.stages.images import center_crop


def check_center_crop(path: Path) -> None:
    with np.load(path, allow_pickle=False) as file:
        arrays = dict(file)
    names = {key.removeprefix("in/") for key in arrays if key.startswith("in/")}
    assert names
    assert arrays.keys() == {f"{side}/{name}" for name in names for side in ("in", "out")}
    for name in names:
        image, official = Image.fromarray(arrays[f"in/{name}"]), arrays[f"out/{name}"]
        ours = center_crop(image if official.ndim == 2 else image.convert("RGB"), official.shape[0])
        np.testing.assert_array_equal(ours, official, err_msg=name)
