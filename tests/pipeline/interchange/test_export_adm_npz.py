"""`rae export adm-npz`: what ADM's evaluator reads, rounded or truncated, never whole in memory."""

import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest

from rae.pipeline.console import Console
from rae.pipeline.interchange.export_adm_npz import export_adm_npz
from rae.store.artifacts import Workspace
from rae.store.manifest import Json, Manifest
from rae.store.samples import SampleBatch, batch_path, write_batch
from tests.conftest import Rae


def published(root: Path, images: np.ndarray, labels: np.ndarray, batch_size: int, metrics: Json) -> Workspace:
    """Samples in a workspace, each value of which was rounded up if it is odd."""
    workspace = Workspace(root)
    recipe: Json = {"kind": "samples"}
    work = workspace.begin("samples", "mine", recipe, {})
    (work.attempt / "images").mkdir()
    files = []
    for number, first in enumerate(range(0, len(images), batch_size)):
        path, some = batch_path(work.attempt, number), images[first : first + batch_size]
        bits = np.packbits((some % 2).reshape(len(some), -1), axis=1)
        write_batch(path, SampleBatch(some, labels[first : first + batch_size], bits))
        relative = path.relative_to(work.folder).as_posix()
        files.append({"path": relative, "bytes": path.stat().st_size, "sha256": ""})
    workspace.publish(work, Manifest("samples", "mine", recipe, "", {}, {}, files, metrics))
    return workspace


def test_the_file_holds_every_image_and_label_in_the_order_of_the_index(finished: Rae, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "samples.npz"
    words = ("export", "adm-npz", "samples/tiny", out, "-w", finished.workspace)
    made = finished(*words, "--json").succeeded().json
    assert made["files"] == [str(out)]
    with np.load(out, allow_pickle=False) as file:
        images, labels = file["arr_0"], file["arr_1"]
    assert (images.dtype, images.shape) == (np.uint8, (20, 32, 32, 3))
    assert labels.tolist() == [index % 10 for index in range(20)]
    again = tmp_path / "again.npz"
    finished("export", "adm-npz", "samples/tiny", again, "-w", finished.workspace).succeeded()
    assert again.read_bytes() == out.read_bytes()
    finished(*words).succeeded()  # the same file is no other file
    finished(*words, "--adm-truncate").refused(4, "is there already, and is another")
    truncated = tmp_path / "truncated.npz"
    finished("export", "adm-npz", "samples/tiny", truncated, "--adm-truncate", "-w", finished.workspace).succeeded()
    with np.load(truncated, allow_pickle=False) as file:
        lost = images.astype(int) - file["arr_0"]
    assert set(np.unique(lost)) == {0, 1}
    assert lost.mean() == pytest.approx(0.5, abs=0.1)


def test_the_file_is_read_as_adm_reads_it(tmp_path: Path) -> None:
    """Its evaluator takes the header of `arr_0.npy` apart by itself, as version 1.0, and reads the rest in pieces."""
    images = np.arange(3 * 4 * 4 * 3, dtype=np.uint8).reshape(3, 4, 4, 3)
    workspace = published(tmp_path / "ws", images, np.array([-1, -1, -1]), 2, {"images": 3})
    export_adm_npz("mine", tmp_path / "out.npz", False, workspace, Console(quiet=True))
    with zipfile.ZipFile(tmp_path / "out.npz") as archive:
        assert archive.namelist() == ["arr_0.npy"]  # images without labels have no arr_1
        with archive.open("arr_0.npy") as member:
            assert np.lib.format.read_magic(member) == (1, 0)
            shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(member)
            assert (shape, fortran_order, dtype) == ((3, 4, 4, 3), False, np.uint8)
            assert member.read() == images.tobytes()
    export_adm_npz("mine", tmp_path / "truncated.npz", True, workspace, Console(quiet=True))
    with np.load(tmp_path / "truncated.npz") as file:
        np.testing.assert_array_equal(file["arr_0"], images - images % 2)


def test_memory_does_not_grow_with_the_number_of_images(tmp_path: Path) -> None:
    peaks = []
    for count in (64, 512):
        images = np.zeros((count, 64, 64, 3), np.uint8)
        workspace = published(tmp_path / f"ws{count}", images, np.zeros(count, np.int64), 16, {"images": count})
        tracemalloc.start()
        export_adm_npz("mine", tmp_path / f"{count}.npz", True, workspace, Console(quiet=True))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]


def test_what_is_no_samples_artifact_or_lacks_images_is_refused(finished: Rae, tmp_path: Path) -> None:
    where = ("-w", finished.workspace)
    finished("export", "adm-npz", "dit/tiny", tmp_path / "x.npz", *where).refused(2, "ADM's evaluator reads samples")
    finished("export", "adm-npz", "samples/tiny", tmp_path / "x", *where).refused(2, "must end in .npz")
    finished("export", "adm-npz", "samples/none", tmp_path / "x.npz", *where).refused(3, "no artifact `samples/none`")
    images = np.zeros((3, 4, 4, 3), np.uint8)
    published(tmp_path / "ws", images, np.zeros(3, np.int64), 2, {"images": 4})
    words = ("export", "adm-npz", "mine", tmp_path / "out.npz", "-w", tmp_path / "ws")
    finished(*words).refused(5, "holds 3 images, and its manifest says 4")
    assert not list(tmp_path.glob("*.npz"))
