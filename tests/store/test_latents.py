"""Reading: values, order, views, resume, and errors that name the file."""

import copy
import json
import os
import stat
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import zarr

from rae.store.errors import ConfigError, CorruptData, MissingInput
from rae.store.latents import LatentStore
from rae.store.order import GlobalShuffle, batch_rows, steps_per_epoch

SHARD = "latents/c/{}/0/0/0/0"


# ---- rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_rows_are_the_valid_slots_in_order(tmp_path: Path, given, dtype: str) -> None:
    latents = given(dtype=dtype)
    latents.write(tmp_path)
    store = LatentStore(tmp_path)
    assert len(store) == 10
    assert (store.shape, store.views, store.slots) == ((3, 4, 5), 2, 16)
    rows = np.random.default_rng(0).integers(0, 10, 40)
    views = np.random.default_rng(1).integers(0, 2, 40)
    found = store.rows(rows, views)
    assert found.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(found, latents.latents[latents.valid_slots[rows], views])
    np.testing.assert_array_equal(store.rows(rows, 1), latents.latents[latents.valid_slots[rows], 1])
    assert store.rows([], []).shape == (0, 3, 4, 5)


def test_labels_keys_and_invalid_rows(tmp_path: Path, given) -> None:
    latents = given()
    latents.write(tmp_path)
    store = LatentStore(tmp_path)
    entries = [latents.entry(slot) for slot in latents.valid_slots]
    assert store.labels.dtype == np.int64
    assert store.labels.tolist() == [-1 if entry["label"] is None else entry["label"] for entry in entries]
    assert store.keys == [entry["key"] for entry in entries]
    assert store.invalid_rows() == [
        {"slot": 2, "key": "image-0002", "label": 1, "source_shard": 0, "reason": "not an image"},
        {"slot": 9, "key": "image-0009", "label": 0, "source_shard": 1, "reason": "not an image"},
    ]


def test_items_are_whitened_unless_raw(tmp_path: Path, given) -> None:
    latents = given()
    latents.write(tmp_path)
    store, raw = LatentStore(tmp_path), LatentStore(tmp_path, raw=True)
    valid = latents.latents[latents.valid_slots].astype(np.float64)
    mean, variance = valid.mean((0, 1)), valid.var((0, 1))
    assert store.stats.count == 20
    np.testing.assert_allclose(store.stats.mean, mean, rtol=1e-10)
    np.testing.assert_allclose(store.stats.variance, variance, rtol=1e-10)
    item = store[3]
    assert (item["key"], item["label"]) == ("image-0004", -1)
    assert item["latent"].dtype == np.float32
    np.testing.assert_allclose(item["latent"], (valid[3, 0] - mean) / np.sqrt(variance + 1e-5), atol=1e-5)
    np.testing.assert_array_equal(raw[3]["latent"], latents.latents[4, 0])
    assert store[-1]["key"] == store.keys[-1]
    with pytest.raises(IndexError):
        store[10]


def test_rows_and_views_that_are_not_there_are_refused(tmp_path: Path, given) -> None:
    given().write(tmp_path)
    store = LatentStore(tmp_path)
    with pytest.raises(IndexError, match="store of 10"):
        store.rows([0, 10], 0)
    with pytest.raises(IndexError, match="store of 10"):
        store.rows([-1], 0)
    with pytest.raises(IndexError, match="views 0 to 2"):
        store.rows([0, 1], [0, 2])


def test_a_store_travels_to_another_process(tmp_path: Path, given) -> None:
    given().write(tmp_path)
    store = LatentStore(tmp_path, raw=True)
    store.rows([0], 0)  # with a shard mapped
    there = copy.copy(store)  # as pickle and a DataLoader's workers do it: through `__reduce__`
    assert there.raw
    np.testing.assert_array_equal(there.rows(range(10), 1), store.rows(range(10), 1))


def test_a_shard_that_zarr_python_wrote_reads_the_same(tmp_path: Path, given) -> None:
    """Offsets come from the shard's index: another writer may order the latents in a shard as it likes."""
    latents = given()
    latents.write(tmp_path)
    before = LatentStore(tmp_path).rows(range(10), 1)
    array = zarr.open_group(tmp_path, mode="r+")["latents"]
    array[:4] = latents.latents[:4]
    np.testing.assert_array_equal(LatentStore(tmp_path).rows(range(10), 1), before)


def test_more_shards_than_may_be_open(tmp_path: Path, given, monkeypatch: pytest.MonkeyPatch) -> None:
    latents = given(samples=(1,) * 40, invalid=())
    latents.write(tmp_path)
    monkeypatch.setattr("rae.store.latents_rows._open_files", lambda: 16)
    store = LatentStore(tmp_path)
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
    rows = np.random.default_rng(0).permutation(40)
    np.testing.assert_array_equal(store.rows(rows, 0), latents.latents[latents.valid_slots[rows], 0])
    if before:
        assert len(os.listdir("/proc/self/fd")) <= before + 8


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_reading_writes_nothing(tmp_path: Path, given) -> None:
    given().write(tmp_path)
    folders = [tmp_path, *(path for path in tmp_path.rglob("*") if path.is_dir())]
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    for folder in folders:
        folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        store = LatentStore(tmp_path)
        assert len(list(store.batches(5, seed=0, epoch=0))) == 2
        assert store.verify("full") == []
    finally:
        for folder in folders:
            folder.chmod(stat.S_IRWXU)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_the_manifest_is_there_once_published(tmp_path: Path, given) -> None:
    given().write(tmp_path)
    assert LatentStore(tmp_path).manifest == {}
    (tmp_path / "manifest.json").write_text(json.dumps({"name": "digits"}))
    assert LatentStore(tmp_path).manifest == {"name": "digits"}


def test_a_manifest_of_other_latents_is_named_at_opening(tmp_path: Path, given) -> None:
    content = given().write(tmp_path).content
    for claimed in (content, "0" * 64):
        (tmp_path / "manifest.json").write_text(json.dumps({"content": claimed}))
        if claimed == content:
            assert LatentStore(tmp_path).manifest["content"] == content
        else:
            with pytest.raises(CorruptData, match=r"manifest.json is of other latents than parts.parquet"):
                LatentStore(tmp_path)


# ---- batches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_global_batches_are_the_same_for_any_number_of_ranks(tmp_path: Path, given, world_size: int) -> None:
    given(samples=(13, 20), invalid=(1, 30)).write(tmp_path)
    store = LatentStore(tmp_path)
    alone = list(store.batches(8, seed=3, epoch=1))
    ranks = [list(store.batches(8, seed=3, epoch=1, rank=rank, world_size=world_size)) for rank in range(world_size)]
    assert [len(batches) for batches in ranks] == [3] * world_size == [len(alone)] * world_size
    for step, batch in enumerate(alone):
        for name in ("latent", "label", "row", "view"):
            together = np.concatenate([batches[step][name] for batches in ranks])
            np.testing.assert_array_equal(together, batch[name])


def test_batches_resume_where_they_stopped(tmp_path: Path, given) -> None:
    given(samples=(40,), invalid=()).write(tmp_path)
    whole = list(LatentStore(tmp_path).batches(4, seed=0, epoch=5))
    resumed = list(LatentStore(tmp_path).batches(4, seed=0, epoch=5, start_step=7))
    assert len(whole) == 10
    assert len(resumed) == 3
    for before, after in zip(whole[7:], resumed, strict=True):
        assert before["latent"].tobytes() == after["latent"].tobytes()
        np.testing.assert_array_equal(before["row"], after["row"])
    assert list(LatentStore(tmp_path).batches(4, seed=0, epoch=5, start_step=10)) == []


def test_batches_are_rows_in_the_order_of_the_law(tmp_path: Path, given) -> None:
    latents = given(samples=(40,), invalid=(7,))
    latents.write(tmp_path)
    store = LatentStore(tmp_path)
    batches = list(store.batches(4, seed=9, epoch=2, raw=True))
    assert len(batches) == steps_per_epoch(39, 4) == 9
    for step, batch in enumerate(batches):
        np.testing.assert_array_equal(batch["row"], batch_rows(GlobalShuffle(39), 4, 9, 2, step))
        slots = latents.valid_slots[batch["row"]]
        np.testing.assert_array_equal(batch["latent"], latents.latents[slots, batch["view"]])
        np.testing.assert_array_equal(batch["label"], store.labels[batch["row"]])
    seen = np.concatenate([batch["row"] for batch in batches])
    assert np.unique(seen).size == 36
    assert all(array.flags.writeable for array in batches[0].values())  # torch.from_numpy warns of others


def test_windowed_batches_hold_a_window_of_parts_and_resume(tmp_path: Path, given) -> None:
    given(samples=(16, 16), rows_per_part=4, invalid=(3,)).write(tmp_path)
    store = LatentStore(tmp_path)
    whole = list(store.batches(4, seed=0, epoch=1, shuffle="windowed", window_parts=2))
    rows = np.concatenate([batch["row"] for batch in whole])
    assert np.unique(rows).size == 28
    slots = np.delete(np.arange(32), 3)[rows[:7]]
    assert np.unique(slots // 4).size == 2
    resumed = list(store.batches(4, seed=0, epoch=1, start_step=5, shuffle="windowed", window_parts=2))
    assert [batch["latent"].tobytes() for batch in resumed] == [batch["latent"].tobytes() for batch in whole[5:]]
    shares = [
        list(store.batches(4, seed=0, epoch=1, rank=rank, world_size=2, shuffle="windowed", window_parts=2))
        for rank in range(2)
    ]
    for step, batch in enumerate(whole):
        np.testing.assert_array_equal(np.concatenate([share[step]["row"] for share in shares]), batch["row"])


def test_views_are_drawn_per_row_and_epoch_and_not_by_batch(tmp_path: Path, given) -> None:
    given(samples=(200,), rows_per_part=200, shape=(2, 1, 1, 1), invalid=()).write(tmp_path)
    store = LatentStore(tmp_path)

    def views(batch_size: int, epoch: int) -> dict[int, int]:
        batches = store.batches(batch_size, seed=0, epoch=epoch)
        return {int(r): int(v) for batch in batches for r, v in zip(batch["row"], batch["view"], strict=True)}

    assert views(10, epoch=0) == views(50, epoch=0)
    assert 80 < sum(views(50, epoch=0).values()) < 120
    assert 70 < sum(views(50, epoch=0)[row] != view for row, view in views(50, epoch=1).items()) < 130
    identity = store.batches(50, seed=0, epoch=0, horizontal_flip=False)
    assert not any(batch["view"].any() for batch in identity)


def test_flips_need_stored_flips(tmp_path: Path, given) -> None:
    given(shape=(1, 3, 4, 5)).write(tmp_path)
    store = LatentStore(tmp_path)
    assert not next(store.batches(10, seed=0, epoch=0))["view"].any()
    with pytest.raises(ConfigError, match="horizontal_flip"):
        store.batches(10, seed=0, epoch=0, horizontal_flip=True)
    with pytest.raises(ConfigError, match="batch_size` 11 is larger than the 10 rows"):
        store.batches(11, seed=0, epoch=0)


def test_batches_are_whitened_unless_raw(tmp_path: Path, given) -> None:
    given(samples=(40,), invalid=()).write(tmp_path)
    white = next(LatentStore(tmp_path).batches(8, seed=0, epoch=0))
    raw = next(LatentStore(tmp_path, raw=True).batches(8, seed=0, epoch=0))
    assert (white["latent"].dtype, raw["latent"].dtype) == (np.float32, np.float16)
    np.testing.assert_array_equal(LatentStore(tmp_path).stats.whiten(raw["latent"]), white["latent"])


# ---- errors ----------------------------------------------------------------------------------------------------------


def test_a_missing_shard_is_named_and_never_zeros(tmp_path: Path, given) -> None:
    given().write(tmp_path)
    (tmp_path / SHARD.format(1)).unlink()
    store = LatentStore(tmp_path)
    assert np.isfinite(store.rows([0], 0)).all()
    with pytest.raises(MissingInput, match=SHARD.format(1)):
        store.rows([3], 0)


@pytest.mark.parametrize("size", [0, 50, 500])
def test_a_truncated_shard_is_named(tmp_path: Path, given, size: int) -> None:
    given().write(tmp_path)
    os.truncate(tmp_path / SHARD.format(0), size)
    with pytest.raises(CorruptData, match=SHARD.format(0) + " is truncated"):
        LatentStore(tmp_path).rows([0], 0)


def test_a_foreign_file_in_a_shards_place_is_named(tmp_path: Path, given) -> None:
    given().write(tmp_path)
    path = tmp_path / SHARD.format(0)
    size = path.stat().st_size
    path.write_bytes(b"\x00" * size)
    with pytest.raises(CorruptData, match=SHARD.format(0) + ".*index"):
        LatentStore(tmp_path).rows([0], 0)
    path.write_bytes(b"\x00" * (size + 1))
    with pytest.raises(CorruptData, match=SHARD.format(0)):
        LatentStore(tmp_path).rows([0], 0)


def test_a_shard_of_another_store_is_named(tmp_path: Path, given) -> None:
    given().write(tmp_path / "a")
    given(invalid=(1, 2, 3, 9)).write(tmp_path / "b")
    (tmp_path / "b" / SHARD.format(0)).rename(tmp_path / "a" / SHARD.format(0))
    with pytest.raises(CorruptData, match=SHARD.format(0)):
        LatentStore(tmp_path / "a").rows([0], 0)


@pytest.mark.parametrize("name", ["latents/zarr.json", "parts.parquet"])
def test_metadata_that_is_not_there_or_damaged_is_named_at_opening(tmp_path: Path, given, name: str) -> None:
    given().write(tmp_path)
    (tmp_path / name).write_bytes(b"\x80 damage")
    with pytest.raises(CorruptData, match=name):
        LatentStore(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(MissingInput, match=name):
        LatentStore(tmp_path)


def test_an_index_that_does_not_fit_is_named(tmp_path: Path, given) -> None:
    given().write(tmp_path)
    index = tmp_path / "index.parquet"
    pq.write_table(pq.read_table(index).slice(0, 8), index)
    with pytest.raises(CorruptData, match=r"index\.parquet"):
        _ = LatentStore(tmp_path).labels
    pq.write_table(pq.read_table(index).drop_columns(["label"]), index)
    with pytest.raises(CorruptData, match=r"index\.parquet"):
        _ = LatentStore(tmp_path).labels


def test_an_empty_folder_is_no_store(tmp_path: Path) -> None:
    with pytest.raises(MissingInput, match=r"latents/zarr\.json"):
        LatentStore(tmp_path)
