"""The files of the store: what other implementations read from them, and what happens when writers die or meet."""

import json
import multiprocessing
import os
import resource
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import zarr

from rae.store.errors import CorruptData, MissingInput, PartialResult
from rae.store.latents import LatentStore
from rae.store.latents_finish import completed_parts, finish
from rae.store.latents_writer import PartWriter
from rae.store.publish import publish_file
from rae.store.zarr_shard import file_sha256

SHARD = "latents/c/{}/0/0/0/0"


def files(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): file_sha256(path) for path in folder.rglob("*") if path.is_file()}


# ---- format ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("views", [1, 2])
def test_zarr_python_reads_the_same_values(tmp_path: Path, given, dtype: str, views: int) -> None:
    latents = given(dtype=dtype, shape=(views, 3, 4, 5))
    latents.write(tmp_path)
    array = zarr.open_group(tmp_path, mode="r")["latents"]
    assert array.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(array[:], latents.latents)  # NaN equals NaN here: padding and invalid rows
    assert np.isnan(array[2]).all()  # invalid
    assert np.isnan(array[7]).all()  # padding


def test_tensorstore_reads_the_same_values(tmp_path: Path, given) -> None:
    tensorstore = pytest.importorskip("tensorstore")
    latents = given()
    latents.write(tmp_path)
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{tmp_path}/latents"}}
    array = tensorstore.open(spec, read=True, open=True).result()
    np.testing.assert_array_equal(array.read().result(), latents.latents)


def test_latents_of_whole_pages_lie_on_page_boundaries(tmp_path: Path, given) -> None:
    latents = given(samples=(3,), shape=(2, 8, 16, 16), invalid=(1,))  # 4096 bytes each
    record = latents.write_part(tmp_path, 0)
    raw = (tmp_path / SHARD.format(0)).read_bytes()
    assert len(raw) == record.bytes == 4 * 4096 + 4 * 2 * 16 + 4
    stored = latents.latents[[0, 2]]
    assert raw[: 4 * 4096] == stored.tobytes()
    index = np.frombuffer(raw[4 * 4096 : -4], "<u8").reshape(4, 2, 2)
    assert index[[0, 2], :, 0].tolist() == [[0, 4096], [8192, 12288]]
    assert (index[[1, 3]] == 2**64 - 1).all()


def test_the_index_has_a_line_per_slot(tmp_path: Path, given) -> None:
    latents = given()
    latents.write(tmp_path)
    table = pq.read_table(tmp_path / "index.parquet")
    lines = table.to_pylist()
    assert [line["slot"] for line in lines] == list(range(16))
    assert lines[1] == {
        "slot": 1,
        "key": "image-0001",
        "label": 0,
        "source_shard": 0,
        "image_sha256": f"{1:064x}",
        "width": 640,
        "height": 480,
        "valid": True,
        "reason": None,
    }
    assert (lines[2]["valid"], lines[2]["key"], lines[2]["reason"]) == (False, "image-0002", "not an image")
    assert (lines[7]["valid"], lines[7]["key"], lines[7]["reason"]) == (False, None, "padding")
    assert lines[4]["label"] is None
    assert np.array_equal(np.flatnonzero(table["valid"].to_numpy()), latents.valid_slots)
    parts = pq.read_table(tmp_path / "parts.parquet").to_pylist()
    assert [(part["slots"], part["rows"]) for part in parts] == [(4, 3), (1, 1), (3, 2), (4, 4)]
    assert [part["source_sha256"] for part in parts] == [latents.sources[shard] for shard in (0, 0, 1, 2)]


def test_the_summary_counts_and_lists_the_files_of_the_whole_store(tmp_path: Path, given) -> None:
    summary = given(dtype="int8").write(tmp_path)
    assert (summary.rows, summary.invalid_rows, summary.reasons) == (10, 2, {"not an image": 2})
    assert summary.bytes == sum(path.stat().st_size for path in tmp_path.glob("*/c/*/0/0/0/0"))
    of_parts = {path for folder in ("parts", "latents/c", "scales/c") for path in (tmp_path / folder).rglob("*")}
    assert sorted(summary.files) == sorted({path for path in tmp_path.rglob("*") if path.is_file()} - of_parts)


# ---- parts in any order ----------------------------------------------------------------------------------------------


def test_bytes_do_not_depend_on_the_order_of_parts(tmp_path: Path, given) -> None:
    latents = given()
    first = latents.write(tmp_path / "a")
    second = latents.write(tmp_path / "b", order=[3, 1, 0, 2])
    assert first.content == second.content
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_finishing_twice_changes_nothing(tmp_path: Path, given) -> None:
    latents = given()
    first = latents.write(tmp_path)
    before = files(tmp_path)
    assert finish(tmp_path, latents.layout, latents.parts, latents.sources) == first
    assert files(tmp_path) == before


def test_content_follows_values_and_index_but_not_files(tmp_path: Path, given) -> None:
    content = given().write(tmp_path / "a").content
    assert given(seed=1).write(tmp_path / "b").content != content
    assert given(invalid=(2,)).write(tmp_path / "c").content != content
    assert given(dtype="float32").write(tmp_path / "d").content != content


def test_unfinished_parts_are_named(tmp_path: Path, given) -> None:
    latents = given()
    assert completed_parts(tmp_path, latents.layout, latents.parts) == set()
    latents.write_part(tmp_path, 2)
    assert completed_parts(tmp_path, latents.layout, latents.parts) == {2}
    with pytest.raises(MissingInput, match="part 0"):
        finish(tmp_path, latents.layout, latents.parts, latents.sources)
    with pytest.raises(CorruptData, match=r"000002\.json"):
        completed_parts(tmp_path, latents.layout, latents.parts[:2])
    (tmp_path / SHARD.format(2)).unlink()
    with pytest.raises(MissingInput, match=SHARD.format(2)):
        completed_parts(tmp_path, latents.layout, latents.parts)


def test_a_part_of_another_plan_is_refused(tmp_path: Path, given) -> None:
    given(samples=(5, 3, 4)).write(tmp_path)
    other = given(samples=(5, 2, 5), invalid=())
    with pytest.raises(CorruptData, match=r"000002\.json.*slots: 3, planned 2"):
        finish(tmp_path, other.layout, other.parts, other.sources)


def test_a_store_without_a_valid_row_is_refused_with_the_reasons(tmp_path: Path, given) -> None:
    with pytest.raises(CorruptData, match=r"none of the 3 images gave a latent \(3 x not an image\)"):
        given(samples=(3,), invalid=(0, 1, 2)).write(tmp_path)
    with pytest.raises(MissingInput, match="no samples"):
        finish(tmp_path, given().layout, [], [])


# ---- rows ------------------------------------------------------------------------------------------------------------


def test_a_latent_that_float16_cannot_hold_becomes_an_invalid_row(tmp_path: Path, given) -> None:
    latents = given(samples=(3,), invalid=())
    with PartWriter(tmp_path, latents.layout, latents.parts[0]) as writer:
        good = latents.latents[0].astype(np.float32)
        assert writer.write(0, good, **latents.entry(0))
        assert not writer.write(1, good * 1e5, **latents.entry(1))
        assert not writer.write(2, np.where(good == good.max(), np.nan, good), **latents.entry(2))
        record = writer.publish()
    assert record.index["reason"] == [None] + ["the latent is not finite in float16"] * 2
    assert finish(tmp_path, latents.layout, latents.parts, latents.sources).rows == 1
    assert np.isfinite(LatentStore(tmp_path).stats.variance).all()


def test_rows_come_in_order_and_all_of_them(tmp_path: Path, given) -> None:
    latents = given(samples=(3,), invalid=())
    with PartWriter(tmp_path, latents.layout, latents.parts[0]) as writer:
        writer.write(0, latents.latents[0], **latents.entry(0))
        with pytest.raises(ValueError, match="row 2 of part 0 came in place of row 1"):
            writer.write(2, latents.latents[2], **latents.entry(2))
        with pytest.raises(ValueError, match=r"\[V, C, H, W\]"):
            writer.write(1, latents.latents[1, 0], **latents.entry(1))
        with pytest.raises(ValueError, match="part 0 has 3 rows, got 1"):
            writer.publish()
    assert files(tmp_path) == {}


# ---- writers that die or meet ----------------------------------------------------------------------------------------


def test_an_aborted_writer_leaves_nothing(tmp_path: Path, given) -> None:
    latents = given()
    with PartWriter(tmp_path, latents.layout, latents.parts[0]) as writer:
        latents.fill(writer, latents.parts[0])
    assert files(tmp_path) == {}
    assert completed_parts(tmp_path, latents.layout, latents.parts) == set()


def test_a_part_without_a_record_is_adopted_not_overwritten(tmp_path: Path, given) -> None:
    """As if the writer had died between the publication of the part and its record."""
    latents = given()
    whole = latents.write(tmp_path / "whole")
    for leftover in ("json only", "json and npz"):
        folder = tmp_path / leftover
        latents.write_part(folder, 0)
        (folder / "parts/000000.json").unlink()
        if leftover == "json and npz":
            (folder / "parts/000000.npz").unlink()
        inode = (folder / SHARD.format(0)).stat().st_ino
        assert completed_parts(folder, latents.layout, latents.parts) == set()
        assert latents.write(folder) == whole.__class__(
            **{**vars(whole), "files": tuple(folder / path.relative_to(tmp_path / "whole") for path in whole.files)}
        )
        assert (folder / SHARD.format(0)).stat().st_ino == inode
        assert files(folder) == files(tmp_path / "whole")


def test_an_adopted_part_of_another_device_brings_its_own_values(tmp_path: Path, given) -> None:
    """The last bits differ between devices: the record then says what is in the file that was first."""
    first, second = given(seed=0), given(seed=1)
    first.write(tmp_path / "whole")
    first.write_part(tmp_path / "mixed", 0)
    (tmp_path / "mixed/parts/000000.json").unlink()
    (tmp_path / "mixed/parts/000000.npz").unlink()
    second.write_part(tmp_path / "mixed", 0)
    for name in ("parts/000000.json", "parts/000000.npz", SHARD.format(0)):
        assert file_sha256(tmp_path / "mixed" / name) == file_sha256(tmp_path / "whole" / name)


def test_an_adopted_part_with_other_rows_or_damage_is_refused(tmp_path: Path, given) -> None:
    latents = given()
    latents.write_part(tmp_path, 0)
    (tmp_path / "parts/000000.json").unlink()
    with pytest.raises(CorruptData, match=SHARD.format(0) + ".*other rows"):
        given(invalid=(1, 2)).write_part(tmp_path, 0)
    os.truncate(tmp_path / SHARD.format(0), 500)
    with pytest.raises(CorruptData, match=SHARD.format(0) + ".*truncated"):
        latents.write_part(tmp_path, 0)
    assert not (tmp_path / "parts/000000.json").exists()


def test_two_writers_of_a_part_end_with_one(tmp_path: Path, given) -> None:
    latents = given()
    part = latents.parts[0]
    with PartWriter(tmp_path, latents.layout, part) as one, PartWriter(tmp_path, latents.layout, part) as other:
        latents.fill(one, part)
        latents.fill(other, part)
        assert one.publish() == other.publish()
    latents.write(tmp_path, order=[1, 2, 3])
    latents.write(tmp_path / "alone")
    assert {name: digest for name, digest in files(tmp_path).items() if not name.startswith("alone")} == files(
        tmp_path / "alone"
    )


def test_a_writer_whose_file_was_swept_away_by_another_that_finished_adopts(tmp_path: Path, given) -> None:
    latents = given()
    with PartWriter(tmp_path, latents.layout, latents.parts[0]) as late:
        latents.fill(late, latents.parts[0])
        latents.write(tmp_path)
        assert not list(tmp_path.glob("parts/.*"))
        late.publish()
    assert LatentStore(tmp_path).verify("full") == []


def _write_everything(folder: Path, latents, barrier) -> None:
    barrier.wait()
    latents.write(folder)


def test_processes_that_write_the_same_store_at_once_end_with_one(tmp_path: Path, given) -> None:
    latents = given(samples=(40, 7), shape=(2, 8, 16, 16), rows_per_part=8, invalid=(3,))
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(3)
    processes = [
        context.Process(target=_write_everything, args=(tmp_path / "together", latents, barrier)) for _ in range(3)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    latents.write(tmp_path / "alone")
    assert files(tmp_path / "together") == files(tmp_path / "alone")


def test_killed_writers_lose_only_the_part_in_hand(tmp_path: Path, given) -> None:
    latents = given(samples=(60,), shape=(2, 16, 16, 16), rows_per_part=4, invalid=(5,))
    whole = latents.write(tmp_path / "whole")
    context = multiprocessing.get_context("fork")
    seen = set()
    for delay in (0.02, 0.05, 0.08):
        barrier = context.Barrier(2)
        process = context.Process(target=_write_everything, args=(tmp_path / "killed", latents, barrier))
        process.start()
        barrier.wait()
        process.join(delay)
        process.kill()
        process.join()
        done = completed_parts(tmp_path / "killed", latents.layout, latents.parts)
        assert seen <= done
        seen = done
    missing = [part.number for part in latents.parts if part.number not in seen]
    assert latents.write(tmp_path / "killed", order=missing).content == whole.content
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


def test_a_full_disk_is_a_clear_error_and_the_resume_finishes(tmp_path: Path, given) -> None:
    """The limit on the size of a file stands for the disk: the system refuses the same write."""
    latents = given(samples=(4, 4), shape=(2, 16, 16, 16), invalid=())
    latents.write_part(tmp_path, 0)
    before = files(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(PartialResult, match="no room for part 1") as raised:
            latents.write_part(tmp_path, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert raised.value.exit_code == 6
    assert files(tmp_path) == before
    assert completed_parts(tmp_path, latents.layout, latents.parts) == {0}
    assert latents.write(tmp_path, order=[1]).content == latents.write(tmp_path / "whole").content


def test_memory_does_not_grow_with_the_part() -> None:
    """The peak of a process that writes 16 times as many rows."""
    script = """
        import sys, tempfile
        from pathlib import Path
        import numpy as np
        from rae.stages.peak_memory import peak_memory_bytes
        from rae.store.latents_writer import PartWriter
        from rae.store.layout import LatentLayout, plan_parts
        rows = int(sys.argv[1])
        layout = LatentLayout(2, 64, 16, 16, rows_per_part=rows)
        latent = np.ones(layout.row_shape, np.float16)
        with tempfile.TemporaryDirectory() as folder:
            with PartWriter(Path(folder), layout, plan_parts([rows], rows)[0]) as writer:
                for row in range(rows):
                    writer.write(row, latent, key=str(row), label=0, sha256="0" * 64, width=1, height=1)
                writer.publish()
        print(peak_memory_bytes() // 1024)
    """
    peaks = [
        int(subprocess.check_output([sys.executable, "-c", textwrap.dedent(script), str(rows)])) for rows in (64, 1024)
    ]
    assert peaks[1] < peaks[0] + 8 * 1024  # KiB; the larger part is 67 MB


def test_damaged_records_are_named(tmp_path: Path, given) -> None:
    latents = given()
    latents.write(tmp_path)
    path = tmp_path / "parts/000001.json"
    value = json.loads(path.read_bytes())
    for damage in (
        b"{",
        b"[]",
        json.dumps(value | {"schema": 99}).encode(),
        json.dumps(value | {"row_crc32c": []}).encode(),
    ):
        path.write_bytes(damage)
        with pytest.raises(CorruptData, match=r"000001\.json"):
            finish(tmp_path, latents.layout, latents.parts, latents.sources)


def test_a_shard_of_another_size_than_recorded_is_not_finished(tmp_path: Path, given) -> None:
    latents = given()
    for number in range(4):
        latents.write_part(tmp_path, number)
    os.truncate(tmp_path / SHARD.format(3), 100)
    with pytest.raises(CorruptData, match=SHARD.format(3) + " is truncated"):
        finish(tmp_path, latents.layout, latents.parts, latents.sources)


def test_publication_never_replaces(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("first")
    (tmp_path / "temporary").write_text("second")
    assert not publish_file(tmp_path / "temporary", tmp_path / "target")
    assert (tmp_path / "target").read_text() == "first"
