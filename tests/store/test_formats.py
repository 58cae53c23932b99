"""Number formats and compressors: what is stored stands for the same floats, whoever reads it."""

import itertools
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given as hypothesis_given
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rae.store import formats
from rae.store.errors import ConfigError, CorruptData, RaeError, StaleInput
from rae.store.latents import LatentStore
from rae.store.latents_finish import finish
from rae.store.latents_writer import PartWriter
from rae.store.layout import LatentLayout

FORMATS = ["float16", "float32", "bfloat16", "int8"]
STORED = [
    (dtype, compressor)
    for dtype, compressor in itertools.product(FORMATS, ["none", "zstd", "blosc", "pcodec"])
    if (dtype, compressor) != ("int8", "pcodec")
]
FLOATS = hnp.arrays(np.float32, (2, 3, 4, 4), elements=st.floats(-65504, 65504, width=32))


def open_with_zarr(folder: Path, name: str) -> np.ndarray:
    return zarr.open_group(folder, mode="r")[name][:]


def open_with_tensorstore(folder: Path, name: str) -> np.ndarray:
    import tensorstore

    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{folder}/{name}"}}
    return tensorstore.open(spec, read=True, open=True).result().read().result()


@pytest.fixture(params=STORED, ids="-".join)
def stored(request: pytest.FixtureRequest) -> dict[str, str]:
    dtype, compressor = request.param
    if compressor != "none":
        pytest.importorskip("numcodecs.pcodec" if compressor == "pcodec" else "numcodecs")
    return {"dtype": dtype, "compressor": compressor}


# ---- in the store ----------------------------------------------------------------------------------------------------


def test_rows_items_and_batches_are_floats(tmp_path: Path, given, stored: dict[str, str]) -> None:
    latents = given(**stored)
    latents.write(tmp_path)
    store, raw = LatentStore(tmp_path), LatentStore(tmp_path, raw=True)
    expected = latents.latents[latents.valid_slots]
    assert (store.layout.dtype, store.layout.compressor) == (stored["dtype"], stored["compressor"])
    for view in range(2):
        rows = store.rows(range(10), view)
        assert rows.dtype == (np.float16 if stored["dtype"] == "float16" else np.float32)
        np.testing.assert_array_equal(rows, expected[:, view])
    np.testing.assert_array_equal(raw[4]["latent"], expected[4, 0])
    whitened = store.stats.whiten(expected[4, 0])
    assert whitened.dtype == np.float32
    np.testing.assert_array_equal(store[4]["latent"], whitened)
    for batch in store.batches(5, seed=0, epoch=0):
        np.testing.assert_array_equal(batch["latent"], store.stats.whiten(expected[batch["row"], batch["view"]]))
    for batch in raw.batches(5, seed=0, epoch=0):
        np.testing.assert_array_equal(batch["latent"], expected[batch["row"], batch["view"]])


@pytest.mark.parametrize("read", [open_with_zarr, open_with_tensorstore])
def test_other_implementations_read_the_same_values(tmp_path: Path, given, stored: dict[str, str], read) -> None:
    """And what is missing (padding, invalid rows) as NaN."""
    if read is open_with_tensorstore:
        pytest.importorskip("tensorstore")
        if stored["compressor"] == "pcodec":
            pytest.skip("tensorstore has no pcodec")
    latents = given(**stored)
    latents.write(tmp_path)
    arrays = tuple(read(tmp_path, array.name) for array in latents.layout.arrays)
    found = formats.decode(latents.layout.dtype, arrays)
    np.testing.assert_array_equal(found, latents.latents)
    assert np.isnan(found[[2, 7]]).all()


@pytest.mark.parametrize("dtype", FORMATS)
def test_a_missing_shard_reads_as_nan_elsewhere_and_is_named_here(tmp_path: Path, given, dtype: str) -> None:
    latents = given(dtype=dtype)
    latents.write(tmp_path)
    key = latents.layout.shard_keys(3)[-1]
    (tmp_path / key).unlink()
    arrays = tuple(open_with_zarr(tmp_path, array.name) for array in latents.layout.arrays)
    assert np.isnan(formats.decode(latents.layout.dtype, arrays)[12:]).all()
    with pytest.raises(RaeError, match=key):
        LatentStore(tmp_path).rows([9], 0)


def test_statistics_are_those_of_the_stored_values_in_any_order(tmp_path: Path, given, stored: dict[str, str]) -> None:
    latents = given(samples=(9, 7, 8), invalid=(3,), **stored)
    latents.write(tmp_path / "a")
    latents.write(tmp_path / "b", order=[4, 6, 0, 2, 1, 5, 3])
    values = latents.latents[latents.valid_slots].astype(np.float64)
    stats = LatentStore(tmp_path / "a").stats
    np.testing.assert_allclose(stats.mean, values.mean((0, 1)), rtol=1e-10)
    np.testing.assert_allclose(stats.variance, values.var((0, 1)), rtol=1e-10)
    assert stats.identical(LatentStore(tmp_path / "b").stats)


def test_content_does_not_depend_on_the_compressor(tmp_path: Path, given) -> None:
    pytest.importorskip("numcodecs")
    contents = {
        dtype: {given(dtype=dtype, compressor=one).write(tmp_path / dtype / one).content for one in ("none", "zstd")}
        for dtype in FORMATS
    }
    assert {len(found) for found in contents.values()} == {1}
    assert len(set.union(*contents.values())) == len(FORMATS)


def test_a_damaged_chunk_is_named_and_found(tmp_path: Path, given, stored: dict[str, str]) -> None:
    latents = given(samples=(4,), invalid=(), **stored)
    latents.write(tmp_path)
    path = tmp_path / latents.layout.shard_keys(0)[-1]
    whole = path.read_bytes()
    for byte in np.random.default_rng(0).choice(len(whole), 20).tolist():
        path.write_bytes(whole[:byte] + bytes([whole[byte] ^ 0x10]) + whole[byte + 1 :])
        problems = LatentStore(tmp_path).verify("full")
        assert problems
        assert all(path.name in str(problem) for problem in problems)
        with suppress(CorruptData):  # reading takes no checksums: it may not notice, but it never crashes
            LatentStore(tmp_path).rows(range(4), 0)


def test_a_resume_with_another_compressor_is_refused(tmp_path: Path, given) -> None:
    pytest.importorskip("numcodecs")
    given(compressor="zstd").write_part(tmp_path, 0)
    latents = given()
    with pytest.raises(StaleInput, match="compressed with `zstd`, and `none` is asked for"):
        latents.write_part(tmp_path, 0)
    with pytest.raises(StaleInput, match="compressed with `zstd`"):
        finish(tmp_path, latents.layout, latents.parts[:1], latents.sources)


def test_two_writers_of_an_int8_part_end_with_one(tmp_path: Path, given) -> None:
    latents = given(dtype="int8")
    part = latents.parts[0]
    with PartWriter(tmp_path, latents.layout, part) as one, PartWriter(tmp_path, latents.layout, part) as other:
        latents.fill(one, part)
        latents.fill(other, part)
        record = one.publish()
        assert other.publish() == record
    for missing in latents.layout.shard_keys(0):  # as if a writer had died before this one and its record
        (tmp_path / missing).unlink()
        (tmp_path / "parts/000000.json").unlink()
        assert latents.write_part(tmp_path, 0) == record


def test_formats_and_compressors_that_are_not_there_are_refused() -> None:
    with pytest.raises(ConfigError, match="float16, float32, bfloat16 or int8, not float8"):
        LatentLayout(1, 1, 1, 1, 1, "float8")
    with pytest.raises(ConfigError, match="none, zstd, blosc or pcodec, not lzma"):
        LatentLayout(1, 1, 1, 1, 1, "float16", "lzma")
    with pytest.raises(ConfigError, match="int8 latents use `zstd`"):
        LatentLayout(1, 1, 1, 1, 1, "int8", "pcodec")


# ---- numbers ---------------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@hypothesis_given(FLOATS)
def test_stored_values_are_stored_as_they_are(values: np.ndarray) -> None:
    for dtype in FORMATS:
        once = formats.encode(dtype, values)
        again = formats.encode(dtype, formats.decode(dtype, once))
        assert [array.tobytes() for array in once] == [array.tobytes() for array in again]


@settings(max_examples=50, deadline=None)
@hypothesis_given(FLOATS)
def test_codes_are_symmetric_and_err_by_half_a_step(values: np.ndarray) -> None:
    codes, scales = formats.encode("int8", values)
    assert scales.shape == (2, 3, 1, 1)
    assert np.abs(codes.astype(int)).max() <= 127
    mirrored, same = formats.encode("int8", -values)
    np.testing.assert_array_equal(mirrored, -codes)
    np.testing.assert_array_equal(same, scales)
    error = np.abs(formats.decode("int8", (codes, scales)).astype(np.float64) - values)
    largest = np.abs(values).max(axis=(-2, -1), keepdims=True)
    assert (error <= largest.astype(np.float64) / 254 * 1.0001 + 1e-40).all()


def test_bfloat16_rounds_to_the_nearest_and_halves_to_even() -> None:
    values = np.array([1, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -1 - 2**-8, 0.0, -0.0, 1e-45], np.float32)
    (bits,) = formats.encode("bfloat16", values)
    expected = [0x3F80, 0x3F80, 0x3F82, 0x3F81, 0xBF80, 0x0000, 0x8000, 0x0000]
    assert bits.tolist() == expected


def test_bfloat16_is_torchs() -> None:
    import torch

    values = np.random.default_rng(0).integers(0, 2**32, 100_000, dtype=np.uint32).view(np.float32)
    values = values[np.isfinite(torch.from_numpy(values).bfloat16().float().numpy())]
    (bits,) = formats.encode("bfloat16", values)
    expected = torch.from_numpy(values).bfloat16()
    np.testing.assert_array_equal(bits.view(np.int16), expected.view(torch.int16).numpy())
    np.testing.assert_array_equal(formats.decode("bfloat16", (bits,)), expected.float().numpy())


@pytest.mark.parametrize(("dtype", "too_large"), [("float16", 65520), ("bfloat16", 3.4e38), ("float32", 1e39)])
def test_what_a_format_cannot_hold_is_refused(dtype: str, too_large: float) -> None:
    good = np.ones((1, 2, 2))
    assert formats.encode(dtype, good * 65000) is not None
    for bad in (too_large, -too_large, np.nan, np.inf):
        assert formats.encode(dtype, np.where([[True, False], [False, False]], bad, good)) is None
    for bad in (np.nan, np.finfo(np.float32).max):  # the latter's scale, rounded up, would decode to infinity
        assert formats.encode("int8", np.full((1, 1, 1), bad)) is None


def test_nothing_missing_stands_for_zero() -> None:
    for dtype in FORMATS:
        missing = tuple(np.full((1, 1, 1), array.fill, array.dtype) for array in formats.ARRAYS[dtype])
        assert np.isnan(formats.decode(dtype, missing)).all()
    codes, _ = formats.encode("int8", np.random.default_rng(0).normal(size=(3, 20, 20)))
    assert formats.NO_CODE not in codes
