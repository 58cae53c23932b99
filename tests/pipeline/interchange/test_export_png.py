"""`rae export png`: a picture a file, which says its index and its class."""

from pathlib import Path

import numpy as np
from PIL import Image

from rae.store.artifacts import Workspace
from rae.store.samples import read_batches
from tests.conftest import Rae


def test_every_sample_is_a_picture_with_its_index_and_class(finished: Rae, tmp_path: Path) -> None:
    words = ("export", "png", "samples/tiny", tmp_path / "png", "-w", finished.workspace)
    assert finished(*words, "--json").succeeded().json["images"] == 20
    finished(*words).succeeded()  # the same pictures are no others
    names = sorted(path.name for path in (tmp_path / "png").iterdir())
    assert names == [f"{index:06d}_{index % 10}.png" for index in range(20)]
    kept = np.concatenate(
        [batch.images for batch in read_batches(Workspace(finished.workspace).resolve("samples/tiny").payload)]
    )
    for name, image in zip(names, kept, strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "png" / name)), image)
    (tmp_path / "png" / "zebra.png").touch()
    finished(*words).refused(4, "zebra.png, which is none of these pictures")
    finished("export", "png", "dit/tiny", tmp_path / "other", "-w", finished.workspace).refused(2, "of kind dit")
