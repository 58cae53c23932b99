"""Every flipped bit is found, and the row that it is in is named."""

import json
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rae.store.errors import CorruptData, RaeError
from rae.store.latents import LatentStore
from rae.store.latents_finish import LatentsSummary
from rae.store.latents_index import PARTS_FILE
from rae.store.latents_verify import verify
from rae.store.manifest import Manifest
from rae.store.zarr_shard import file_sha256

SHARD = "latents/c/0/0/0/0/0"


def flip_bit(path: Path, byte: int) -> None:
    data = bytearray(path.read_bytes())
    data[byte] ^= 1 << (byte % 8)
    path.write_bytes(data)


def publish(folder: Path, summary: LatentsSummary, content: str | None = None) -> None:
    files = [
        {"path": str(path.relative_to(folder)), "bytes": path.stat().st_size, "sha256": file_sha256(path)}
        for path in summary.files
    ]
    manifest = Manifest("latents", "some", {}, content or summary.content, {}, {}, files, metrics={})
    (folder / "manifest.json").write_bytes(manifest.to_json())


def test_a_whole_store_has_no_problems(tmp_path: Path, given) -> None:
    summary = given().write(tmp_path)
    store = LatentStore(tmp_path)
    assert store.verify("quick") == store.verify("full") == []
    publish(tmp_path, summary)
    assert store.verify("quick") == store.verify("full") == []


def test_a_flipped_bit_of_a_latent_is_found_with_its_row(tmp_path: Path, given) -> None:
    given().write(tmp_path)
    flip_bit(tmp_path / SHARD, 2 * 120 + 120 + 7)  # row 1, view 1, of 120 bytes each
    store = LatentStore(tmp_path)
    assert store.verify("quick") == []
    (problem,) = store.verify("full")
    assert (problem.slot, problem.view, problem.key) == (1, 1, "image-0001")
    assert problem.file == tmp_path / SHARD
    assert "slot 1, view 1 (`image-0001`)" in str(problem)


def test_rows_behind_a_hole_are_named_right(tmp_path: Path, given) -> None:
    given().write(tmp_path)
    flip_bit(tmp_path / SHARD, 4 * 120)  # slot 2 has no latent: the third row in the file is slot 3
    (problem,) = LatentStore(tmp_path).verify("full")
    assert (problem.slot, problem.view) == (3, 0)


@pytest.mark.parametrize("published", [True, False])
def test_flipped_bits_are_found_in_every_file(tmp_path: Path, given, published: bool) -> None:
    """Ten random bytes of each; without a manifest's digests a table may hide one in what no reader looks at."""
    summary = given(samples=(2, 2), rows_per_part=2, invalid=()).write(tmp_path)
    if published:
        publish(tmp_path, summary)
    random = np.random.default_rng(0)
    for path in summary.files:
        if not published and path.suffix in (".parquet", ".npz"):
            continue
        whole = path.read_bytes()
        for byte in random.choice(len(whole), 10).tolist():
            flip_bit(path, byte)
            try:
                found = [str(problem) for problem in LatentStore(tmp_path).verify("full")]
            except RaeError as error:  # the store does not even open
                found = [error.message]
            path.write_bytes(whole)
            named = any(path.name in problem for problem in found)
            assert named if published else found, f"{path} at byte {byte}: {found}"
    assert LatentStore(tmp_path).verify("full") == []


@pytest.mark.parametrize(
    "name", [SHARD, "parts/000000.json", "parts/000000.npz", "index.parquet", "stats.npz", "zarr.json"]
)
def test_missing_files_are_found_quickly(tmp_path: Path, given, name: str) -> None:
    given().write(tmp_path)
    store = LatentStore(tmp_path)
    (tmp_path / name).unlink()
    assert [problem.file for problem in store.verify("quick")] == [tmp_path / name]


def test_files_of_other_latents_are_found(tmp_path: Path, given) -> None:
    given().write(tmp_path / "a")
    given(seed=1).write(tmp_path / "b")
    (tmp_path / "b/index.parquet").rename(tmp_path / "a/index.parquet")
    (problem,) = LatentStore(tmp_path / "a").verify("quick")
    assert problem.file == tmp_path / "a/index.parquet"
    (tmp_path / "b" / "stats.npz").rename(tmp_path / "a" / "stats.npz")
    assert tmp_path / "a/stats.npz" in [problem.file for problem in LatentStore(tmp_path / "a").verify("full")]


def test_a_manifest_of_another_content_is_found_quickly(tmp_path: Path, given) -> None:
    summary = given().write(tmp_path)
    store = LatentStore(tmp_path)
    publish(tmp_path, summary, content="0" * 64)
    (problem,) = store.verify("quick")
    assert problem.file == tmp_path / "manifest.json"


@pytest.mark.parametrize("mode", ["quick", "full"])
def test_a_table_that_says_nothing_of_the_scales_is_named(tmp_path: Path, given, mode: str) -> None:
    store = given(dtype="int8")
    store.write(tmp_path)
    table = pq.read_table(tmp_path / PARTS_FILE)
    column = table.schema.get_field_index("scales_bytes")
    nothing = pa.nulls(table.num_rows, table.schema.field(column).type)
    pq.write_table(table.set_column(column, table.schema.field(column), nothing), tmp_path / PARTS_FILE)
    problems = verify(tmp_path, store.layout, mode)
    assert {problem.part for problem in problems if "says nothing of" in str(problem)} == set(range(len(store.parts)))


def test_a_record_that_was_rewritten_is_found(tmp_path: Path, given) -> None:
    given().write(tmp_path)
    path = tmp_path / "parts/000001.json"
    value = json.loads(path.read_bytes())
    value["index"]["label"][0] = 7
    path.write_text(json.dumps(value))
    (problem,) = LatentStore(tmp_path).verify("full")
    assert problem.file == path


def test_any_damage_to_the_index_is_named_and_never_a_traceback(tmp_path: Path, given) -> None:
    publish(tmp_path, given().write(tmp_path))
    path = tmp_path / "index.parquet"
    data = path.read_bytes()
    names = [data.index(b"image_sha256"), data.rindex(b"image_sha256")]  # of a column, no UTF-8 any more
    for place in [*names, *range(4, len(data), 97)]:
        path.write_bytes(data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :])
        store = LatentStore(tmp_path)
        assert {problem.file for problem in store.verify("full")} == {path}, place
        with suppress(CorruptData):  # or it is a byte that readers don't look at
            store.invalid_rows()
