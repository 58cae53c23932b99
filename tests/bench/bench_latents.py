"""Reading latents, against what one would read them with otherwise: `python tests/bench/bench_latents.py`.

2,048 latents of 768 x 16 x 16 float16 (384 KiB each) in shuffled batches of 64 and in sequence; a warm and a cold page
cache; every reader in one process, medians of five interleaved rounds, as ratios of our throughput to theirs. It wants
6 GB of disk, and `pip install tensorstore zarr mosaicml-streaming` for the readers of those names.
"""

import argparse
import gc
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from rounds import drop_cache, interleaved, table
from stores import write_store

from rae.stages.training.dataset import LatentDataset
from rae.store.latents import LatentStore
from rae.store.order import GlobalShuffle, batch_rows

SHAPE, BATCH, PER_FILE = (768, 16, 16), 64, 512
LATENT_BYTES = int(np.prod(SHAPE)) * 2
WHITENED = "rae, whitened torch batches"
Read = Callable[[np.ndarray], object]
Batches = list[np.ndarray]


@dataclass(frozen=True)
class Reader:
    """`open` gives a function that reads all of `batches` (rows each), as training would: one batch after another."""

    files: list[Path]
    open: Callable[[], Callable[[Batches], None]]


def by_rows(open_rows: Callable[[], Callable[[np.ndarray], object]]) -> Callable[[], Callable[[Batches], None]]:
    """For readers that are asked for one batch at a time."""

    def open_() -> Callable[[Batches], None]:
        read = open_rows()

        def read_all(batches: Batches) -> None:
            for rows in batches:
                read(rows)

        return read_all

    return open_


def ours(folder: Path, latents: np.ndarray) -> dict[str, Reader]:
    write_store(folder, latents, rows_per_part=1024)
    files = sorted((folder / "latents" / "c").rglob("*"))
    files = [path for path in files if path.is_file()]

    def raw() -> Callable[[Batches], None]:
        store = LatentStore(folder, raw=True)
        return lambda batches: exhaust(store.batches(BATCH, seed=0, epoch=0))  # whose order `batches` is

    def ready() -> Callable[[Batches], None]:
        dataset = LatentDataset(LatentStore(folder))
        return lambda batches: exhaust(dataset.batches(BATCH, epoch=0))

    return {"rae": Reader(files, raw), WHITENED: Reader(files, ready)}


def exhaust(batches: Iterator[object]) -> None:
    for _ in batches:
        pass


def memory_map(folder: Path, latents: np.ndarray) -> Reader:
    path = folder / "latents.npy"
    np.save(path, latents)

    def open_() -> Read:
        array = np.load(path, mmap_mode="r")
        return lambda rows: array[rows]

    return Reader([path], by_rows(open_))


def pread(folder: Path, latents: np.ndarray, threads: int) -> Reader:
    path = folder / "latents.bin"
    path.write_bytes(latents.tobytes())

    def open_() -> Read:
        file = open(path, "rb", buffering=0)  # noqa: SIM115 - for the time of a round
        pool = ThreadPoolExecutor(threads)

        def read(rows: np.ndarray) -> np.ndarray:
            out = np.empty((len(rows), *SHAPE), np.float16)

            def one(place: int) -> None:
                os.preadv(file.fileno(), [out[place].reshape(-1).view(np.uint8)], int(rows[place]) * LATENT_BYTES)

            list(pool.map(one, range(len(rows))))
            return out

        return read

    return Reader([path], by_rows(open_))


def safetensors(folder: Path, latents: np.ndarray, kept_open: bool) -> Reader:
    """Shards of `PER_FILE` latents under one key, sliced by row, as LightningDiT keeps them."""
    from safetensors import safe_open
    from safetensors.numpy import save_file

    paths = [folder / f"{first:06d}.safetensors" for first in range(0, len(latents), PER_FILE)]
    for number, path in enumerate(paths):
        save_file({"latents": latents[number * PER_FILE : (number + 1) * PER_FILE]}, path)

    def open_() -> Read:
        def open_file(path: Path) -> Any:
            return safe_open(path, "np")

        opened = [open_file(path).get_slice("latents") for path in paths] if kept_open else None

        def one(row: int) -> np.ndarray:
            number, place = divmod(int(row), PER_FILE)
            piece = opened[number] if opened else open_file(paths[number]).get_slice("latents")
            return piece[place : place + 1][0]

        return lambda rows: np.stack([one(row) for row in rows])

    return Reader(paths, by_rows(open_))


def tensorstore(store: Path) -> Reader:
    import tensorstore as ts

    files = [path for path in (store / "latents" / "c").rglob("*") if path.is_file()]

    def open_() -> Read:
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(store / "latents")}}
        array = ts.open(spec, open=True, read=True).result()
        return lambda rows: array[ts.d[0][np.asarray(rows)]][:, 0].read().result()

    return Reader(files, by_rows(open_))


def zarr_python(store: Path) -> Reader:
    import zarr

    files = [path for path in (store / "latents" / "c").rglob("*") if path.is_file()]

    def open_() -> Read:
        array: Any = zarr.open_array(store / "latents", mode="r")
        return lambda rows: np.stack([array[int(row), 0] for row in rows])

    return Reader(files, by_rows(open_))


def mosaicml(folder: Path, latents: np.ndarray) -> Reader:
    from streaming import MDSWriter, StreamingDataset

    name = f"ndarray:float16:{','.join(map(str, SHAPE))}"
    with MDSWriter(out=str(folder / "mds"), columns={"latent": name}) as writer:
        for latent in latents:
            writer.write({"latent": latent})

    def open_() -> Read:
        data = StreamingDataset(local=str(folder / "mds"), batch_size=BATCH, shuffle=False)
        return lambda rows: np.stack([data[int(row)]["latent"] for row in rows])

    return Reader(list((folder / "mds").glob("*.mds")), by_rows(open_))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--latents", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=None, help="where to write; a temporary folder by default")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=arguments.folder))
    try:
        measure(folder, arguments.latents, arguments.rounds)
    finally:
        shutil.rmtree(folder)


def measure(folder: Path, count: int, rounds: int) -> None:
    latents = np.random.default_rng(0).standard_normal((count, *SHAPE), dtype=np.float32).astype(np.float16)
    for name in ("ours", "npy", "bin", "safetensors", "mds"):
        (folder / name).mkdir()
    readers = {
        **ours(folder / "ours", latents),
        "memory-mapped .npy": memory_map(folder / "npy", latents),
        "pread, 8 threads": pread(folder / "bin", latents, 8),
        "safetensors, kept open": safetensors(folder / "safetensors", latents, kept_open=True),
        "safetensors, reopened per item": safetensors(folder / "safetensors", latents, kept_open=False),
        "tensorstore": tensorstore(folder / "ours"),
        "MosaicML streaming": mosaicml(folder / "mds", latents),
        "zarr-python, row by row": zarr_python(folder / "ours"),
    }
    del latents
    shuffled = [batch_rows(GlobalShuffle(count), BATCH, 0, 0, step) for step in range(count // BATCH)]
    sequential = np.split(np.arange(count), count // BATCH)
    report("shuffled batches of 64, warm", warm(readers, shuffled, rounds), count)
    report("shuffled batches of 64, cold", cold(readers, shuffled, rounds), count)
    del readers[WHITENED]
    readers["rae"] = Reader(readers["rae"].files, by_rows(lambda: partial(LatentStore(folder / "ours").rows, views=0)))
    report("sequential, warm", warm(readers, sequential, rounds), count)
    names = ("zarr", "tensorstore", "safetensors", "mosaicml-streaming", "numpy", "torch")
    print("\n" + ", ".join(f"{name} {metadata.version(name)}" for name in names) + f"; {platform.platform()}")


def warm(readers: dict[str, Reader], batches: Batches, rounds: int) -> dict[str, float]:
    """Seconds of each reader, opened once: files in the page cache and mapped, as in a training that has begun."""
    opened = {name: reader.open() for name, reader in readers.items()}
    return interleaved({name: partial(read, batches) for name, read in opened.items()}, rounds)


def cold(readers: dict[str, Reader], batches: Batches, rounds: int) -> dict[str, float]:
    """Seconds of each reader, opened anew, of files that are not in the page cache."""
    cases = {name: partial(lambda reader: reader.open()(batches), reader) for name, reader in readers.items()}
    return interleaved(cases, rounds, {name: partial(forget, reader) for name, reader in readers.items()})


def forget(reader: Reader) -> None:
    gc.collect()  # nobody may have the files mapped
    drop_cache(reader.files)


def report(title: str, seconds: dict[str, float], count: int) -> None:
    size = count * LATENT_BYTES / 1e9
    lines = [
        [name, f"{size / taken:.2f}", f"{taken / seconds['rae']:.2f}"]
        for name, taken in sorted(seconds.items(), key=lambda item: item[1])
    ]
    print(table(title, ["reader", "GB/s", "rae is faster by"], lines), flush=True)


if __name__ == "__main__":
    main()
