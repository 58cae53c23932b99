"""The images of a samples artifact: read as they were written, and as truncation would have written them."""

from pathlib import Path

import numpy as np
import pytest
import torch

from rae.stages.models.pixels import rounded_up, to_uint8
from rae.store.errors import CorruptData
from rae.store.samples import SampleBatch, batch_path, read_batch, read_batches, read_labels, write_batch


def drawn(count: int, size: int = 5, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def written(folder: Path, *batches: torch.Tensor) -> Path:
    (folder / "images").mkdir(parents=True)
    for number, images in enumerate(batches):
        batch = SampleBatch(to_uint8(images), np.arange(len(images)), rounded_up(images))
        write_batch(batch_path(folder, number), batch)
    return folder


def test_batches_come_back_in_the_order_of_their_index(tmp_path: Path) -> None:
    images = [drawn(3), drawn(2, seed=1)]
    found = list(read_batches(written(tmp_path / "samples", *images)))
    assert [batch.labels.tolist() for batch in found] == [[0, 1, 2], [0, 1]]
    assert read_labels(batch_path(tmp_path / "samples", 0)).tolist() == [0, 1, 2]
    for batch, made in zip(found, images, strict=True):
        np.testing.assert_array_equal(batch.images, to_uint8(made))


def test_truncation_is_given_back_to_the_bit(tmp_path: Path) -> None:
    levels = torch.arange(256.0) / 255  # some of these lie a hair below a level in float32, some above
    edges = torch.stack([levels, levels.nextafter(torch.tensor(-1.0)).clamp(0), levels.nextafter(torch.tensor(2.0))])
    images = torch.cat([edges.clamp(0, 1).reshape(1, 3, 16, 16), drawn(4, 16)])
    write_batch(tmp_path / "one.npz", SampleBatch(to_uint8(images), np.zeros(5, np.int64), rounded_up(images)))
    truncated = read_batch(tmp_path / "one.npz").truncated()
    np.testing.assert_array_equal(truncated, (255 * images).to(torch.uint8).permute(0, 2, 3, 1).numpy())
    assert (truncated != to_uint8(images)).mean() == pytest.approx(0.5, abs=0.1)


def test_a_file_that_is_no_batch_is_named(tmp_path: Path) -> None:
    folder = written(tmp_path / "samples", drawn(3))
    path, batch = batch_path(folder, 0), read_batch(batch_path(folder, 0))
    np.savez(path, images=batch.images, labels=batch.labels[:2], rounded_up=batch.rounded_up)
    with pytest.raises(CorruptData, match=r"batch-000000.npz holds arrays that do not fit together"):
        read_batch(path)
    np.savez(path, images=batch.images, labels=batch.labels)
    with pytest.raises(CorruptData, match=r"batch-000000.npz holds no batch of samples .*rounded_up"):
        read_batch(path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CorruptData, match=r"batch-000000.npz holds no batch of samples"):
        read_batch(path)
    with pytest.raises(CorruptData, match=r"batch-000000.npz holds no batch of samples"):
        read_labels(path)
    path.unlink()
    with pytest.raises(CorruptData, match="holds no images"):
        list(read_batches(folder))


def test_images_of_mixed_sizes_are_refused(tmp_path: Path) -> None:
    folder = written(tmp_path / "samples", drawn(3), drawn(3, 6))
    with pytest.raises(CorruptData, match=r"batch-000001.npz holds images of \(6, 6, 3\), and those before it"):
        list(read_batches(folder))
