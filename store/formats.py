"""The number formats of stored latents: what lies in the store for a latent, and the floats that it stands for.

    float16, float32    the numbers themselves, little-endian
    bfloat16            the upper 16 bits of a float32, kept as uint16, since Zarr has no type that every reader knows
    int8                codes in [-127, 127], and in a second array a float32 scale per latent and channel: code x scale

Encoding is deterministic: numpy rounds halves to even in every format. Whatever is missing reads as NaN: the fill value
is NaN, in bfloat16 its bits 0x7FC0; missing codes are -128 (no latent has that code), and missing scales NaN.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Dtype = Literal["float16", "float32", "bfloat16", "int8"]

CODES = 127  # largest code: symmetric, so that -z is stored as exactly minus what z is stored as
NO_CODE = -128
BFLOAT16_NAN = 0x7FC0


@dataclass(frozen=True)
class StoredArray:
    """One Zarr array of a store: its name below the store's folder, its numbers, and what missing ones read as.

    `channelwise` arrays have one number a channel in place of H x W.
    """

    name: str
    data_type: str
    fill_value: str | int
    attributes: tuple[tuple[str, str], ...] = ()
    channelwise: bool = False

    @property
    def dtype(self) -> np.dtype[Any]:
        """Little-endian, whatever the machine."""
        return np.dtype(self.data_type).newbyteorder("<")

    @property
    def fill(self) -> float | int:
        """The fill value as a number."""
        return float(self.fill_value) if isinstance(self.fill_value, str) else self.fill_value


ARRAYS: dict[Dtype, tuple[StoredArray, ...]] = {
    "float16": (StoredArray("latents", "float16", "NaN"),),
    "float32": (StoredArray("latents", "float32", "NaN"),),
    "bfloat16": (StoredArray("latents", "uint16", BFLOAT16_NAN, (("rae_dtype", "bfloat16"),)),),
    "int8": (
        StoredArray("latents", "int8", NO_CODE, (("rae_dtype", "int8"), ("scales", "scales"))),
        StoredArray("scales", "float32", "NaN", channelwise=True),
    ),
}


def encode(dtype: Dtype, latents: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], ...] | None:
    """What is stored of float latents [..., C, H, W], an array per `ARRAYS[dtype]`; None if that would not be finite.

    float16 in is cheapest for float16: numpy's conversion costs more than all the rest of writing.
    """
    if dtype in ("float16", "float32"):
        with np.errstate(over="ignore"):
            stored = np.ascontiguousarray(latents, dtype=ARRAYS[dtype][0].dtype)
        return (stored,) if all_finite(stored) else None
    with np.errstate(over="ignore"):
        values = np.ascontiguousarray(latents, dtype="<f4")
        if not all_finite(values):
            return None
        if dtype == "int8":
            codes, scales = _quantise(values)
            return (codes, scales) if all_finite(scales * np.float32(CODES)) else None
    bits = values.view("<u4")
    rounded = ((bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16).astype("<u2")  # to nearest, halves to even
    return (rounded,) if bool(((rounded & 0x7F80) != 0x7F80).all()) else None


def _quantise(values: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Codes int8 [..., C, H, W] and scales float32 [..., C, 1, 1]: a channel's largest magnitude has the code 127.

    Scales are rounded up to 17 significant bits, so that every product with a code is exact in float32: all readers
    get the same numbers, and quantising those again gives the same codes and scales.
    """
    largest = np.abs(values).max(axis=(-2, -1), keepdims=True)
    bits = (largest / np.float32(CODES)).astype("<f4").view("<u4")
    scales = ((bits + np.uint32(0x7F)) & np.uint32(0xFFFF_FF80)).view("<f4")
    codes = np.zeros_like(values)
    np.divide(values, scales, out=codes, where=scales > 0)  # a channel of zeros has the scale 0
    return np.rint(codes, out=codes).clip(-CODES, CODES).astype(np.int8), scales


def decode(
    dtype: Dtype, stored: tuple[npt.NDArray[Any], ...], out: npt.NDArray[np.float32] | None = None
) -> npt.NDArray[Any]:
    """The latents that stored arrays stand for: float16 for float16, float32 for every other format.

    Only bfloat16 and int8 are worked out, into `out` if it is given; the others are what is stored.
    """
    if dtype == "bfloat16":
        bits: npt.NDArray[np.uint32] = np.left_shift(
            stored[0], 16, out=out if out is None else out.view("<u4"), dtype="<u4"
        )
        return bits.view("<f4")
    if dtype == "int8":
        codes, scales = stored
        latents: npt.NDArray[np.float32] = np.multiply(codes, scales, out=out, dtype=np.float32)
        return latents
    return stored[0]


def all_finite(values: npt.NDArray[Any]) -> bool:
    """`np.isfinite(values).all()`, twenty times faster for float16: an exponent of all ones is inf or NaN."""
    bits = values.view(f"<u{values.dtype.itemsize}")
    exponent = bits.dtype.type(0x7C00 if values.dtype.itemsize == 2 else 0x7F80_0000)
    return bool((bits & exponent).max() != exponent)
