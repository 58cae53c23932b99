"""`rae encode`: every image once through the frozen encoder, into the latent store.

The unit of work is a part: consecutive samples of one source shard. Whoever takes a part writes and records it alone,
so processes, torchrun's ranks, dask's workers and a cluster's array tasks take them in any order; two that take the
same one agree on the first. Parts that an earlier store holds already are taken over instead of encoded.
"""

import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from rae.stages.job import NOTHING, Job, Result
from rae.stages.models.encoders import Encoder, describe, load_encoder
from rae.stages.models.geometry import input_size_for
from rae.stages.models.weights import EncoderSource
from rae.stages.parts import encode_again, write_parts
from rae.stages.sections import EncodeSection
from rae.stages.training.ranks import Ranks
from rae.store.conditioning import read_vectors, record_vectors
from rae.store.crops import CropLaw, record_boxes
from rae.store.errors import ConfigError, OthersAtWork
from rae.store.latents_finish import completed_parts, finish
from rae.store.latents_repair import EncodedRow
from rae.store.latents_takeover import EarlierParts
from rae.store.layout import LatentLayout, Part, plan_parts
from rae.store.part_record import is_recorded
from rae.store.publish import replace_bytes
from rae.store.shards import Source


class Encoding:
    """One source through one encoder: the parts that this makes, and the means to make any of them."""

    def __init__(self, section: EncodeSection, source: Source, encoder_source: EncoderSource, device: str) -> None:
        self._section, self._source, self._device = section, source, device
        self._encoder_source = encoder_source

    @cached_property
    def encoder(self) -> Encoder:
        input_size = input_size_for(self._encoder_source, self._section.image_size, self._section.encoder_input_size)
        return load_encoder(self._encoder_source, input_size, self._section.feature_index, self._device)

    @cached_property
    def layout(self) -> LatentLayout:
        height, width = self.encoder.grid
        views = self._section.views
        return LatentLayout(
            views=views,
            channels=self.encoder.token_dim,
            height=height,
            width=width,
            dtype=self._section.dtype,
            compressor=self._section.compressor,
            rows_per_part=self._section.rows_per_part or LatentLayout.default_rows_per_part(views),
            view_kind="crops" if self._section.crops else "flips",
        )

    @cached_property
    def parts(self) -> list[Part]:
        return plan_parts([shard.samples for shard in self._source.shards], self.layout.rows_per_part)

    def write(self, numbers: Sequence[int], job: Job, done: Callable[[int], None] = lambda images: None) -> None:
        """Encode the parts of these numbers, in this order, those that are recorded meanwhile left out.

        Calls `done` with numbers of images as they are written. Stops where `job` says so, between parts if it can.
        """
        parts = (self.parts[number] for number in numbers if not is_recorded(job.folder, number))
        with closing(write_parts(parts, self._section, self._source, self.encoder, self.layout, job.folder)) as written:
            for images, ends_part in written:
                done(images)
                if ends_part or job.stopping():
                    job.check_stop()

    def again(self, part: Part, rows: Sequence[int]) -> Iterator[EncodedRow]:
        """Rows of a part, encoded as they were first; for `rae.store.latents_repair`."""
        return encode_again(part, rows, self._section, self._source, self.encoder)

    def descriptions(self) -> dict[str, bytes]:
        """What users of the latents ask for, by file name: the encoder's description, class names if there are any."""
        values: dict[str, Any] = {"encoder.json": describe(self.encoder)}
        if self._source.classes is not None:
            values["classes.json"] = self._source.classes
        return {name: json.dumps(value, indent=1, sort_keys=True).encode() for name, value in values.items()}


def run(
    section: EncodeSection, source: Source, encoder_source: EncoderSource, job: Job, earlier: EarlierParts
) -> Result:
    """Encode what is missing of `source` and not in `earlier`, and describe the finished store.

    Raises `OthersAtWork` if `job` has only a share of the parts and some of the others are not done.
    """
    encoding, ranks = Encoding(section, source, encoder_source, job.device), Ranks.from_environment()
    vectors = read_vectors(Path(section.conditioning)) if section.conditioning is not None else None
    if vectors is not None and len(vectors) != len(source):
        raise ConfigError(
            f"`encode.conditioning` has {len(vectors)} vectors, and there are {len(source)} images: each needs its own"
        )
    layout, parts = encoding.layout, encoding.parts
    images_per_second = _write_missing(encoding, source, job, earlier, ranks)
    ranks.barrier()
    if missing := ranks.broadcast(len(parts) - len(completed_parts(job.folder, layout, parts))):
        raise OthersAtWork(missing, len(parts))
    if not ranks.is_main:
        return NOTHING
    summary = finish(job.folder, layout, parts, source.digests)
    metrics: dict[str, Any] = {
        "rows": summary.rows,
        "invalid_rows": summary.invalid_rows,
        "views": layout.views,
        "shape": list(layout.latent_shape),
        "classes": source.num_classes,
        "bytes": summary.bytes,
    }
    if images_per_second:
        metrics["images_per_second"] = round(images_per_second, 3)
    if summary.reasons:
        metrics["invalid_reasons"] = dict(summary.reasons)
    taken_over = earlier.taken_over(job.folder)
    provenance = {"parts_taken_over": taken_over} if taken_over else {}
    descriptions = encoding.descriptions()
    for name, data in descriptions.items():
        replace_bytes(job.folder / name, data)
    files_made = [*summary.files, *(job.folder / name for name in descriptions)]
    if vectors is not None:
        firsts = [shard.first for shard in source.shards]
        files_made.append(record_vectors(vectors, layout, parts, firsts, into=job.folder))
    if section.crops and section.resize_size:
        law = CropLaw(section.seed, section.resize_size, section.image_size)
        files_made.append(record_boxes(job.folder, layout, parts, source.digests, law, into=job.folder))
    return Result(summary.content, metrics, tuple(files_made), provenance)


def time_encoding(
    section: EncodeSection, source: Source, encoder_source: EncoderSource, device: str, batches: int = 12
) -> float:
    """Images a second, all their views counted as one: decoded, encoded and written to a temporary folder."""
    encoding = Encoding(section, source, encoder_source, device)
    given = encoding.parts, section, source, encoding.encoder, encoding.layout
    with tempfile.TemporaryDirectory() as folder, closing(write_parts(*given, Path(folder))) as written:
        began = now = time.perf_counter()
        images = 0
        for number, (count, _) in enumerate(islice(written, batches)):
            if number == 1:  # what came before was loading, and filling the queues
                began, images = now, 0
            images, now = images + count, time.perf_counter()
    return images / (now - began)


def _write_missing(encoding: Encoding, source: Source, job: Job, earlier: EarlierParts, ranks: Ranks) -> float:
    """See to it that this job's share of the parts is recorded; returns images a second, of all ranks, 0 if none."""
    layout, parts = encoding.layout, encoding.parts
    share, shares = job.share
    mine = parts[share::shares]
    if ranks.is_main:
        done = completed_parts(job.folder, layout, parts)
        earlier.take_over((part for part in mine if part.number not in done), job.folder, layout, source)
    # Agreed on, since parts appear meanwhile: ranks that counted for themselves would leave some to nobody.
    done = ranks.broadcast(completed_parts(job.folder, layout, parts))
    missing = [part.number for part in mine if part.number not in done][ranks.rank :: ranks.world_size]
    before, total = sum(part.count for part in mine if part.number in done), sum(part.count for part in mine)
    encoded, began = 0, time.monotonic()

    def report(images: int) -> None:
        nonlocal encoded
        encoded += images
        rate = encoded / (time.monotonic() - began)
        job.progress(before + encoded, total, "images", images_per_second=rate)

    if job.spread is None:
        encoding.write(missing, job, report)
    else:
        job.spread(missing, lambda number: report(parts[number].count), job.stopping)
        job.check_stop()
    return sum(ranks.gather(encoded / (time.monotonic() - began)))
