"""`rae evaluate`: which images are scored."""

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rae.stages.evaluate import load_images
from rae.stages.images import center_crop
from rae.stages.job import Job
from rae.store.errors import CorruptData
from rae.store.shards import open_source
from rae.store.shards_writer import ShardWriter


def test_every_usable_image_is_scored_and_no_other(tmp_path: Path) -> None:
    pixels = [np.full((20, 24, 3), 40 * number, np.uint8) for number in range(3)]
    with ShardWriter(tmp_path, "val", classes=["a", "b"]) as writer:
        for number, image in enumerate(pixels):
            buffer = BytesIO()
            Image.fromarray(image).save(buffer, "PNG")
            writer.add(f"k{number}", b"broken" if number == 1 else buffer.getvalue(), "png", number % 2)
    images, labels = load_images(open_source(tmp_path / "val-*.tar"), 16, Job(tmp_path), "held-out images")
    np.testing.assert_array_equal(images, [center_crop(Image.fromarray(pixels[row]), 16) for row in (0, 2)])
    assert labels.tolist() == [0, 0]


def test_a_set_without_a_usable_image_is_refused(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, "val") as writer:
        writer.add("k0", b"broken", "png")
    with pytest.raises(CorruptData, match="none of the 1 held-out images"):
        load_images(open_source(tmp_path / "val-*.tar"), 16, Job(tmp_path), "held-out images")
