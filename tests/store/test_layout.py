"""The plan of parts is arithmetic: every sample has exactly one slot, whoever computes it."""

import numpy as np
import pytest

from rae.store.errors import ConfigError, CorruptData
from rae.store.layout import LatentLayout, Part, plan_parts


def test_each_source_shard_opens_a_new_part() -> None:
    assert plan_parts([5, 0, 4, 1], rows_per_part=4) == [
        Part(0, source_shard=0, first_sample=0, count=4, first_slot=0),
        Part(1, source_shard=0, first_sample=4, count=1, first_slot=4),
        Part(2, source_shard=2, first_sample=0, count=4, first_slot=8),
        Part(3, source_shard=3, first_sample=0, count=1, first_slot=12),
    ]


def test_parts_cover_every_sample_once_and_in_order() -> None:
    samples = np.random.default_rng(0).integers(0, 50, 30).tolist()
    parts = plan_parts(samples, rows_per_part=7)
    covered = [(p.source_shard, p.first_sample + i) for p in parts for i in range(p.count)]
    assert covered == [(shard, i) for shard, count in enumerate(samples) for i in range(count)]
    assert all(p.first_slot == 7 * p.number for p in parts)


def test_a_part_holds_1024_latents_by_default() -> None:
    assert [LatentLayout.default_rows_per_part(views) for views in (1, 2, 2000)] == [1024, 512, 1]


def test_metadata_gives_back_the_layout() -> None:
    layout = LatentLayout(views=2, channels=3, height=4, width=5, rows_per_part=8, dtype="float32")
    assert LatentLayout.from_array_metadata(layout.array_metadata(24), "zarr.json") == (layout, 24)
    assert layout.latent_bytes == 3 * 4 * 5 * 4
    assert layout.shard_key(12) == "latents/c/12/0/0/0/0"


@pytest.mark.parametrize(
    ("key", "value"),
    [("fill_value", 0), ("data_type", "int8"), ("shape", [4]), ("codecs", []), ("shape", None), ("chunk_grid", {})],
)
def test_metadata_of_another_array_is_refused_by_name(key: str, value: object) -> None:
    metadata = LatentLayout(2, 3, 4, 5, rows_per_part=8).array_metadata(8)
    with pytest.raises(CorruptData, match=r"somewhere/zarr\.json"):
        LatentLayout.from_array_metadata(metadata | {key: value}, "somewhere/zarr.json")


@pytest.mark.parametrize("sizes", [(0, 3, 4, 5, 8), (2, 3, 4, 5, 0), (2, -3, 4, 5, 8)])
def test_sizes_are_positive(sizes: tuple[int, int, int, int, int]) -> None:
    with pytest.raises(ConfigError, match="positive"):
        LatentLayout(*sizes)
    with pytest.raises(ConfigError, match="rows_per_part"):
        plan_parts([3], rows_per_part=0)
