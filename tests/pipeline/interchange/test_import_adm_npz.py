"""`rae import adm-npz`: moments taken at their word, from a file that nobody trusts."""

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rae.stages.scoring.frechet import Moments, frechet_distance
from rae.stages.scoring.reference_files import check_reference
from rae.stages.scoring.references import Reference
from rae.store.artifacts import Workspace
from rae.store.errors import StaleInput
from tests.conftest import Rae

FEATURES = np.random.default_rng(0).standard_normal((50, 6))
MU, SIGMA = FEATURES.mean(axis=0), np.cov(FEATURES, rowvar=False)
WHOLE = {"mu": MU, "sigma": SIGMA, "mu_s": MU[:4], "sigma_s": SIGMA[:4, :4]}
INCEPTION = {"name": "inception", "digest": "6726825d", "resize": "bilinear of TensorFlow 1.x to 299"}


@pytest.fixture
def adm(tmp_path: Path) -> Rae:
    return Rae(tmp_path / "rae")


def imported(rae: Rae, path: Path, *words: str) -> Any:
    options = words or ("--name", "adm", "--split", "train")
    return rae("import", "adm-npz", path, *options, "-w", rae.workspace)


def claimed_images(shape: tuple[int, ...], descr: str = "|u1") -> bytes:
    """The header of an array, of images by default, and nothing of what it promises."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": descr, "fortran_order": False, "shape": shape})
    return header.getvalue()


def written(path: Path, arrays: dict[str, np.ndarray], **members: bytes) -> Path:
    np.savez_compressed(path, **arrays)
    with zipfile.ZipFile(path, "a") as archive:
        for name, data in members.items():
            archive.writestr(f"{name}.npy", data)
    return path


def test_moments_become_a_reference_that_says_it_is_asserted(adm: Rae, tmp_path: Path) -> None:
    # More images than any memory holds, if they were read.
    file = written(tmp_path / "VIRTUAL.npz", WHOLE, arr_0=claimed_images((10**8, 256, 256, 3)))
    said = imported(adm, file).succeeded()
    assert "taken at its word" in said.out
    assert f"--make-reference train --images {file}" in said.out
    artifact = Workspace(adm.workspace).resolve("adm", "reference")
    reference = Reference.load(artifact)
    assert (reference.about.asserted, reference.about.image_size, reference.about.split) == (True, 256, "train")
    assert reference.features is None
    np.testing.assert_allclose(reference.moments.cov, SIGMA, rtol=1e-12)
    others = np.random.default_rng(1).standard_normal((50, 6)) + 0.5
    assert frechet_distance(reference.moments, others) == pytest.approx(
        frechet_distance(Moments.of(FEATURES), others), rel=1e-9
    )
    assert imported(adm, file, "--name", "again", "--split", "train", "--json").succeeded().json["reused"]


def test_what_the_file_does_not_say_is_no_difference_and_what_it_does_say_is(adm: Rae, tmp_path: Path) -> None:
    imported(adm, written(tmp_path / "adm.npz", WHOLE, arr_0=claimed_images((5, 256, 256, 3)))).succeeded()
    artifact = Workspace(adm.workspace).resolve("adm", "reference")
    check_reference(artifact, INCEPTION, "train", 256)
    for extractor, split, size, field in (
        ({**INCEPTION, "name": "efficientnet-lite0"}, "train", 256, "extractor.name: found"),
        (INCEPTION, "val", 256, 'split: found "train", asked "val"'),
        (INCEPTION, "train", 512, "image_size: found 256, asked 512"),
    ):
        with pytest.raises(StaleInput, match=field):
            check_reference(artifact, extractor, split, size)  # type: ignore[arg-type]
    imported(adm, written(tmp_path / "bare.npz", {"mu": MU, "sigma": SIGMA}), "--name", "bare", "--split", "val")
    check_reference(Workspace(adm.workspace).resolve("bare", "reference"), INCEPTION, "val", 512)


def test_a_file_of_images_alone_is_told_what_makes_a_reference_of_it(adm: Rae, tmp_path: Path) -> None:
    file = written(tmp_path / "images.npz", {}, arr_0=claimed_images((5, 8, 8, 3)))
    imported(adm, file).refused(2, "holds images and no moments", f"--make-reference train --images {file}")


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"mu": MU}, "`mu` and `sigma` are needed"),
        ({"mu": MU, "sigma": SIGMA[:5]}, "are no moments"),
        ({"mu": MU[:5], "sigma": SIGMA}, "are no moments"),
        ({"mu": MU.astype(int), "sigma": SIGMA}, "are no moments"),
        ({"mu": MU, "sigma": SIGMA * np.nan}, "not finite"),
        ({"mu": MU, "sigma": np.triu(SIGMA)}, "covariance that is none"),
        ({"mu": MU, "sigma": SIGMA, "mu_s": MU}, "`mu_s` and `sigma_s` are needed"),
        ({"mu": MU, "sigma": SIGMA, "arr_0": np.zeros((5, 8, 8))}, "`arr_0` float64 (5, 8, 8) holds no images"),
        ({"mu": MU, "sigma": np.array([{}])}, "are no moments"),
    ],
)
def test_arrays_that_are_no_moments_are_refused(
    adm: Rae, tmp_path: Path, arrays: dict[str, np.ndarray], said: str
) -> None:
    imported(adm, written(tmp_path / "bad.npz", arrays)).refused(5, said)
    assert not list(adm.workspace.rglob("manifest.json"))


def test_a_damaged_file_is_refused(adm: Rae, tmp_path: Path) -> None:
    file = written(tmp_path / "adm.npz", WHOLE)
    whole = file.read_bytes()
    for damaged in (b"", b"no archive", whole[:200], whole[: len(whole) // 2]):
        file.write_bytes(damaged)
        imported(adm, file).refused(5, "is no npz of ADM's, or is damaged")
    flipped = bytearray(whole)
    flipped[100] ^= 255
    file.write_bytes(flipped)
    imported(adm, file).refused(5, "adm.npz")
    imported(adm, tmp_path / "none.npz").refused(3, "there is no file")
    # A claim of more numbers than any memory holds is judged by its header.
    side = 10**6
    huge = {"mu": claimed_images((side,), "<f8"), "sigma": claimed_images((side, side), "<f8")}
    imported(adm, written(tmp_path / "huge.npz", {}, **huge)).refused(5, "are no moments of up to 8192 features")
