"""Which pictures and numbers a report takes out of payloads."""

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rae.pipeline.report import read_series
from rae.pipeline.report_images import read_gallery
from rae.store.errors import CorruptData
from rae.store.manifest import Artifact, Manifest


def samples_artifact(folder: Path, images: np.ndarray, labels: np.ndarray) -> Artifact:
    (folder / "images").mkdir()
    for number, first in enumerate(range(0, len(labels), 50)):
        batch = slice(first, first + 50)
        np.savez(folder / "images" / f"batch-{number:06d}.npz", images=images[batch], labels=labels[batch])
    return Artifact(folder, Manifest("samples", "some", {}, "", {}, {}, [], {}))


def picture(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))))


def test_many_classes_show_the_first_twelve(tmp_path: Path) -> None:
    labels = np.resize(np.arange(30), 240)
    images = np.zeros((240, 8, 8, 3), np.uint8)
    images[:, 0, 0, 0] = np.arange(240)
    gallery = read_gallery(samples_artifact(tmp_path, images, labels), None, None)
    assert [row.name for row in gallery.rows] == [f"class {label}" for label in range(12)]
    assert (gallery.classes, gallery.images) == (30, 240)
    assert [int(picture(uri)[0, 0, 0]) for uri in gallery.rows[2].generated] == list(range(2, 240, 30))


def test_an_unconditional_model_has_one_row_without_a_name(tmp_path: Path) -> None:
    images = np.zeros((64, 200, 200, 3), np.uint8)
    gallery = read_gallery(samples_artifact(tmp_path, images, np.zeros(64, np.int64)), None, None)
    assert [(row.name, len(row.generated)) for row in gallery.rows] == [("", 40)]
    assert picture(gallery.rows[0].generated[0]).shape == (160, 160, 3)  # large ones are scaled down


def test_samples_without_as_many_labels_are_refused(tmp_path: Path) -> None:
    artifact = samples_artifact(tmp_path, np.zeros((4, 8, 8, 3), np.uint8), np.arange(4))
    np.savez(tmp_path / "images" / "batch-000000.npz", images=np.zeros((3, 8, 8, 3), np.uint8), labels=np.arange(4))
    with pytest.raises(CorruptData, match=r"batch-000000\.npz holds 3 images and 4 labels"):
        read_gallery(artifact, None, None)


def test_a_log_is_read_as_far_as_it_makes_sense(tmp_path: Path) -> None:
    log = tmp_path / "metrics.jsonl"
    log.write_text('{"step": 2, "loss": 0.5}\n{"step": 1, "loss": 1.5}\n{"step": 3, "loss": null}\n[]\n{"step": 4, "lo')
    steps, loss = read_series(log, "loss")
    assert steps.tolist() == [1, 2]
    assert loss.tolist() == [1.5, 0.5]
    assert not len(read_series(tmp_path / "absent.jsonl", "loss")[0])
