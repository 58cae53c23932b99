"""Writing latents with digests, against zarr-python's sharded write: `python tests/bench/bench_write.py`.

Processor time of the whole process per latent of 768 x 16 x 16 float16, medians of interleaved rounds. Ours writes each
latent as it comes, with its crc32c, the part's sha256, statistics and a flush to the disk; zarr-python is given a whole
shard at once, which is what it does best, with no digests and no flush.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import zarr
from rounds import table
from stores import write_store

from rae.store.stats import RunningStats

SHAPE, PER_SHARD = (768, 16, 16), 512


def ours(folder: Path, latents: np.ndarray) -> None:
    write_store(folder, latents, PER_SHARD)


def zarr_python(folder: Path, latents: np.ndarray) -> None:
    array = zarr.create_array(
        folder / "latents",
        shape=(len(latents), 1, *SHAPE),
        shards=(PER_SHARD, 1, *SHAPE),
        chunks=(1, 1, *SHAPE),
        dtype="float16",
        compressors=None,
        fill_value=np.nan,
    )
    for first in range(0, len(latents), PER_SHARD):
        array[first : first + PER_SHARD] = latents[first : first + PER_SHARD, None]


def statistics_alone(folder: Path, latents: np.ndarray) -> None:
    stats = RunningStats(SHAPE)
    for latent in latents:
        stats.add(latent)


def processor_seconds(write: Callable[[Path, np.ndarray], None], folder: Path, latents: np.ndarray) -> float:
    began = time.process_time()
    write(folder, latents)
    taken = time.process_time() - began
    shutil.rmtree(folder)
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--latents", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    generator = np.random.default_rng(0)
    latents = generator.standard_normal((arguments.latents, *SHAPE), dtype=np.float32).astype(np.float16)
    writers = {"rae": ours, "of which exact statistics": statistics_alone, "zarr-python": zarr_python}
    taken: dict[str, list[float]] = {name: [] for name in writers}
    for _ in range(arguments.rounds):
        for name, write in writers.items():
            folder = Path(tempfile.mkdtemp())
            taken[name].append(processor_seconds(write, folder, latents) / len(latents))
    medians = {name: statistics.median(seconds) for name, seconds in taken.items()}
    lines = [[name, f"{1e6 * each:.0f}", f"{each / medians['zarr-python']:.2f}"] for name, each in medians.items()]
    print(table("writing, processor time", ["writer", "us per latent", "of zarr-python's"], lines))


if __name__ == "__main__":
    main()
