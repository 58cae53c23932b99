"""Decoding of every kind of file that a data set of real images holds, and the crops."""

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image, features

from rae.stages.images import BadImage, center_crop, decode, resized_crop, sniff


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def picture(height: int = 40, width: int = 60) -> Image.Image:
    """A smooth RGB gradient: red to the right, green downwards."""
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.stack([x * 255 // (width - 1), y * 255 // (height - 1), np.full_like(x, 90)], axis=-1)
    return Image.fromarray(pixels.astype(np.uint8))


def reason(data: bytes, **options: int) -> str:
    with pytest.raises(BadImage) as caught:
        decode(data, **options)
    assert str(caught.value) == caught.value.reason
    return caught.value.reason


# ---- what can be decoded, is decoded right --------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_formats_come_back_exactly(format: str) -> None:
    decoded = decode(encoded(picture(), format))
    assert decoded.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(decoded), np.asarray(picture()))


@pytest.mark.parametrize(
    ("format", "suffix"), [("JPEG", "jpg"), ("WEBP", "webp"), ("AVIF", "avif"), ("JPEG2000", "jp2")]
)
def test_lossy_formats_come_back_closely(format: str, suffix: str) -> None:
    if format == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    data = encoded(picture(), format, quality=95) if format != "JPEG2000" else encoded(picture(), format)
    assert sniff(data) == suffix
    difference = np.abs(np.asarray(decode(data)).astype(int) - np.asarray(picture()))
    assert difference.mean() < 6


def test_cmyk_becomes_the_same_colours() -> None:
    decoded = decode(encoded(picture().convert("CMYK"), "JPEG", quality=100))
    assert np.abs(np.asarray(decoded).astype(int) - np.asarray(picture())).mean() < 4


def test_transparency_is_laid_on_white() -> None:
    layer = Image.new("RGBA", (4, 1))
    for place, colour in enumerate([(255, 0, 0, 255), (255, 0, 0, 0), (0, 0, 0, 51), (0, 0, 255, 255)]):
        layer.putpixel((place, 0), colour)
    expected = [[[255, 0, 0], [255, 255, 255], [204, 204, 204], [0, 0, 255]]]
    assert np.asarray(decode(encoded(layer, "PNG"))).tolist() == expected
    grey = Image.new("LA", (1, 1), (0, 51))
    assert np.asarray(decode(encoded(grey, "PNG"))).tolist() == [[[204, 204, 204]]]


def test_a_palette_with_alpha_is_laid_on_white() -> None:
    image = Image.new("P", (3, 1))
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    for place in range(3):
        image.putpixel((place, 0), place)
    whole = encoded(image, "PNG", transparency=bytes([255, 0, 51]))
    assert np.asarray(decode(whole)).tolist() == [[[255, 0, 0], [255, 255, 255], [204, 204, 255]]]
    one = encoded(image, "GIF", transparency=1)
    assert np.asarray(decode(one)).tolist() == [[[255, 0, 0], [255, 255, 255], [0, 0, 255]]]


def test_a_transparent_colour_of_an_rgb_png_is_white() -> None:
    image = Image.new("RGB", (2, 1), (10, 20, 30))
    image.putpixel((1, 0), (1, 2, 3))
    assert np.asarray(decode(encoded(image, "PNG", transparency=(1, 2, 3)))).tolist() == [[[10, 20, 30], [255] * 3]]


@pytest.mark.parametrize("format", ["PNG", "TIFF", "PPM"])
def test_16_bit_grey_is_scaled_not_clipped(format: str) -> None:
    values = np.array([[0, 128, 129, 257, 32768, 65406, 65407, 65535]], np.uint16)
    decoded = np.asarray(decode(encoded(Image.fromarray(values), format)))
    assert decoded.shape == (1, 8, 3)
    assert decoded[0, :, 0].tolist() == [0, 0, 1, 1, 128, 254, 255, 255]
    assert (decoded == decoded[..., :1]).all()


def test_one_bit_and_grey_images() -> None:
    image = Image.new("1", (2, 1))
    image.putpixel((0, 0), 1)
    assert np.asarray(decode(encoded(image, "PNG"))).tolist() == [[[255] * 3, [0] * 3]]
    assert np.asarray(decode(encoded(Image.new("L", (1, 1), 77), "PNG"))).tolist() == [[[77] * 3]]


@pytest.mark.parametrize(("orientation", "turned"), [(1, None), (3, "ROTATE_180"), (6, "ROTATE_270"), (5, "TRANSPOSE")])
def test_exif_orientation_is_applied(orientation: int, turned: str | None) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    expected = picture() if turned is None else picture().transpose(Image.Transpose[turned])
    decoded = decode(encoded(picture(), "PNG", exif=exif))
    assert decoded.size == expected.size
    np.testing.assert_array_equal(np.asarray(decoded), np.asarray(expected))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_broken_exif_does_not_make_a_bad_image() -> None:
    decoded = decode(encoded(picture(), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff rubbish"))
    assert decoded.size == (60, 40)


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP"])
def test_of_an_animation_the_first_frame(format: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if format == "WEBP" else {}
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:], duration=100, **options)
    assert np.asarray(decode(data))[0, 0].tolist() == [255, 0, 0]


# ---- what can't, says why -------------------------------------------------------------------------------------------


def test_zero_bytes() -> None:
    assert reason(b"") == "zero bytes"


@pytest.mark.parametrize("data", [b"<html>404 not found</html>" * 50, b"\0" * 2000, b"{}", bytes(range(256)) * 8])
def test_not_an_image(data: bytes) -> None:
    assert reason(data) == "not an image"


def test_postscript_is_not_run() -> None:
    assert reason(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n") == "not an image"


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
def test_truncated_files(format: str, share: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    data = encoded(Image.fromarray(noise), format)
    assert reason(data[: int(len(data) * share)]).startswith("truncated or damaged")


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_flipped_bytes_give_pixels_or_a_reason(format: str) -> None:
    """Nothing but `BadImage` ever escapes, whatever the decoder thinks of the damage."""
    data = encoded(picture(), format)
    random = np.random.default_rng(1)
    reasons = []
    for _ in range(60):
        broken = bytearray(data)
        for place in random.integers(0, len(data), 3):
            broken[place] = random.integers(0, 256)
        try:
            assert decode(bytes(broken), max_pixels=1_000_000).mode == "RGB"
        except BadImage as error:
            reasons.append(error.reason)
    assert all(reasons)


def _png_of(width: int, height: int) -> bytes:
    """A PNG of a few bytes that announces many pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_decompression_bombs_are_refused_before_they_unpack() -> None:
    assert reason(_png_of(40_000, 40_000)).startswith("decompression bomb")
    assert reason(_png_of(2_000, 1_001), max_pixels=2_000_000) == (
        "decompression bomb: 2000 x 1001 pixels, at most 2000000 allowed"
    )
    assert decode(encoded(picture(), "PNG"), max_pixels=2400).size == (60, 40)


def test_floating_point_pixels_have_no_known_range() -> None:
    data = encoded(Image.fromarray(np.zeros((2, 2), np.float32)), "TIFF")
    assert reason(data).startswith("floating-point pixels")


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "BMP", "TIFF"])
def test_sniff_knows_the_formats(format: str) -> None:
    assert sniff(encoded(picture(), format)) == {"JPEG": "jpg", "TIFF": "tif"}.get(format, format.lower())
    assert sniff(b"<html>") is None
    assert sniff(b"") is None


# ---- crops ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(8, 8), (32, 32), (33, 70), (500, 131), (64, 64), (1, 9)])
def test_center_crop_gives_the_size_asked_for(height: int, width: int) -> None:
    cropped = center_crop(picture(max(height, 2), max(width, 2)), 32)
    assert cropped.shape == (32, 32, 3)
    assert cropped.dtype == np.uint8
    assert cropped.flags.writeable


def test_center_crop_takes_the_centre() -> None:
    cropped = center_crop(picture(32, 96), 32).astype(int)
    expected = np.asarray(picture(32, 96))[:, 32:64]
    np.testing.assert_array_equal(cropped, expected)


def test_needles_are_refused() -> None:
    with pytest.raises(BadImage, match="too elongated: 1 x 4000"):
        center_crop(Image.new("RGB", (1, 4000)), 256)


def test_resized_crop_reaches_every_corner_and_nothing_beyond() -> None:
    image = picture(48, 72)  # not scaled, so that crops can be compared with the original
    pixels = np.asarray(image)
    np.testing.assert_array_equal(resized_crop(image, 48, 32, (0.0, 0.0)), pixels[:32, :32])
    last = np.nextafter(1.0, 0.0)
    np.testing.assert_array_equal(resized_crop(image, 48, 32, (last, last)), pixels[16:, 40:])
    np.testing.assert_array_equal(resized_crop(image, 48, 48, (0.5, 0.5)), pixels[:, 12:60])


def test_resized_crop_agrees_with_torchvision() -> None:
    transforms = pytest.importorskip("torchvision.transforms.functional")
    image = picture(50, 77)
    resized = transforms.resize(image, 40, interpolation=transforms.InterpolationMode.BICUBIC)
    left, top = int(0.3 * (resized.width - 32 + 1)), int(0.8 * (resized.height - 32 + 1))
    expected = np.asarray(transforms.crop(resized, top, left, 32, 32))
    np.testing.assert_array_equal(resized_crop(image, 40, 32, (0.3, 0.8)), expected)


def test_resized_crop_positions_are_uniform() -> None:
    image = picture(32, 36)
    marks = np.asarray(image)[0, :, 0].tolist()
    lefts = [
        marks.index(resized_crop(image, 32, 32, (u, 0.5))[0, 0, 0]) for u in np.linspace(0, 1, 500, endpoint=False)
    ]
    assert np.bincount(lefts).tolist() == [100] * 5


def test_a_crop_larger_than_the_image_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="crop of 64"):
        resized_crop(picture(), 32, 64, (0.0, 0.0))
