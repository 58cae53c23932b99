"""Features on the disk: the same for any reader and number of ranks, resumed after a kill, never of a bad file."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from torch import Tensor, nn

from rae.stages.scoring import features as module
from rae.stages.scoring.extractors import BLOCK_SIZE, Extractor, Preprocessing
from rae.stages.scoring.feature_rows import Gathered
from rae.stages.scoring.features import Features, extract
from rae.stages.scoring.frechet import frechet_distance
from rae.stages.scoring.image_sets import ArrayImages
from rae.stages.training.ranks import Ranks
from rae.store.errors import CorruptData


class Means(nn.Module):
    """The mean of each channel in each quarter of the image, and how many images came together."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        assert len(x) == BLOCK_SIZE
        self.calls += 1
        return nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)


def extractor(network: nn.Module | None = None, digest: str = "") -> Extractor:
    return Extractor("means", network or Means(), Preprocessing("bicubic-clamped", 8), dim=12, digest=digest)


def everything(features: Features) -> np.ndarray:
    """All of them, as one array, and that they are the same taken by rows in another order."""
    whole = np.concatenate(list(features))
    order = np.random.default_rng(1).permutation(len(features))
    np.testing.assert_array_equal(features.take(order), whole[order])
    np.testing.assert_array_equal(np.concatenate(list(Gathered(features, order))), whole[order])
    return whole


@pytest.fixture
def images(monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    monkeypatch.setattr(module, "CHUNK_ROWS", 2 * BLOCK_SIZE)
    return np.random.default_rng(0).integers(0, 256, (107, 8, 8, 3), dtype=np.uint8)


def test_features_on_the_disk_are_those_in_memory(images: np.ndarray, tmp_path: Path) -> None:
    labels = np.arange(len(images)) % 5
    found = extract(extractor(), ArrayImages(images, labels), tmp_path)
    np.testing.assert_array_equal(everything(found), extractor()(images))
    np.testing.assert_array_equal(found.labels, labels)
    assert len(found) == 107
    assert [len(chunk) for chunk in found] == [32, 32, 32, 11]
    assert frechet_distance(found, extractor()(images)) == pytest.approx(0, abs=1e-10)


@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_any_number_of_ranks_writes_the_same_files(images: np.ndarray, tmp_path: Path, world_size: int) -> None:
    alone = extract(extractor(), ArrayImages(images), tmp_path / "alone")

    class Unconnected(Ranks):  # ranks that take turns in one process
        def barrier(self) -> None:
            pass

    for rank in reversed(range(1, world_size)):
        with pytest.raises(CorruptData):  # the others' chunks are not there yet
            extract(extractor(), ArrayImages(images), tmp_path / "many", ranks=Unconnected(rank, world_size))
    many = extract(extractor(), ArrayImages(images), tmp_path / "many", ranks=Unconnected(0, world_size))
    np.testing.assert_array_equal(everything(many), everything(alone))


def test_chunks_that_are_there_are_not_computed_again(images: np.ndarray, tmp_path: Path) -> None:
    extract(extractor(), ArrayImages(images), tmp_path / "earlier")
    network = Means()
    found = extract(extractor(network), ArrayImages(images), tmp_path / "later", earlier=(tmp_path / "earlier",))
    assert network.calls == 0
    np.testing.assert_array_equal(everything(found), extractor()(images))
    paths = sorted((tmp_path / "later").iterdir())
    paths[1].write_bytes(paths[1].read_bytes()[:-100])
    paths[2].unlink()
    again = extract(extractor(network), ArrayImages(images), tmp_path / "later")
    assert network.calls == 4, "two chunks of two blocks"
    np.testing.assert_array_equal(everything(again), everything(found))


def test_features_of_other_images_or_weights_are_not_taken_over(images: np.ndarray, tmp_path: Path) -> None:
    extract(extractor(), ArrayImages(images), tmp_path)
    network = Means()
    other = extract(extractor(network), ArrayImages(255 - images), tmp_path)
    assert network.calls == 7
    np.testing.assert_array_equal(everything(other), extractor()(255 - images))
    extract(extractor(network, digest="other"), ArrayImages(images), tmp_path)
    assert network.calls == 14


def test_what_cannot_be_used_leaves_its_neighbours_alone(images: np.ndarray, tmp_path: Path) -> None:
    class Holes(ArrayImages):
        def read(self, rows: range) -> tuple[np.ndarray, np.ndarray]:  # type: ignore[override]
            pixels, usable = super().read(rows)
            usable = ~np.isin(list(rows), [3, 40])
            return pixels * usable[:, None, None, None].astype(np.uint8), usable

    found = extract(extractor(), Holes(images, np.arange(107)), tmp_path)
    kept = np.delete(np.arange(107), [3, 40])
    np.testing.assert_array_equal(found.rows, kept)
    np.testing.assert_array_equal(found.labels, kept)
    np.testing.assert_array_equal(everything(found), extractor()(images)[kept])


def test_an_extraction_killed_in_the_middle_goes_on(images: np.ndarray, tmp_path: Path) -> None:
    script = f"""
import os, signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import numpy as np
import test_features as t
t.module.CHUNK_ROWS = 2 * t.BLOCK_SIZE
images = np.random.default_rng(0).integers(0, 256, (107, 8, 8, 3), dtype=np.uint8)
kill = lambda done, *_, **__: os.kill(os.getpid(), signal.SIGKILL) if done == 64 else None
t.extract(t.extractor(), t.ArrayImages(images), t.Path({str(tmp_path)!r}), progress=kill)
"""
    ended = subprocess.run([sys.executable, "-c", script], env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)
    assert ended.returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 2
    network = Means()
    found = extract(extractor(network), ArrayImages(images), tmp_path)
    assert network.calls == 3
    np.testing.assert_array_equal(everything(found), extractor()(images))


def test_features_that_are_not_finite_are_named(images: np.ndarray, tmp_path: Path) -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1)[:, :12] / (x.flatten(1).sum(dim=1, keepdim=True) != 0)

    images[50] = 0
    with pytest.raises(CorruptData, match="image 50 are not finite"):
        extract(extractor(Broken()), ArrayImages(images), tmp_path)
