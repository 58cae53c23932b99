"""Lossless compression of stored latents, for archives: half of Zarr's readers know zstd and blosc, few know pcodec.

Each latent is compressed for itself, so that it can still be read alone; it no longer lies on a page boundary, and
reading it costs its decompression. Content digests are over what comes out, so that the same latents are the same
content however they are compressed.
"""

from functools import cache
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from rae.store.errors import ConfigError, MissingInput
from rae.store.formats import StoredArray

Compressor = Literal["none", "zstd", "blosc", "pcodec"]

_ZSTD = {"level": 3, "checksum": False}
_BLOSC = {"cname": "zstd", "clevel": 5, "blocksize": 0}
_PCODEC = {"level": 8, "mode_spec": "auto", "delta_spec": "none", "paging_spec": "equal_pages_up_to"}


def zarr_codecs(compressor: Compressor, array: StoredArray) -> list[dict[str, Any]]:
    """The codecs of an inner chunk as Zarr v3 metadata names them."""
    little_endian = {"name": "bytes", "configuration": {"endian": "little"}}
    if array.dtype.itemsize == 1:
        little_endian = {"name": "bytes"}
    if compressor == "pcodec":
        if array.dtype.itemsize == 1:
            raise ConfigError("`pcodec` compresses numbers of 16 bits and more; for int8 latents use `zstd`")
        return [{"name": "numcodecs.pcodec", "configuration": _PCODEC}]
    if compressor == "zstd":
        return [little_endian, {"name": "zstd", "configuration": _ZSTD}]
    if compressor == "blosc":
        shuffle = "shuffle" if array.dtype.itemsize > 1 else "noshuffle"
        configuration = {**_BLOSC, "typesize": array.dtype.itemsize, "shuffle": shuffle}
        return [little_endian, {"name": "blosc", "configuration": configuration}]
    return [little_endian]


def compress(compressor: Compressor, values: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """The bytes that are stored of a C-contiguous array."""
    if compressor == "none":
        return values.reshape(-1).view(np.uint8)
    return np.frombuffer(_codec(compressor, values.dtype.itemsize).encode(values), np.uint8)


def decompress(compressor: Compressor, data: npt.NDArray[np.uint8], out: npt.NDArray[Any]) -> None:
    """Fill `out`, one-dimensional, with the numbers that were compressed; `ValueError` where `data` is damaged."""
    if compressor == "none":
        out.view(np.uint8)[:] = data
        return
    try:
        _codec(compressor, out.dtype.itemsize).decode(data, out=out)
    except (RuntimeError, ValueError, TypeError) as error:
        raise ValueError(f"it is not what {compressor} compresses ({error})") from error


@cache
def _codec(compressor: Compressor, itemsize: int) -> Any:
    try:
        if compressor == "pcodec":
            from numcodecs.pcodec import PCodec

            return PCodec(**_PCODEC)
        import numcodecs
    except ImportError as error:
        raise MissingInput(
            f"latents compressed with {compressor} need a package that is not installed ({error.name})",
            "pip install 'rae-pipeline[compression]'",
        ) from error
    if compressor == "zstd":
        return numcodecs.Zstd(**_ZSTD)
    return numcodecs.Blosc(**_BLOSC, shuffle=numcodecs.Blosc.SHUFFLE if itemsize > 1 else numcodecs.Blosc.NOSHUFFLE)
