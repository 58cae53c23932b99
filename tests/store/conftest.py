"""Latent stores small enough to compare whole."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from rae.store.latents_finish import LatentsSummary, finish
from rae.store.latents_writer import PartWriter
from rae.store.layout import LatentLayout, Part, plan_parts
from rae.store.part_record import IndexRow, PartRecord


@dataclass(frozen=True)
class Given:
    """Source shards of samples with known latents [N, V, C, H, W] (N slots, NaN where there is none) and a plan."""

    layout: LatentLayout
    parts: list[Part]
    sources: list[str]
    latents: np.ndarray  # as the store gives them back
    invalid: frozenset[int]  # slots

    def entry(self, slot: int) -> IndexRow:
        labels = [None, 0, 1, 2]
        return {
            "key": f"image-{slot:04d}",
            "label": labels[slot % 4],
            "sha256": f"{slot:064x}",
            "width": None if slot in self.invalid else 640,
            "height": None if slot in self.invalid else 480,
        }

    def fill(self, writer: PartWriter, part: Part) -> None:
        for row in range(part.count):
            slot = part.first_slot + row
            if slot in self.invalid:
                writer.invalid(row, "not an image", **self.entry(slot))
            else:
                writer.write(row, self.latents[slot], **self.entry(slot))

    def write_part(self, folder: Path, number: int) -> PartRecord:
        with PartWriter(folder, self.layout, self.parts[number]) as writer:
            self.fill(writer, self.parts[number])
            return writer.publish()

    def write(self, folder: Path, order: Iterable[int] | None = None) -> LatentsSummary:
        for number in range(len(self.parts)) if order is None else order:
            self.write_part(folder, number)
        return finish(folder, self.layout, self.parts, self.sources)

    @property
    def valid_slots(self) -> np.ndarray:
        return np.flatnonzero(~np.isnan(self.latents[:, 0, 0, 0, 0]))


GivenMaker = Callable[..., Given]


def given_latents(
    samples: Sequence[int] = (5, 3, 4),
    rows_per_part: int = 4,
    shape: tuple[int, int, int, int] = (2, 3, 4, 5),
    dtype: str = "float16",
    invalid: Iterable[int] = (2, 9),
    seed: int = 0,
    compressor: str = "none",
) -> Given:
    views, channels, height, width = shape
    layout = LatentLayout(views, channels, height, width, rows_per_part, dtype, compressor)  # type: ignore[arg-type]
    parts = plan_parts(samples, rows_per_part)
    latents = np.full((len(parts) * rows_per_part, *shape), np.nan, "float16" if dtype == "float16" else "float32")
    for part in parts:
        numbers = np.random.default_rng([seed, part.number]).normal(0.5, 2, (part.count, *shape))
        stored = layout.encode(numbers)
        assert stored is not None
        latents[part.first_slot : part.first_slot + part.count] = layout.decode(stored)
    latents[list(invalid)] = np.nan
    sources = [f"{shard:02x}" * 32 for shard in range(len(samples))]
    return Given(layout, parts, sources, latents, frozenset(invalid))


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> GivenMaker:
    """Makes latents to be stored; by default 12 samples of 3 source shards in 4 parts, two of them invalid."""
    # These tests kill processes, never the machine: flushing to the disk would take nine tenths of their time.
    monkeypatch.setattr("os.fsync", lambda handle: None)
    return given_latents
