"""Images that cannot be used, and unusual ones that can: decoded right or recorded, and no neighbour changes."""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rae.stages.sections import EncodeSection
from rae.store.latents import LatentStore
from rae.store.shards import open_source
from tests.conftest import Rae
from tests.stages.test_encode import DINOV2, png, run

SECTION = EncodeSection(
    encoder=str(DINOV2),
    image_size=32,
    encoder_input_size=28,
    horizontal_flip=False,
    batch_size=4,
    rows_per_part=6,
    dtype="float32",
    max_image_pixels=100_000,
)
COUNT, PLACE = 8, 2  # so many images; the one of this number is replaced
PIXELS = np.random.default_rng(5).integers(0, 256, (40, 48, 3), np.uint8)
Members = list[tuple[str, bytes]]


def encoded(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def members(image: bytes | None = None) -> Members:
    """The files of a set of clean images with labels; `image` in place of one of them."""
    images = [png(seed) for seed in range(COUNT)]
    if image is not None:
        images[PLACE] = image
    named = [((f"{row}.png", data), (f"{row}.cls", b"%d" % (row % 2))) for row, data in enumerate(images)]
    return [member for pair in named for member in pair]


def tar(files: Members) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in files:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def store_of(folder: Path, tar_bytes: bytes) -> LatentStore:
    folder.mkdir()
    (folder / "images.tar").write_bytes(tar_bytes)
    return run(folder / "latents", open_source(folder / "images.tar"), SECTION)


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> LatentStore:
    return store_of(tmp_path_factory.mktemp("clean") / "set", tar(members()))


def check_neighbours(store: LatentStore, clean: LatentStore, missing: int) -> None:
    """Every other image has the latent, label and key that it has in the clean set, to the bit."""
    kept = [row for row in range(COUNT) if row != missing]
    rows = [store.keys.index(str(row)) for row in kept]
    np.testing.assert_array_equal(store.rows(rows, 0), clean.rows(kept, 0))
    assert store.labels[rows].tolist() == clean.labels[kept].tolist()


def _truncated_jpeg() -> bytes:
    whole = encoded(Image.fromarray(PIXELS), "JPEG", quality=95)
    return whole[: len(whole) // 2]


BAD = {
    "truncated JPEG": (_truncated_jpeg(), "truncated or damaged"),
    "not an image": (b"<html>404 not found</html>" * 20, "not an image"),
    "zero bytes": (b"", "zero bytes"),
    "decompression bomb": (encoded(Image.new("1", (400, 400))), "decompression bomb: 400 x 400 pixels, at most 100000"),
    "floating point": (encoded(Image.fromarray(np.zeros((8, 8), np.float32)), "TIFF"), "floating-point"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_image_is_recorded_with_its_reason(case: str, clean: LatentStore, tmp_path: Path) -> None:
    image, reason = BAD[case]
    store = store_of(tmp_path / "set", tar(members(image)))
    [row] = store.invalid_rows()
    assert (row["key"], row["source_shard"]) == (str(PLACE), 0)
    assert row["reason"].startswith(reason)
    assert len(store) == COUNT - 1
    check_neighbours(store, clean, PLACE)


def _cmyk() -> tuple[bytes, Image.Image]:
    return encoded(Image.new("CMYK", (40, 40), (255, 0, 0, 0)), "TIFF"), Image.new("RGB", (40, 40), (0, 255, 255))


def _palette_with_alpha() -> tuple[bytes, Image.Image]:
    image = Image.new("P", (40, 40), 0)
    image.paste(1, (0, 0, 20, 40))
    image.putpalette([255, 0, 0, 0, 0, 255])
    expected = Image.new("RGB", (40, 40), (255, 0, 0))
    expected.paste((255, 255, 255), (0, 0, 20, 40))  # the transparent half lies on white
    return encoded(image, transparency=bytes([255, 0])), expected


def _sixteen_bits() -> tuple[bytes, Image.Image]:
    grey = PIXELS[..., 0]
    return encoded(Image.fromarray(grey.astype(np.uint16) * 257)), Image.fromarray(grey).convert("RGB")


def _rotated() -> tuple[bytes, Image.Image]:
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.fromarray(PIXELS)
    return encoded(image, exif=exif), image.transpose(Image.Transpose.ROTATE_270)


def _animated() -> tuple[bytes, Image.Image]:
    frames = [Image.new("RGB", (40, 40), colour) for colour in ("red", "lime")]
    return encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]), frames[0]


@pytest.mark.parametrize("case", [_cmyk, _palette_with_alpha, _sixteen_bits, _rotated, _animated])
def test_an_unusual_image_has_the_latent_of_the_plain_one(
    case: Callable[[], tuple[bytes, Image.Image]], clean: LatentStore, tmp_path: Path
) -> None:
    image, plain = case()
    store = store_of(tmp_path / "set", tar(members(image)))
    expected = store_of(tmp_path / "plain", tar(members(encoded(plain))))
    assert len(store) == COUNT
    assert store.invalid_rows() == []
    np.testing.assert_array_equal(store.rows(range(COUNT), 0), expected.rows(range(COUNT), 0))
    check_neighbours(store, clean, PLACE)


def without(files: Members, name: str) -> Members:
    return [member for member in files if member[0] != name]


BAD_TARS = {
    "missing label": (tar(without(members(), f"{PLACE}.cls")), PLACE),
    "missing image": (tar(without(members(), f"{PLACE}.png")), PLACE),
    "unreadable label": (tar([*without(members(), "7.cls"), ("7.cls", b"seven")]), 7),
    "truncated tar": (tar(members())[: -10240 - 700], 7),
}


@pytest.mark.parametrize("reason", BAD_TARS)
def test_a_bad_sample_of_a_tar_is_recorded_with_its_reason(reason: str, clean: LatentStore, tmp_path: Path) -> None:
    data, missing = BAD_TARS[reason]
    store = store_of(tmp_path / "set", data)
    assert [(row["key"], row["reason"]) for row in store.invalid_rows()] == [(str(missing), reason)]
    check_neighbours(store, clean, missing)


def test_of_a_duplicate_key_the_first_is_kept(clean: LatentStore, tmp_path: Path) -> None:
    files = members()
    store = store_of(tmp_path / "set", tar([*files[:6], ("0.png", png(99)), ("0.cls", b"1"), *files[6:]]))
    assert [(row["key"], row["reason"], row["slot"]) for row in store.invalid_rows()] == [("0", "duplicate key", 3)]
    assert len(store) == COUNT
    check_neighbours(store, clean, -1)


def test_inspect_shows_how_many_and_which(tmp_path: Path) -> None:
    files = without(members(b""), "5.cls")
    (tmp_path / "images.tar").write_bytes(tar([*files, ("8.png", b"no image"), ("8.cls", b"0")]))
    encode = SECTION.model_dump(mode="json")
    rae = Rae(tmp_path / "rae", {"shards": {"train": str(tmp_path / "images.tar")}, "encode": encode})
    assert "invalid_rows 3" in rae.verb("encode").succeeded().out
    shown = rae("inspect", "latents/tiny", "-w", rae.workspace).succeeded()
    expected = {"2": "zero bytes", "5": "missing label", "8": "not an image"}
    for key, reason in expected.items():
        assert f"invalid: {key} in source shard 0: {reason}" in shown.out + shown.err
    assert rae.artifact("latents/tiny")["metrics"]["invalid_rows"] == 3
    assert {row["key"]: row["reason"] for row in rae.artifact("latents/tiny")["invalid"]} == expected
