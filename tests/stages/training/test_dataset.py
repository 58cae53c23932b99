"""Batches of torch tensors: numpy's numbers, in numpy's order, whoever makes them ahead."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from rae.stages.training.dataset import LatentDataset
from rae.stages.training.whitening import Whitening
from rae.store.errors import ConfigError
from rae.store.latents import LatentStore


@pytest.fixture
def store(finished: Callable[..., object]) -> LatentStore:
    [manifest] = Path(finished.workspace).glob("objects/latents/*/manifest.json")
    return LatentStore(manifest.parent)


@pytest.mark.parametrize("workers", [0, 3])
def test_batches_are_the_store_s_own(store: LatentStore, workers: int) -> None:
    ours = list(LatentDataset(store, seed=5).batches(8, epoch=2, start_step=1, workers=workers))
    theirs = list(store.batches(8, seed=5, epoch=2, start_step=1))
    assert len(ours) == len(theirs) > 3
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(one["latent"].numpy(), other["latent"])
        np.testing.assert_array_equal(one["label"].numpy(), other["label"])
        np.testing.assert_array_equal(one["row"].numpy(), other["row"])


def test_a_batch_larger_than_the_store_is_refused_and_not_an_empty_epoch(store: LatentStore) -> None:
    with pytest.raises(ConfigError, match=f"is larger than the {len(store)} rows"):
        next(LatentDataset(store).batches(len(store) + 1, epoch=0))


def test_ranks_share_the_batches_of_one(store: LatentStore) -> None:
    dataset = LatentDataset(store)
    whole = next(dataset.batches(8, epoch=0))
    shares = [next(dataset.batches(8, epoch=0, rank=rank, world_size=2)) for rank in range(2)]
    assert torch.equal(torch.cat([share["latent"] for share in shares]), whole["latent"])


def test_a_batch_that_is_held_keeps_its_numbers(store: LatentStore) -> None:
    whitening = Whitening(store.stats)
    raw = store.rows(np.arange(4), 0)
    held = whitening(raw)
    copy = held.clone()
    for _ in range(20):
        whitening(raw + 1)
    assert torch.equal(held, copy)
