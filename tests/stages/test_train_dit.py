"""`rae train-dit`: batches depend on rows alone; labels, sizes and shift follow from the latents."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from rae.stages.models.transport import create_transport
from rae.stages.train_dit import Batch, count_classes, describe_dit, describe_transport, make_batch
from rae.stages.training.sections import TrainDitSection
from rae.stages.training.whitening import Whitening
from rae.store.errors import ConfigError, StaleInput
from rae.store.latents import LatentStore
from rae.store.latents_finish import finish
from rae.store.latents_writer import PartWriter
from rae.store.layout import LatentLayout, plan_parts

SECTION = TrainDitSection(
    steps=1, batch_size=4, hidden_size=(8, 8), depth=(1, 1), num_heads=(1, 1), class_dropout_prob=0.5
)


def write_store(folder: Path, labels: Sequence[int | None], views: int = 2) -> LatentStore:
    layout = LatentLayout(views, channels=6, height=2, width=2, rows_per_part=64, dtype="float32")
    parts = plan_parts([len(labels)], 64)
    generator = np.random.default_rng(0)
    with PartWriter(folder, layout, parts[0]) as writer:
        for row, label in enumerate(labels):
            latent = generator.normal(3.0, 2.0, layout.row_shape).astype(np.float32)
            writer.write(row, latent, key=f"k{row}", label=label, sha256=None, width=None, height=None)
        writer.publish()
    finish(folder, layout, parts, ["digest"])
    return LatentStore(folder)


def batch(store: LatentStore, rows: Sequence[int], epoch: int = 0, num_classes: int = 3) -> Batch:
    transport = create_transport(time_dist_shift=2.0)
    return make_batch(store, Whitening(store.stats), np.array(rows), epoch, SECTION, transport, num_classes)


def test_a_row_is_trained_alike_in_any_batch(tmp_path: Path) -> None:
    store = write_store(tmp_path, [row % 3 for row in range(16)])
    large, small = batch(store, range(16)), batch(store, [11, 4])
    for name in ("x", "y", "t", "noise"):
        assert torch.equal(getattr(large, name)[[11, 4]], getattr(small, name)), name
    assert small.keys == ["k11", "k4"]
    other = batch(store, range(16), epoch=1)
    assert not torch.equal(other.t, large.t)
    assert not torch.equal(other.noise, large.noise)


def test_latents_are_whitened_and_both_views_are_drawn(tmp_path: Path) -> None:
    store = write_store(tmp_path, [0] * 48)
    made = batch(store, range(48), num_classes=1)
    assert abs(float(made.x.mean())) < 0.1
    assert abs(float(made.x.std()) - 1) < 0.1
    views = store.draw_views(np.arange(48), SECTION.seed, 0)
    assert set(views.tolist()) == {0, 1}
    expected = store.stats.whiten(store.rows(range(48), views))
    np.testing.assert_array_equal(made.x.numpy(), expected)


def test_labels_are_dropped_at_the_configured_rate_to_the_null_label(tmp_path: Path) -> None:
    store = write_store(tmp_path, [row % 3 for row in range(48)])
    dropped = torch.cat([batch(store, range(48), epoch).y == 3 for epoch in range(20)])
    assert 0.44 < float(dropped.float().mean()) < 0.56  # four standard deviations of 960 coin tosses
    kept = batch(store, range(48)).y
    labels = torch.tensor(store.labels)
    assert torch.equal(kept[kept != 3], labels[kept != 3])


def test_an_unconditional_model_sees_no_label(tmp_path: Path) -> None:
    store = write_store(tmp_path, [None] * 8)
    assert count_classes(SECTION, store) == 0
    assert batch(store, range(8), num_classes=0).y.tolist() == [0] * 8


def test_the_class_count_follows_from_the_labels_and_refuses_what_does_not_fit(tmp_path: Path) -> None:
    store = write_store(tmp_path / "labelled", [0, 2, 1])
    assert count_classes(SECTION, store) == 3
    assert count_classes(SECTION.model_copy(update={"num_classes": 10}), store) == 10
    with pytest.raises(ConfigError, match=r"`train_dit.num_classes` is 2, and the label of `k1` is 2"):
        count_classes(SECTION.model_copy(update={"num_classes": 2}), store)
    mixed = write_store(tmp_path / "mixed", [0, None, 1])
    with pytest.raises(ConfigError, match="1 of 3 latents have no label"):
        count_classes(SECTION, mixed)


def test_sizes_and_shift_follow_from_the_latents() -> None:
    config = describe_dit(SECTION.model_copy(update={"hidden_size": (8, 768)}), (768, 16, 16), num_classes=1000)
    assert (config.in_channels, config.input_size, config.num_classes) == (768, 16, 1000)
    assert describe_transport(SECTION, (768, 16, 16))["time_dist_shift"] == pytest.approx(6.928, abs=1e-3)
    assert describe_transport(SECTION, (112, 4, 4))["time_dist_shift"] == 1.0
    given = SECTION.model_copy(update={"time_dist_shift": 3.0})
    assert describe_transport(given, (768, 16, 16))["time_dist_shift"] == 3.0
    with pytest.raises(ConfigError, match="Theorem 1"):
        describe_dit(SECTION, (768, 16, 16), num_classes=1000)
    with pytest.raises(StaleInput, match="2x4"):
        describe_dit(SECTION, (8, 2, 4), num_classes=1)
