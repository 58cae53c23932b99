"""Pictures for the report, from artifacts and sources to PNG data URIs. Nothing is chosen by how it looks."""

import base64
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rae.stages.images import BadImage, center_crop, decode
from rae.store.errors import CorruptData, RaeError
from rae.store.manifest import Artifact
from rae.store.shards import Source

Pixels = NDArray[np.uint8]

CLASSES_SHOWN = 12
IMAGES_PER_CLASS = 10
REAL_PER_CLASS = 4
PIXELATED_UP_TO = 64  # smaller pictures are shown enlarged, as the pixels that they are
_LARGEST_RECONSTRUCTION, _LARGEST_SAMPLE = 256, 160  # embedded no larger than they are shown


@dataclass(frozen=True)
class Pair:
    """An original beside what the decoder made of its latent, as data URIs."""

    original: str
    reconstruction: str
    psnr_db: float


@dataclass(frozen=True)
class ClassRow:
    """Pictures of one class as data URIs: generated ones, and real ones to compare."""

    name: str
    generated: list[str]
    real: list[str]


@dataclass(frozen=True)
class Gallery:
    """The samples that the report shows, and what it leaves out."""

    rows: list[ClassRow]
    classes: int
    images: int
    image_size: int


def data_uri(pixels: Pixels, largest: int) -> str:
    """A picture uint8 [H, W, 3] as a PNG, scaled down if it is larger than `largest` pixels a side."""
    image = Image.fromarray(pixels)
    image.thumbnail((largest, largest), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def read_pairs(scores: Artifact) -> tuple[list[Pair], int]:
    """The reconstructions that evaluation kept, and their size in pixels."""
    path = scores.payload / "reconstructions.npz"
    arrays = _read_arrays(path, "originals", "reconstructions")
    originals, made = (_checked(arrays[key], path) for key in ("originals", "reconstructions"))
    if originals.shape != made.shape:
        raise CorruptData(f"{path} holds originals of shape {originals.shape} and reconstructions of {made.shape}")
    uris = [[data_uri(pixels, _LARGEST_RECONSTRUCTION) for pixels in images] for images in (originals, made)]
    return [Pair(a, b, psnr) for a, b, psnr in zip(*uris, _psnr_db(originals, made), strict=True)], made.shape[1]


def read_noise_grid(scores: Artifact, levels: int) -> list[list[str]]:
    """Rows of pictures as data URIs: originals, then what the decoder made of their tokens at each level of noise."""
    path = scores.payload / "latent_noise.npz"
    arrays = _read_arrays(path, "originals", "reconstructions")
    originals, made = arrays["originals"], arrays["reconstructions"]
    if made.shape != (levels, *originals.shape):
        raise CorruptData(f"{path} holds pictures of shape {made.shape} for {levels} levels of {originals.shape}")
    return [[data_uri(pixels, _LARGEST_SAMPLE) for pixels in _checked(row, path)] for row in (originals, *made)]


def read_gallery(samples: Artifact, class_names: list[str] | None, source: Source | None) -> Gallery:
    """The first images of the first classes, by index; `source` gives real ones where it still can be read."""
    batches = sorted(samples.payload.glob("images/batch-*.npz"))
    labels_of = [_labels(path) for path in batches]
    labels = np.concatenate(labels_of) if batches else np.empty(0, np.int64)
    if not len(labels):
        raise CorruptData(f"{samples.payload} holds no images")
    conditional = class_names is not None or len(np.unique(labels)) > 1
    shown = np.unique(labels)[:CLASSES_SHOWN]
    count = IMAGES_PER_CLASS if len(shown) > 1 else 4 * IMAGES_PER_CLASS
    wanted = {int(label): np.flatnonzero(labels == label)[:count] for label in shown}
    pictures = _pictures(batches, labels_of, np.sort(np.concatenate(list(wanted.values()))))
    size = next(iter(pictures.values())).shape[0]
    rows = []
    for label, indices in wanted.items():
        name = _class_name(label, class_names) if conditional else ""
        real = list(_real(source, label if conditional else None, size)) if source is not None else []
        generated = [data_uri(pictures[int(index)], _LARGEST_SAMPLE) for index in indices]
        rows.append(ClassRow(name, generated, real))
    return Gallery(rows, classes=len(np.unique(labels)), images=len(labels), image_size=size)


def _class_name(label: int, names: list[str] | None) -> str:
    return names[label] if names is not None and label < len(names) else f"class {label}"


def _pictures(batches: list[Path], labels_of: list[NDArray[np.int64]], indices: NDArray[np.int64]) -> dict[int, Pixels]:
    """The images at `indices`, from the batches that hold them alone."""
    firsts = np.cumsum([0, *map(len, labels_of)])
    found: dict[int, Pixels] = {}
    for path, first, end in zip(batches, firsts[:-1], firsts[1:], strict=True):
        here = indices[(first <= indices) & (indices < end)]
        if len(here):
            images = _checked(_read_arrays(path, "images")["images"], path)
            if len(images) != end - first:
                raise CorruptData(f"{path} holds {len(images)} images and {end - first} labels")
            found |= {int(index): images[index - first] for index in here}
    return found


def _real(source: Source, label: int | None, size: int) -> Iterator[str]:
    """The first real images of a class (None: of any) that can be decoded, cropped as for training."""
    found = 0
    for row in range(len(source)) if label is None else np.flatnonzero(source.labels == label):
        if found == REAL_PER_CLASS:
            return
        if source.reason(int(row)) is not None:
            continue
        try:
            pixels = np.asarray(center_crop(decode(source.read(int(row))), size), np.uint8)
        except (BadImage, RaeError):
            continue  # a comparison that the report can do without
        found += 1
        yield data_uri(pixels, _LARGEST_SAMPLE)


def _labels(path: Path) -> NDArray[np.int64]:
    labels = _read_arrays(path, "labels")["labels"]
    if labels.ndim != 1 or labels.dtype.kind != "i":
        raise CorruptData(f"{path} holds labels of shape {labels.shape}, {labels.dtype}: a row of integers is needed")
    return labels.astype(np.int64)


def _checked(images: NDArray[np.generic], path: Path) -> Pixels:
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or not images.size:
        raise CorruptData(f"{path} holds {images.dtype} {images.shape}: uint8 [N, H, W, 3] is needed")
    return images.astype(np.uint8, copy=False)


def _read_arrays(path: Path, *names: str) -> dict[str, NDArray[np.generic]]:
    """Arrays of an npz file; only the named ones are read."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in names}
    except (OSError, ValueError, KeyError, BadZipFile) as error:
        raise CorruptData(f"{path} cannot be read ({error})") from error


def _psnr_db(originals: Pixels, made: Pixels) -> list[float]:
    """PSNR of each pair; 100 dB for equal ones, as in the scores."""
    error = np.square(originals / 255.0 - made / 255.0).mean(axis=(1, 2, 3))
    return [float(value) for value in -10 * np.log10(np.maximum(error, 1e-10))]
