"""Images from everywhere are the same images, read a few at a time; what cannot be scored is told in a sentence."""

import zipfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rae.stages.images import center_crop
from rae.stages.scoring.image_sets import ArrayImages, ImageSet, Rows, SampleImages, SourceImages, usable_blocks
from rae.stages.scoring.npz_images import NpzImages
from rae.store.errors import CorruptData, MissingInput, StaleInput
from rae.store.samples import SampleBatch, batch_path, write_batch
from rae.store.shards import open_source
from rae.store.shards_writer import ShardWriter

COUNT = 23


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (COUNT, 12, 12, 3), dtype=np.uint8)


def in_samples(pictures: np.ndarray, folder: Path) -> ImageSet:
    (folder / "images").mkdir(parents=True)
    for number, first in enumerate(range(0, COUNT, 5)):
        images = pictures[first : first + 5]
        labels = np.arange(first, first + len(images))
        write_batch(batch_path(folder, number), SampleBatch(images, labels, np.zeros((len(images), 54), np.uint8)))
    return SampleImages(folder, "digest")


def in_folder(pictures: np.ndarray, folder: Path) -> ImageSet:
    folder.mkdir()
    for number, image in enumerate(pictures):
        Image.fromarray(image).save(folder / f"{number:06d}.png")
    return SourceImages(open_source(folder))


def in_shards(pictures: np.ndarray, folder: Path) -> ImageSet:
    folder.mkdir()
    with ShardWriter(folder, "val", classes=["a", "b"]) as writer:
        for number, image in enumerate(pictures):
            writer.add(f"k{number:03d}", png(image), "png", number % 2)
    return SourceImages(open_source(folder / "val-*.tar"), 12)


def in_npz(pictures: np.ndarray, folder: Path) -> ImageSet:
    folder.mkdir()
    np.savez(folder / "a.npz", pictures, np.arange(COUNT))
    return NpzImages(folder / "a.npz")


def in_compressed_npz(pictures: np.ndarray, folder: Path) -> ImageSet:
    folder.mkdir()
    np.savez_compressed(folder / "a.npz", arr_0=pictures)
    return NpzImages(folder / "a.npz")


def png(image: np.ndarray, mode: str = "RGB") -> bytes:
    buffer = BytesIO()
    Image.fromarray(image).convert(mode).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("made", [in_samples, in_folder, in_shards, in_npz, in_compressed_npz])
def test_every_form_of_a_set_gives_its_images_in_any_order(made, pictures: np.ndarray, tmp_path: Path) -> None:
    images = made(pictures, tmp_path / "set")
    assert len(images.labels) == COUNT
    for rows in (range(COUNT), [22, 3, 3, 17, 0], range(4, 7), [0]):
        pixels, usable = images.read(rows)
        np.testing.assert_array_equal(pixels, pictures[list(rows)])
        assert usable.all()
    again = made(pictures, tmp_path / "again")
    assert again.digest == images.digest


def test_labels_come_with_the_images(pictures: np.ndarray, tmp_path: Path) -> None:
    assert in_samples(pictures, tmp_path / "samples").labels.tolist() == list(range(COUNT))
    assert in_npz(pictures, tmp_path / "npz").labels.tolist() == list(range(COUNT))
    assert in_compressed_npz(pictures, tmp_path / "compressed").labels.tolist() == [-1] * COUNT
    shards = in_shards(pictures, tmp_path / "shards")
    some = Rows(shards, np.array([5, 2]))
    assert some.labels.tolist() == [1, 0]
    np.testing.assert_array_equal(some.read([1, 0])[0], pictures[[2, 5]])
    assert some.digest != Rows(shards, np.array([2, 5])).digest != shards.digest


def test_every_usable_image_of_shards_is_scored_and_no_other(tmp_path: Path) -> None:
    pixels = [np.full((20, 24, 3), 40 * number, np.uint8) for number in range(3)]
    with ShardWriter(tmp_path, "val", classes=["a", "b"]) as writer:
        for number, image in enumerate(pixels):
            writer.add(f"k{number}", b"broken" if number == 1 else png(image), "png", number % 2)
    images = SourceImages(open_source(tmp_path / "val-*.tar"), 16)
    read, usable = images.read(range(3))
    assert usable.tolist() == [True, False, True]
    assert not read[1].any()
    np.testing.assert_array_equal(read[::2], [center_crop(Image.fromarray(pixels[row]), 16) for row in (0, 2)])
    ((kept, labels),) = usable_blocks(images)
    assert len(kept) == 2
    assert labels.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("mode", "what"), [("L", "grayscale"), ("RGBA", "RGB with transparency"), ("P", "palette colour")]
)
def test_generated_images_of_another_kind_are_named(pictures: np.ndarray, tmp_path: Path, mode: str, what: str) -> None:
    images = in_folder(pictures, tmp_path / "set")
    (tmp_path / "set/000007.png").write_bytes(png(pictures[7], mode))
    images = SourceImages(open_source(tmp_path / "set"))
    images.read(range(7))
    with pytest.raises(StaleInput, match=f"`000007` is {what}, and images to be scored are 8-bit RGB"):
        images.read(range(5, 9))


def test_generated_images_of_mixed_sizes_are_named(pictures: np.ndarray, tmp_path: Path) -> None:
    in_folder(pictures, tmp_path / "set")
    (tmp_path / "set/000007.png").write_bytes(png(pictures[7, :10]))
    images = SourceImages(open_source(tmp_path / "set"))
    with pytest.raises(StaleInput, match="`000000` has 12 x 12 pixels, and `000007` has 12 x 10"):
        images.read(range(5, 9))
    with pytest.raises(StaleInput, match="has 12 x 10"):
        images.read([7])


def test_a_generated_image_that_is_broken_is_named(pictures: np.ndarray, tmp_path: Path) -> None:
    in_folder(pictures, tmp_path / "set")
    (tmp_path / "set/000007.png").write_bytes(b"no image")
    with pytest.raises(CorruptData, match="`000007` gives no image: not an image"):
        SourceImages(open_source(tmp_path / "set")).read(range(9))


@pytest.mark.parametrize(
    ("array", "what"),
    [
        (np.zeros((4, 8, 8, 3)), "float64"),
        (np.zeros((4, 8, 8), np.uint8), r"\(4, 8, 8\)"),
        (np.zeros((4, 8, 8, 4), np.uint8), r"\(4, 8, 8, 4\)"),
        (np.zeros((0, 8, 8, 3), np.uint8), r"\(0, 8, 8, 3\)"),
    ],
)
def test_an_array_that_holds_no_rgb_images_is_refused(array: np.ndarray, what: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", array)
    with pytest.raises(StaleInput, match=f"`arr_0` of .*a.npz is .*{what}"):
        NpzImages(tmp_path / "a.npz")
    if array.shape != (0, 8, 8, 3):
        with pytest.raises(StaleInput, match="images are uint8"):
            ArrayImages(array)


def test_an_npz_that_is_damaged_is_named(pictures: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    with pytest.raises(MissingInput, match=r"a\.npz is not there"):
        NpzImages(path)
    path.write_bytes(b"no zip at all")
    with pytest.raises(CorruptData, match=r"a\.npz is no npz with images under `arr_0`"):
        NpzImages(path)
    np.savez(path, other=pictures)
    with pytest.raises(CorruptData, match="arr_0"):
        NpzImages(path)
    np.savez(path, pictures, np.arange(3))
    with pytest.raises(StaleInput, match="not a label for each image"):
        NpzImages(path)
    with zipfile.ZipFile(path, "w") as archive:
        buffer = BytesIO()
        np.save(buffer, pictures)
        archive.writestr("arr_0.npy", buffer.getvalue()[:-500])
    with pytest.raises(CorruptData, match="says that it holds 23 images, and is too short"):
        NpzImages(path).read(range(COUNT))


def test_a_flipped_bit_in_an_npz_does_not_go_unseen(pictures: np.ndarray, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", pictures)
    data = bytearray((tmp_path / "a.npz").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "a.npz").write_bytes(data)
    with pytest.raises(CorruptData, match="is damaged"):
        NpzImages(tmp_path / "a.npz").read(range(COUNT))


def test_an_npz_is_not_taken_at_its_word_about_its_length(tmp_path: Path) -> None:
    def npy(shape: tuple[int, ...], dtype: str, data: bytes) -> bytes:
        buffer = BytesIO()
        np.lib.format.write_array_header_1_0(buffer, {"descr": dtype, "fortran_order": False, "shape": shape})
        return buffer.getvalue() + data

    def written(**members: bytes) -> Path:
        with zipfile.ZipFile(tmp_path / "forged.npz", "w") as archive:
            for name, data in members.items():
                archive.writestr(f"{name}.npy", data)
        return tmp_path / "forged.npz"

    with pytest.raises(CorruptData, match="holds 1000000000000 images, and is too short for them"):
        NpzImages(written(arr_0=npy((10**12, 8, 8, 3), "|u1", bytes(192))))
    images = npy((2, 8, 8, 3), "|u1", bytes(384))
    with pytest.raises(StaleInput, match="not a label for each image"):
        NpzImages(written(arr_0=images, arr_1=npy((10**12,), "<i8", bytes(16))))
    with pytest.raises(CorruptData, match="is no npz with images"):
        NpzImages(written(arr_0=images, arr_1=npy((2,), "<i8", bytes(7))))
    assert NpzImages(written(arr_0=images, arr_1=npy((2,), "<i8", bytes(16)))).labels.tolist() == [0, 0]
