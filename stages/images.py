"""From the bytes of an image file to upright RGB pixels, and the crops of the paper's two trainings.

Files are untrusted: only formats that Pillow decodes by itself are opened (no PostScript, which would start another
program), the size is looked at before any pixel is unpacked, and whatever a decoder raises becomes `BadImage`.
"""

import io
import struct
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
MAX_PIXELS = 178_956_970  # Pillow's own limit: half a GiB of RGB

# How files of each format begin, and the suffix under which a shard holds them.
_SIGNATURES = (
    (b"\xff\xd8\xff", "jpg"),
    (b"\x89PNG\r\n\x1a\n", "png"),
    (b"GIF8", "gif"),
    (b"BM", "bmp"),
    (b"II*\0", "tif"),
    (b"MM\0*", "tif"),
    (b"\0\0\0\x0cjP  ", "jp2"),
)


class BadImage(Exception):
    """These bytes give no picture; `reason` says why in a few words."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def sniff(data: bytes) -> str | None:
    """The usual suffix of an image file (`jpg`, `png`, `webp`), by its first bytes; None for anything else."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    if data[4:12] in (b"ftypavif", b"ftypavis"):
        return "avif"
    return next((suffix for signature, suffix in _SIGNATURES if data.startswith(signature)), None)


def decode(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """An image file's bytes as an upright RGB image; of an animation, the first frame.

    The EXIF orientation is applied; transparency is laid on white; 16-bit grey is divided by 257 and rounded; CMYK and
    palettes are converted. Raises `BadImage`: "zero bytes", "not an image", "truncated or damaged", "decompression
    bomb" (more than `max_pixels`, or than Pillow's own limit) or "floating-point pixels", with particulars.
    """
    if not data:
        raise BadImage("zero bytes")
    try:
        image = Image.open(io.BytesIO(data), formats=_formats())
        if image.width * image.height > max_pixels:
            raise BadImage(f"decompression bomb: {image.width} x {image.height} pixels, at most {max_pixels} allowed")
        image.load()
        _turn_upright(image)
        return _to_rgb(image)
    except (BadImage, MemoryError):
        raise
    except UnidentifiedImageError as error:
        known = sniff(data)
        raise BadImage(f"truncated or damaged {known}" if known else "not an image") from error
    except Image.DecompressionBombError as error:
        raise BadImage(f"decompression bomb: more than {MAX_PIXELS} pixels") from error
    except Exception as error:  # decoders of broken files raise OSError, SyntaxError, ValueError, struct.error, ...
        raise BadImage(f"truncated or damaged {sniff(data) or 'image'}: {error}") from error


def mode_of(data: bytes) -> str:
    """How Pillow holds an image file's pixels (`RGB`, `L`, `RGBA`, `P`), by its header; raises `BadImage`."""
    try:
        with Image.open(io.BytesIO(data), formats=_formats()) as image:
            return image.mode
    except Exception as error:  # as in `decode`
        raise BadImage("not an image") from error


def center_crop(image: Image.Image, size: int) -> NDArray[np.uint8]:
    """The centre `size` x `size` of an RGB image, scaled so that its shorter side fits: uint8 [size, size, 3].

    ADM's crop (guided-diffusion, `center_crop_arr`), pixel for pixel: halved by box averaging while the shorter side is
    at least twice `size`, then bicubic. Raises `BadImage` for an image so thin that scaling it would not fit memory.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = _resize(image, round(image.width * scale), round(image.height * scale))
    return cut(image, (image.width - size) // 2, (image.height - size) // 2, size)


def resized_crop(image: Image.Image, resize_size: int, size: int, u: tuple[float, float]) -> NDArray[np.uint8]:
    """A random `size` x `size` crop after bicubic scaling of the shorter side to `resize_size`: uint8 [size, size, 3].

    `u` are two uniform numbers in [0, 1) for left and top; every position is equally likely. Decoder training takes
    384 and 256 (OFFICIAL: resize, then random crop). Raises `BadImage` as `center_crop` does, ValueError if
    `resize_size` is less than `size`.
    """
    if resize_size < size:
        raise ValueError(f"a crop of {size} does not fit images resized to {resize_size}")
    image = resize_shorter(image, resize_size)
    left, top = (int(share * (side - size + 1)) for share, side in zip(u, image.size, strict=True))
    return cut(image, left, top, size)


def resize_shorter(image: Image.Image, resize_size: int) -> Image.Image:
    """The image scaled, bicubic, so that its shorter side is `resize_size`; raises `BadImage` as `center_crop` does."""
    short = min(image.size)
    return _resize(image, resize_size * image.width // short, resize_size * image.height // short)


def cut(image: Image.Image, left: int, top: int, size: int) -> NDArray[np.uint8]:
    """`size` x `size` pixels of an RGB image: uint8 [size, size, 3]."""
    return np.array(image.crop((left, top, left + size, top + size)))


@cache
def _formats() -> tuple[str, ...]:
    """The formats of `_FORMATS` that this build of Pillow knows."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _turn_upright(image: Image.Image) -> None:
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except (OSError, SyntaxError, ValueError, TypeError, KeyError, struct.error):
        return  # EXIF that can't be read says nothing about the orientation; the pixels are fine


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # I;16 and its byte orders; I is how Pillow holds 16-bit PGM and some PNG
        values = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise BadImage("floating-point pixels, whose range is unknown")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")


def _resize(image: Image.Image, width: int, height: int) -> Image.Image:
    if width * height > MAX_PIXELS:
        raise BadImage(f"too elongated: {image.width} x {image.height} pixels")
    return image.resize((width, height), Image.Resampling.BICUBIC)
