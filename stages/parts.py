"""Parts of a latent store, from image files to published records: read, decode, encode and write at the same time.

A part is encoded in fixed batches, the last one padded, because convolution kernels change the last bits of a result
with the batch size; an image that cannot be used leaves a hole of zeros in its batch, so that its neighbours do not
change either. For the same reason a batch is computed by one thread on a CPU, as many batches at once as torch has
threads: the bits depend neither on the number of cores nor on what else they do, and nothing waits at barriers.

Memory holds a few batches, however many images there are.
"""

import hashlib
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from rae.stages.images import BadImage, center_crop, cut, decode, resize_shorter
from rae.stages.models.encoders import Encoder
from rae.stages.models.pixels import to_unit
from rae.stages.sections import EncodeSection
from rae.store.crops import CropLaw
from rae.store.latents_repair import EncodedRow
from rae.store.latents_writer import PartWriter
from rae.store.layout import LatentLayout, Part
from rae.store.part_record import IndexRow
from rae.store.shards import Source


@dataclass(frozen=True)
class Decoded:
    """One sample on its way to the encoder: its crops, uint8 [K, S, S, 3], or the reason why there are none."""

    row: int
    pixels: np.ndarray | None
    reason: str | None
    sha256: str | None
    width: int | None
    height: int | None


@dataclass(frozen=True)
class Batch:
    """The rows of the source that are encoded together, and the part that they belong to."""

    part: Part
    rows: range
    first_row: int  # of the part

    @property
    def begins_part(self) -> bool:
        return self.rows.start == self.first_row

    @property
    def ends_part(self) -> bool:
        return self.rows.stop == self.first_row + self.part.count


def write_parts(
    parts: Iterable[Part], section: EncodeSection, source: Source, encoder: Encoder, layout: LatentLayout, folder: Path
) -> Generator[tuple[int, bool], None, None]:
    """Encode `parts` of `source` into the store at `folder`, in order, each published as soon as it is whole.

    Yields, as batches are written, how many images each had and whether it ended its part. Whoever stops iterating
    drops the part that is at work; those before it stay. Raises `CorruptData` for a source shard that is not what its
    digest says.
    """
    on_cpu = encoder.device.type == "cpu"
    encoding = torch.get_num_threads() if on_cpu else 1
    verified: dict[int, Future[None]] = {}
    writer: PartWriter | None = None

    def write(batch: Batch, latents: "Future[tuple[list[Decoded], np.ndarray]]") -> None:
        nonlocal writer
        if batch.begins_part:
            writer = PartWriter(folder, layout, batch.part)
        assert writer is not None
        for sample, latent in zip(*latents.result(), strict=True):
            _write(writer, sample.row - batch.first_row, sample, latent, source)
        if batch.ends_part:
            verified[batch.part.source_shard].result()  # what the index said of its digest was a hint
            writer.publish()

    ahead: deque[tuple[Batch, Future[None]]] = deque()
    with (
        _torch_threads(1 if on_cpu else torch.get_num_threads()),
        ThreadPoolExecutor(max(1, section.workers), "decode") as decoders,
        ThreadPoolExecutor(encoding, "encode") as encoders,
        ThreadPoolExecutor(1, "write") as writers,  # one: rows are written in order
    ):
        try:
            for batch in _batches(parts, source, section.batch_size):
                if (shard := batch.part.source_shard) not in verified:
                    verified[shard] = decoders.submit(source.verify, source.shards[shard])
                samples = [decoders.submit(_decode_row, source, row, section) for row in batch.rows]
                latents = encoders.submit(_encode_batch, encoder, samples, section)
                ahead.append((batch, writers.submit(write, batch, latents)))
                del samples, latents  # a generator's variables live on while it waits
                if len(ahead) > encoding + 2:
                    yield _written(ahead)
            while ahead:
                yield _written(ahead)
        finally:
            for pool in (decoders, encoders, writers):
                pool.shutdown(wait=False, cancel_futures=True)
            writers.shutdown()
            if writer is not None:
                writer.abort()


def encode_again(
    part: Part, rows: Sequence[int], section: EncodeSection, source: Source, encoder: Encoder
) -> Iterator[EncodedRow]:
    """Some rows of a part, ascending, encoded in the batches in which they were encoded first: for repairs."""
    source.verify(source.shards[part.source_shard])
    on_cpu, wanted = encoder.device.type == "cpu", set(rows)
    threads = _torch_threads(1 if on_cpu else torch.get_num_threads())
    with threads, ThreadPoolExecutor(max(1, section.workers), "decode") as decoders:
        for batch in _batches([part], source, section.batch_size):
            places = range(batch.rows.start - batch.first_row, batch.rows.stop - batch.first_row)
            if wanted.isdisjoint(places):
                continue
            futures = [decoders.submit(_decode_row, source, row, section) for row in batch.rows]
            for place, sample, latent in zip(places, *_encode_batch(encoder, futures, section), strict=True):
                if place in wanted:
                    usable = latent if sample.reason is None else None
                    yield EncodedRow(usable, sample.reason, _index_row(sample, source))


def _written(ahead: deque[tuple[Batch, Future[None]]]) -> tuple[int, bool]:
    batch, written = ahead.popleft()
    written.result()
    return len(batch.rows), batch.ends_part


def _batches(parts: Iterable[Part], source: Source, batch_size: int) -> Iterator[Batch]:
    for part in parts:
        first = source.shards[part.source_shard].first + part.first_sample
        rows = range(first, first + part.count)
        for start in range(0, part.count, batch_size):
            yield Batch(part, rows[start : start + batch_size], first)


@contextmanager
def _torch_threads(count: int) -> Iterator[None]:
    """Let every operation of torch use so many threads within the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _decode_row(source: Source, row: int, section: EncodeSection) -> Decoded:
    reason = source.reason(row)
    if reason is not None:
        return Decoded(row, None, reason, None, None, None)
    data = source.read(row)
    digest = hashlib.sha256(data).hexdigest()
    try:
        image = decode(data, section.max_image_pixels)
        return Decoded(row, _crops(source, row, image, section), None, digest, image.width, image.height)
    except BadImage as bad:
        return Decoded(row, None, bad.reason, digest, None, None)


def _crops(source: Source, row: int, image: Image.Image, section: EncodeSection) -> np.ndarray:
    """The centre crop alone, or the random ones."""
    size = section.image_size
    if section.crops is None or section.resize_size is None:
        return center_crop(image, size)[None]
    shard = source.shard_of(row)
    law = CropLaw(section.seed, section.resize_size, size)
    (boxes,) = law.boxes(shard.sha256, [row - shard.first], [image.size], section.crops)
    resized = resize_shorter(image, section.resize_size)
    return np.stack([cut(resized, left, top, size) for left, top, _, _ in boxes.tolist()])


@torch.inference_mode()
def _encode_batch(
    encoder: Encoder, samples: list[Future[Decoded]], section: EncodeSection
) -> tuple[list[Decoded], np.ndarray]:
    """The samples of a batch, and their latents [B, V, C, H, W]: float16 where the store keeps that, else float32."""
    size = section.image_size
    pixels = np.zeros((section.crops or 1, section.batch_size, size, size, 3), np.uint8)
    batch = []
    for position, future in enumerate(samples):
        sample = future.result()
        if sample.pixels is not None:
            pixels[:, position] = sample.pixels
        batch.append(sample)
    device = encoder.device
    views = [to_unit(images, device) for images in pixels]
    if section.horizontal_flip and section.crops is None:
        views.append(views[0].flip(-1))
    with torch.autocast(device.type, torch.bfloat16, enabled=section.precision == "bf16"):
        tokens = torch.stack([encoder(view) for view in views], dim=1)
    kept = torch.float16 if section.dtype == "float16" else torch.float32
    return batch, tokens[: len(batch)].to(kept).cpu().numpy()


def _index_row(sample: Decoded, source: Source) -> IndexRow:
    label = int(source.labels[sample.row])
    return {
        "key": source.keys[sample.row],
        "label": label if label >= 0 else None,
        "sha256": sample.sha256,
        "width": sample.width,
        "height": sample.height,
    }


def _write(writer: PartWriter, position: int, sample: Decoded, latent: np.ndarray, source: Source) -> None:
    entry = _index_row(sample, source)
    if sample.reason is not None:
        writer.invalid(position, sample.reason, **entry)
    else:
        writer.write(position, latent, **entry)
