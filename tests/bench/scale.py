"""The metadata of a store that no machine here could hold: how long it takes to write, open, and draw a first batch.

    python tests/bench/scale.py records FOLDER ROWS    write records as encoding does, and `finish` them
    python tests/bench/scale.py tables FOLDER ROWS     write what `finish` makes of them, without the records
    python tests/bench/scale.py open FOLDER            open it, draw the first batch, verify it quickly

100 million rows are 200,000 parts. Rows are made up and there are no latents. Prints seconds and megabytes as JSON.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

from rae.stages.peak_memory import peak_memory_bytes
from rae.store.latents import LatentStore
from rae.store.latents_finish import finish, write_parts_table
from rae.store.latents_index import INDEX_SCHEMA, SLOTS_PER_GROUP, TableWriter
from rae.store.layout import LatentLayout, Part
from rae.store.order import batch_rows
from rae.store.part_record import COLUMNS, PartRecord, content_digest, moments_path, record_path
from rae.store.stats import LatentStats, Moments

ROWS_PER_PART = 512
SMALL = LatentLayout(2, 4, 2, 2, ROWS_PER_PART)  # of the same metadata but for its statistics, 3 MB a part


def write_records(folder: Path, parts: int, layout: LatentLayout) -> list[Part]:
    """Records and statistics of full parts, a source shard each, and their shards as empty files of the right size."""
    plan = [Part(number, number, 0, ROWS_PER_PART, number * ROWS_PER_PART) for number in range(parts)]
    moments = Moments(ROWS_PER_PART * layout.views, np.zeros(layout.latent_shape), np.ones(layout.latent_shape))
    (folder / "parts").mkdir(parents=True)
    size = ROWS_PER_PART * layout.views * (layout.latent_bytes + 16) + 4
    random = np.random.default_rng(0)
    for part in plan:
        digests = random.bytes(32 * ROWS_PER_PART).hex()
        columns = {
            "key": [f"{part.first_slot + row:012d}" for row in range(ROWS_PER_PART)],
            "label": random.integers(0, 1000, ROWS_PER_PART).tolist(),
            "image_sha256": [digests[64 * row : 64 * (row + 1)] for row in range(ROWS_PER_PART)],
            "width": [500] * ROWS_PER_PART,
            "height": [375] * ROWS_PER_PART,
            "reason": [None] * ROWS_PER_PART,
        }
        record = PartRecord(
            part=part.number,
            source_shard=part.source_shard,
            first_sample=0,
            slots=ROWS_PER_PART,
            shard_key=layout.shard_key(part.number),
            bytes=size,
            sha256=digests[:64],
            scales_bytes=None,
            scales_sha256=None,
            compressor="none",
            statistics=str(moments_path(Path(), part.number)),
            statistics_sha256="0" * 64,
            row_crc32c=random.integers(0, 2**32, (ROWS_PER_PART, layout.views)).tolist(),
            index={name: columns[name] for name in COLUMNS},
        )
        moments_path(folder, part.number).write_bytes(moments.to_bytes())
        record_path(folder, part.number).write_text(record.to_json())
        write_hole(folder / record.shard_key, size)
    return plan


def write_tables(folder: Path, parts: int, layout: LatentLayout) -> None:
    """What `finish` would leave of such records: tables, statistics, metadata; and empty files for the parts."""
    content = content_digest(layout, ["0" * 64] * parts)
    folder.mkdir(parents=True)
    (folder / "latents").mkdir()
    for name, data in layout.metadata_files(parts * ROWS_PER_PART).items():
        (folder / name).write_bytes(data)
    count = parts * ROWS_PER_PART * layout.views
    stats = LatentStats(count, np.zeros(layout.latent_shape), np.ones(layout.latent_shape))
    (folder / "stats.npz").write_bytes(stats.to_bytes())
    random, per_group = np.random.default_rng(0), SLOTS_PER_GROUP // ROWS_PER_PART
    with TableWriter(folder / "index.parquet", INDEX_SCHEMA) as index:
        for first in range(0, parts, per_group):
            slots = np.arange(first * ROWS_PER_PART, min(first + per_group, parts) * ROWS_PER_PART)
            digests = random.bytes(32 * slots.size).hex()
            columns = {
                "slot": slots,
                "key": [f"{slot:012d}" for slot in slots],
                "label": random.integers(0, 1000, slots.size),
                "source_shard": slots // ROWS_PER_PART,
                "image_sha256": [digests[64 * row : 64 * (row + 1)] for row in range(slots.size)],
                "width": np.full(slots.size, 500),
                "height": np.full(slots.size, 375),
                "valid": np.full(slots.size, True),
                "reason": [None] * slots.size,
            }
            index.write(pa.table([pa.array(columns[one.name], one.type) for one in INDEX_SCHEMA], schema=INDEX_SCHEMA))
        index.publish(content)
    size = ROWS_PER_PART * layout.views * (layout.latent_bytes + 16) + 4
    line = {"first_sample": 0, "slots": ROWS_PER_PART, "rows": ROWS_PER_PART, "bytes": size, "content": "0" * 64}
    line |= dict.fromkeys(("sha256", "record_sha256", "source_sha256"), "0" * 64)
    line |= {"scales_bytes": None, "scales_sha256": None}
    lines = [line | {"part": number, "source_shard": number} for number in range(parts)]
    write_parts_table(folder / "parts.parquet", lines, content)
    (folder / "parts").mkdir()
    for number in range(parts):
        write_hole(folder / layout.shard_key(number), size)
        moments_path(folder, number).touch()
        record_path(folder, number).touch()


def write_hole(path: Path, size: int) -> None:
    """A file that is as long as a shard and takes no room."""
    path.parent.mkdir(parents=True)
    with open(path, "wb") as file:
        file.truncate(size)


def measure(folder: Path, batch_size: int = 1024) -> dict[str, float]:
    """Open the store, find where its first shuffled batch lies, and verify it quickly."""
    times = [time.perf_counter()]
    store = LatentStore(folder)
    times.append(time.perf_counter())
    opened_mb = peak_mb()
    rows = batch_rows(store.shuffle(), batch_size, seed=0, epoch=0, step=0)
    store.places(rows)
    times.append(time.perf_counter())
    batch_mb = peak_mb()
    problems = store.verify("quick")
    times.append(time.perf_counter())
    assert not problems, problems[0]
    names = ("open_seconds", "first_batch_seconds", "verify_quick_seconds")
    seconds = dict(zip(names, np.diff(times).round(3).tolist(), strict=True))
    return {"rows": len(store), **seconds, "open_mb": opened_mb, "first_batch_mb": batch_mb, "verify_mb": peak_mb()}


def peak_mb() -> float:
    """The most memory that this process has held."""
    return round(peak_memory_bytes() / 1e6, 1)


def main() -> None:
    command, folder = sys.argv[1], Path(sys.argv[2])
    parts = -(-int(float(sys.argv[3])) // ROWS_PER_PART) if command != "open" else 0
    began, before = time.perf_counter(), peak_mb()
    if command == "open":
        found = measure(folder)
    elif command == "tables":
        write_tables(folder, parts, SMALL)
        found = {"tables_seconds": round(time.perf_counter() - began, 1), "tables_mb": peak_mb() - before}
    else:
        plan = write_records(folder, parts, SMALL)
        written = time.perf_counter()
        finish(folder, SMALL, plan, [f"{part.number:064x}" for part in plan])
        seconds = {"records_seconds": written - began, "finish_seconds": time.perf_counter() - written}
        found = {name: round(value, 1) for name, value in seconds.items()} | {"finish_mb": peak_mb() - before}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
