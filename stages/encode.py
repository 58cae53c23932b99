"""`rae encode`: every image once through the frozen encoder, into the latent store.

The unit of work is a part: consecutive samples of one source shard. A part is encoded in fixed batches, the last one
padded, because convolution kernels change the last bits of a result with the batch size; an image that cannot be used
leaves a hole of zeros in its batch, so that its neighbours do not change either.
"""

import hashlib
import json
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rae.stages.images import BadImage, center_crop, decode
from rae.stages.job import NOTHING, Job, Result
from rae.stages.models.encoders import Encoder, describe, load_encoder
from rae.stages.models.geometry import input_size_for
from rae.stages.models.pixels import to_unit
from rae.stages.models.weights import EncoderSource
from rae.stages.sections import EncodeSection
from rae.stages.training.ranks import Ranks
from rae.store.latents_finish import completed_parts, finish
from rae.store.latents_writer import PartWriter
from rae.store.layout import LatentLayout, plan_parts
from rae.store.part_record import IndexRow
from rae.store.publish import replace_bytes
from rae.store.shards import Source


@dataclass(frozen=True)
class Decoded:
    """One sample on its way to the encoder: pixels uint8 [S, S, 3], or the reason why there are none."""

    row: int
    pixels: np.ndarray | None
    reason: str | None
    sha256: str | None
    width: int | None
    height: int | None


def run(section: EncodeSection, source: Source, encoder_source: EncoderSource, job: Job) -> Result:
    """Encode what is missing of `source` and describe the finished store."""
    input_size = input_size_for(encoder_source, section.image_size, section.encoder_input_size)
    encoder = load_encoder(encoder_source, input_size, section.feature_index, job.device)
    height, width = encoder.grid
    views = 2 if section.horizontal_flip else 1
    layout = LatentLayout(
        views=views,
        channels=encoder.token_dim,
        height=height,
        width=width,
        dtype=section.dtype,
        compressor=section.compressor,
        rows_per_part=section.rows_per_part or LatentLayout.default_rows_per_part(views),
    )
    parts = plan_parts([shard.samples for shard in source.shards], layout.rows_per_part)
    ranks = Ranks.from_environment()
    # Agreed on, since parts appear meanwhile: ranks that counted for themselves would leave some to nobody.
    done = ranks.broadcast(completed_parts(job.folder, layout, parts))
    missing = [part for part in parts if part.number not in done][ranks.rank :: ranks.world_size]
    before, total, began = sum(part.count for part in parts if part.number in done), len(source), time.monotonic()

    def report(encoded: int) -> None:
        rate = encoded / (time.monotonic() - began)
        job.progress(before + encoded, total, "images", images_per_second=rate)

    encoded, verified = 0, set[str]()
    with ThreadPoolExecutor(max(1, section.workers), thread_name_prefix="decode") as pool:
        for part in missing:
            shard = source.shards[part.source_shard]
            if shard.name not in verified:
                source.verify(shard)  # what the index said of its digest was a hint
                verified.add(shard.name)
            first = shard.first + part.first_sample
            batches = _decoded_batches(source, range(first, first + part.count), section, pool)
            with PartWriter(job.folder, layout, part) as writer:
                for batch in batches:
                    latents = _encode_batch(encoder, batch, section)
                    for sample, latent in zip(batch, latents, strict=True):
                        _write(writer, sample.row - first, sample, latent, source)
                    encoded += len(batch)
                    report(encoded)
                    if job.stopping():
                        break  # the part is dropped, and encoded anew when the work goes on
                else:
                    writer.publish()
            job.check_stop()
    ranks.barrier()
    if not ranks.is_main:
        return NOTHING
    summary = finish(job.folder, layout, parts, source.digests)
    metrics: dict[str, Any] = {
        "rows": summary.rows,
        "invalid_rows": summary.invalid_rows,
        "views": views,
        "shape": [encoder.token_dim, height, width],
        "classes": source.num_classes,
        "bytes": summary.bytes,
    }
    if summary.reasons:
        metrics["invalid_reasons"] = dict(summary.reasons)
    return Result(summary.content, metrics, (*summary.files, *_describe(job.folder, encoder, source)))


def _describe(folder: Path, encoder: Encoder, source: Source) -> list[Path]:
    """Put beside the latents what their users ask for: the encoder's description, and class names if there are any."""
    texts: dict[str, Any] = {"encoder.json": describe(encoder)}
    if source.classes is not None:
        texts["classes.json"] = source.classes
    for name, value in texts.items():
        replace_bytes(folder / name, json.dumps(value, indent=1, sort_keys=True).encode())
    return [folder / name for name in texts]


def _decoded_batches(
    source: Source, rows: range, section: EncodeSection, pool: ThreadPoolExecutor
) -> Iterator[list[Decoded]]:
    """Batches of decoded samples in order, the next ones decoding while the encoder works."""
    ahead: deque[list[Future[Decoded]]] = deque()
    starts = iter(range(0, len(rows), section.batch_size))
    decode_row: Callable[[int], Decoded] = lambda row: _decode_row(source, row, section.image_size)  # noqa: E731
    while True:
        while len(ahead) < 3 and (start := next(starts, None)) is not None:
            ahead.append([pool.submit(decode_row, row) for row in rows[start : start + section.batch_size]])
        if not ahead:
            return
        yield [future.result() for future in ahead.popleft()]


def _decode_row(source: Source, row: int, size: int) -> Decoded:
    reason = source.reason(row)
    if reason is not None:
        return Decoded(row, None, reason, None, None, None)
    data = source.read(row)
    digest = hashlib.sha256(data).hexdigest()
    try:
        image = decode(data)
        return Decoded(row, center_crop(image, size), None, digest, image.width, image.height)
    except BadImage as bad:
        return Decoded(row, None, bad.reason, digest, None, None)


@torch.inference_mode()
def _encode_batch(encoder: Encoder, batch: list[Decoded], section: EncodeSection) -> np.ndarray:
    """Latents [B, V, C, H, W] of a batch padded to its full size: float16 where the store keeps that, else float32."""
    size = section.image_size
    pixels = np.zeros((section.batch_size, size, size, 3), np.uint8)
    for position, sample in enumerate(batch):
        if sample.pixels is not None:
            pixels[position] = sample.pixels
    device = encoder.device
    images = to_unit(pixels, device)
    views = [images, images.flip(-1)] if section.horizontal_flip else [images]
    with torch.autocast(device.type, torch.bfloat16, enabled=section.precision == "bf16"):
        tokens = torch.stack([encoder(view) for view in views], dim=1)
    return tokens[: len(batch)].float().cpu().numpy().astype("float16" if section.dtype == "float16" else "float32")


def _write(writer: PartWriter, position: int, sample: Decoded, latent: np.ndarray, source: Source) -> None:
    label = int(source.labels[sample.row])
    entry: IndexRow = {
        "key": source.keys[sample.row],
        "label": label if label >= 0 else None,
        "sha256": sample.sha256,
        "width": sample.width,
        "height": sample.height,
    }
    if sample.reason is not None:
        writer.invalid(position, sample.reason, **entry)
    else:
        writer.write(position, latent, **entry)
