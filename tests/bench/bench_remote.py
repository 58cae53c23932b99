"""Latents read from a bucket, against what else would read them: `python tests/bench/bench_remote.py`.

An S3 server (moto's) in a process of its own on loopback; latents of 768 x 16 x 16 float16 (384 KiB each) in shuffled
batches of 64. Cold: no cache, every latent from the server, by obstore's own concurrent range reads of the same bytes,
MosaicML streaming, tensorstore and zarr's object store row by row. Second epoch: from the cache, against the same store
on the local disk. Medians of interleaved rounds, as ratios of our throughput to theirs. It wants 3 GB of memory and of
disk, and `pip install obstore "moto[server]" tensorstore zarr mosaicml-streaming` for the readers of those names.
"""

import argparse
import asyncio
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import numpy as np
from rounds import interleaved, table
from stores import write_store

from rae.store.latents import LatentStore
from rae.store.mirror import Mirror, mirror_root
from rae.store.order import GlobalShuffle, batch_rows
from rae.store.remote import open_objects

SHAPE, BATCH = (768, 16, 16), 64
ROWS_PER_PART = 8  # 3 MB: moto reads a whole object for every range of it, which no real server does
LATENT_BYTES = int(np.prod(SHAPE)) * 2
PLACE, KEY = "s3://bench/rae", "objects/latents/0000000000000000"
SERVER = """
import logging, sys
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server
logging.getLogger("werkzeug").setLevel(logging.ERROR)
server = make_server("127.0.0.1", 0, DomainDispatcherApplication(create_backend_app), threaded=True)
print(server.server_port, flush=True)
server.serve_forever()
"""
Case = Callable[[], object]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--latents", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=None, help="where to write; a temporary folder by default")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=arguments.folder))
    try:
        with server() as port:
            measure(folder, port, arguments.latents, arguments.rounds)
    finally:
        shutil.rmtree(folder)


@contextmanager
def server() -> Iterator[int]:
    """The port of an S3 server that has a bucket `bench`; this process gets its credentials."""
    process = subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    port = int(process.stdout.readline())
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "S3_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "bench",
        "AWS_SECRET_ACCESS_KEY": "bench",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    urlopen(Request(f"http://127.0.0.1:{port}/bench", method="PUT")).close()
    try:
        yield port
    finally:
        process.terminate()
        process.wait()


def measure(folder: Path, port: int, count: int, rounds: int) -> None:
    latents = np.random.default_rng(0).standard_normal((count, *SHAPE), dtype=np.float32).astype(np.float16)
    write_store(folder / "ours", latents, ROWS_PER_PART)
    upload(folder / "ours", KEY)
    shuffled = [batch_rows(GlobalShuffle(count), BATCH, 0, 0, step) for step in range(count // BATCH)]
    os.environ |= {"RAE_CACHE": str(folder / "cache"), "RAE_CACHE_GB": "0"}
    cold: dict[str, Case] = {
        "rae": partial(read_all, mirrored(folder / "ours"), shuffled),
        "obstore, the same ranges": partial(ranges, addresses(folder / "ours", count), shuffled),
        "MosaicML streaming": mosaicml(folder, latents, count),
        "tensorstore": tensorstore(port, shuffled),
        "zarr's object store, row by row": zarr_rows(shuffled),
    }
    del latents
    report("shuffled batches of 64 from S3", interleaved(cold, rounds), count)
    os.environ |= {"RAE_CACHE": str(folder / "warm"), "RAE_CACHE_GB": "10"}
    store, local = mirrored(folder / "ours"), LatentStore(folder / "ours", raw=True)
    near: dict[str, Case] = {"rae": partial(read_all, store, shuffled), "local": partial(read_all, local, shuffled)}
    report("the same, second epoch: from the cache", interleaved(near, rounds), count)
    names = ("obstore", "moto", "zarr", "tensorstore", "mosaicml-streaming", "numpy")
    print("\n" + ", ".join(f"{name} {metadata.version(name)}" for name in names) + f"; {platform.platform()}")


def upload(folder: Path, key: str) -> None:
    objects = open_objects(PLACE)
    for path in folder.rglob("*"):
        if path.is_file():
            objects.create(f"{key}/{path.relative_to(folder)}", path.read_bytes())


def mirrored(local: Path) -> LatentStore:
    """The store in the bucket, as a workspace there would give it: tables in the cache, latents by range."""
    mirror = Mirror(open_objects(PLACE), KEY, mirror_root(PLACE) / KEY)
    shutil.copytree(local, mirror.folder, ignore=shutil.ignore_patterns("c"), dirs_exist_ok=True)
    mirror.begin(b"{}")
    (mirror.folder / "manifest.json").unlink()
    return LatentStore(mirror.folder, raw=True)


def read_all(store: LatentStore, batches: list[np.ndarray]) -> None:
    """As training reads: two threads make batches ahead."""
    from rae.stages.training.data import prefetch

    for _ in prefetch(lambda rows: store.rows(rows, 0), batches, 2):
        pass


def addresses(local: Path, count: int) -> list[tuple[str, int]]:
    """Object and offset of every row."""
    store = LatentStore(local)
    parts, places = store.places(np.arange(count))
    return [
        (f"{KEY}/{store.layout.shard_key(int(part))}", int(place) * LATENT_BYTES)
        for part, place in zip(parts, places, strict=True)
    ]


def ranges(where: list[tuple[str, int]], batches: list[np.ndarray]) -> None:
    """obstore's own concurrent range reads of the same bytes, a batch of 64 at a time and the next one ahead."""
    import obstore
    from obstore.store import from_url

    store = from_url(PLACE, client_options={"allow_http": True})

    async def read(rows: np.ndarray) -> list[Any]:
        wanted = (where[row] for row in rows.tolist())
        return await asyncio.gather(
            *(obstore.get_range_async(store, key, start=start, length=LATENT_BYTES) for key, start in wanted)
        )

    async def read_batches() -> None:
        ahead = None
        for rows in batches:
            task = asyncio.ensure_future(read(rows))
            if ahead is not None:
                await ahead
            ahead = task
        if ahead is not None:
            await ahead

    asyncio.run(read_batches())


def mosaicml(folder: Path, latents: np.ndarray, count: int) -> Case:
    from streaming import MDSWriter, StreamingDataset

    columns = {"latent": f"ndarray:float16:{','.join(map(str, SHAPE))}"}
    with MDSWriter(out=str(folder / "mds"), columns=columns, size_limit=ROWS_PER_PART * LATENT_BYTES) as writer:
        for latent in latents:
            writer.write({"latent": latent})
    objects = open_objects(PLACE)
    for path in (folder / "mds").iterdir():
        objects.create(f"mds/{path.name}", path.read_bytes())

    def read() -> None:
        from streaming.base.util import clean_stale_shared_memory

        clean_stale_shared_memory()
        local = folder / f"mds-{time.monotonic_ns()}"
        dataset = StreamingDataset(
            remote=f"{PLACE}/mds", local=str(local), shuffle=True, batch_size=BATCH, num_canonical_nodes=1
        )
        assert sum(1 for _ in dataset) == count
        del dataset
        shutil.rmtree(local)

    return read


def tensorstore(port: int, batches: list[np.ndarray]) -> Case:
    import tensorstore as ts

    endpoint: dict[str, Any] = {"endpoint": f"http://127.0.0.1:{port}", "aws_region": "us-east-1"}
    kvstore = {"driver": "s3", "bucket": "bench", "path": f"rae/{KEY}/latents/", **endpoint}

    def read() -> None:
        array = ts.open({"driver": "zarr3", "kvstore": kvstore}, open=True, read=True).result()
        ahead = None
        for rows in batches:
            future = array[ts.d[0][np.asarray(rows)]][:, 0].read()
            if ahead is not None:
                ahead.result()
            ahead = future
        if ahead is not None:
            ahead.result()

    return read


def zarr_rows(batches: list[np.ndarray]) -> Case:
    import zarr
    from obstore.store import from_url
    from zarr.storage import ObjectStore

    def read() -> None:
        store = ObjectStore(from_url(f"{PLACE}/{KEY}", client_options={"allow_http": True}), read_only=True)
        array: Any = zarr.open_array(store, path="latents", mode="r")
        for rows in batches:
            np.stack([array[int(row), 0] for row in rows])

    return read


def report(title: str, seconds: dict[str, float], count: int) -> None:
    size = count * LATENT_BYTES / 1e6
    lines = [
        [name, f"{size / taken:.0f}", f"{taken / seconds['rae']:.2f}"]
        for name, taken in sorted(seconds.items(), key=lambda item: item[1])
    ]
    print(table(title, ["reader", "MB/s", "rae is faster by"], lines), flush=True)


if __name__ == "__main__":
    main()
