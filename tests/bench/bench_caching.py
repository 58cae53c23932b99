"""An epoch of transformer training from the store against encoding on the fly: `python tests/bench/bench_caching.py`.

Both train the production `Learner` on the same images. From the store, `rae train-dit`'s batches are read and whitened
ahead by two threads. On the fly, JPEGs are decoded and cropped ahead by two threads, and the encoder makes their tokens
in every step. DINOv2-B (random weights, 224 px, JPEGs of 256 px) feeds DiTDH-S and a small transformer. Wall time of
whole epochs, interleaved, in one process; the share of it that waits for data is what the trainer logs as `data_wait`.
An encode of both views says after how many epochs the store has paid for itself. It wants a machine that does nothing
else; `--images 16 --rounds 1 --only small` makes it short.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_encode import images as write_images
from bench_encode import random_dinov2_b
from rounds import interleaved, table

from rae.stages import encode
from rae.stages.images import center_crop, decode
from rae.stages.job import Beginning, Job
from rae.stages.models.encoders import Encoder, load_encoder
from rae.stages.models.pixels import to_unit
from rae.stages.sections import EncodeSection
from rae.stages.train_dit import Batch, prepare
from rae.stages.training.data import prefetch
from rae.stages.training.dry_run import Training
from rae.stages.training.metrics_log import Span
from rae.stages.training.sections import TrainDitSection
from rae.stages.training.whitening import Whitening
from rae.store.latents import LatentStore
from rae.store.latents_takeover import EarlierParts
from rae.store.shards import Source

ENCODE = EncodeSection(image_size=256, encoder_input_size=224, batch_size=8)
MODELS: dict[str, dict[str, Any]] = {
    "DiTDH-S": {"size": "S"},
    "small": {"hidden_size": (128, 768), "depth": (4, 1), "num_heads": (4, 12)},
}


class Epochs:
    """Epochs of one transformer from either source of batches, and how much of them is waiting for data."""

    def __init__(self, training: Training[Batch], encoder: Encoder, source: Source, store: LatentStore) -> None:
        self.training, self.encoder, self.source = training, encoder, source
        self.whitening, self.spans, self.epoch = Whitening(store.stats), {}, 0
        self.steps = len(store) // training.section.batch_size

    def train(self, name: str, ready: Callable[[int, int], Any], finish: Callable[[Any], Batch]) -> None:
        """One epoch; `ready` makes a batch ahead, in threads, and `finish` what the step itself must do for it."""
        span = self.spans.setdefault(name, Span())
        make = partial(ready, self.epoch)
        with closing(prefetch(make, range(self.steps), self.training.section.workers)) as batches:
            for step in range(self.steps):
                began = time.perf_counter()
                batch = next(batches)
                waited = time.perf_counter() - began
                self.training.learner.step(finish(batch), step)
                span.add(time.perf_counter() - began, waited)
        self.epoch += 1

    def stored(self) -> None:
        self.train("store", self.training.batch, lambda batch: batch)

    def on_the_fly(self) -> None:
        self.train("on the fly", self.pixels, self.encoded)

    def pixels(self, epoch: int, step: int) -> tuple[Batch, np.ndarray]:
        """The draws of a batch, and its images: what latents it reads beside them costs next to nothing."""
        batch = self.training.batch(epoch, step)
        rows = [int(key) for key in batch.keys]
        return batch, np.stack([center_crop(decode(self.source.read(row)), ENCODE.image_size) for row in rows])

    @torch.inference_mode()
    def tokens(self, pixels: np.ndarray) -> np.ndarray:
        return self.encoder(to_unit(pixels, "cpu")).numpy()

    def encoded(self, made: tuple[Batch, np.ndarray]) -> Batch:
        batch, pixels = made
        return Batch(self.whitening(self.tokens(pixels)), batch.y, batch.t, batch.noise, batch.rows, batch.keys_of)


def written(folder: Path, source: Source, encoder_source: Any) -> float:
    """Encode every image with both views; returns the seconds."""
    folder.mkdir()
    began = time.perf_counter()
    encode.run(ENCODE, source, encoder_source, Job(folder), EarlierParts())
    return time.perf_counter() - began


def trainings(store: Any, batch_size: int, only: str | None) -> Iterator[tuple[str, Training[Batch]]]:
    for name, sizes in {only: MODELS[only]}.items() if only else MODELS.items():
        section = TrainDitSection(steps=10**6, batch_size=batch_size, clip_grad=1.0, **sizes)
        yield name, prepare(section, store, Beginning(), "cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", choices=MODELS)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        source = write_images(folder / "shards", options.images, 256)
        encoder_source = random_dinov2_b(folder / "dinov2-b")
        once = written(folder / "latents", source, encoder_source)
        artifact = type("Latents", (), {"payload": folder / "latents"})
        encoder, rows = load_encoder(encoder_source, ENCODE.encoder_input_size), []
        for model, training in trainings(artifact, options.batch_size, options.only):
            epochs = Epochs(training, encoder, source, LatentStore(folder / "latents"))
            seconds = interleaved({"on the fly": epochs.on_the_fly, "store": epochs.stored}, options.rounds)
            saved = seconds["on the fly"] - seconds["store"]
            waits = [f"{epochs.spans[way].data_wait:.1%}" for way in seconds]
            cells = [f"{taken:.1f}" for taken in seconds.values()]
            ratio = f"{seconds['on the fly'] / seconds['store']:.2f}"
            rows.append([model, *cells, ratio, *waits, f"{once / saved:.1f}" if saved > 0 else "never"])
    header = [
        "model",
        "on the fly s",
        "store s",
        "times faster",
        "wait on the fly",
        "wait, store (< 2 %)",
        "even after",
    ]
    print(table(f"An epoch of {options.images} images, DINOv2-B at 224 px, batch {options.batch_size}", header, rows))
    print(f"\nencoding both views once took {once:.1f} s; even after: epochs until the store has paid for that")


if __name__ == "__main__":
    main()
