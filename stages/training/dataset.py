"""Stored latents as torch tensors: whitened batches for training, and a dataset for loops that are not ours."""

from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import Dataset

from rae.stages.training.data import prefetch
from rae.stages.training.whitening import Whitening
from rae.store.errors import ConfigError
from rae.store.latents import WINDOW_PARTS, LatentStore
from rae.store.order import batch_rows, steps_per_epoch


class LatentDataset(Dataset[dict[str, Any]]):
    """Map-style: item `row` is {"latent": float32 [C, H, W], "label": int, "key": str, "row": int}.

    The view (identity or flip) is drawn from (seed, epoch, row), so workers and batch size do not change it.
    """

    def __init__(self, latents: LatentStore, seed: int = 0) -> None:
        self.latents = latents
        self.seed = seed
        self.epoch = 0
        self._whitening = Whitening(latents.stats)

    def batches(
        self,
        batch_size: int,
        epoch: int,
        start_step: int = 0,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 2,
        shuffle: Literal["global", "windowed"] = "global",
        window_parts: int = WINDOW_PARTS,
    ) -> Iterator[dict[str, Any]]:
        """The shuffled batches that `LatentStore.batches` gives, ready for a model and made ahead by threads.

        {"latent": float32 [B, C, H, W], "label": int64 [B] (-1: none), "row": int64 [B]}. They are the same for any
        number of `workers`, and of ranks together. Raises `ConfigError` for sizes that do not fit.
        """
        if batch_size > len(self):
            raise ConfigError(f"`batch_size` {batch_size} is larger than the {len(self)} rows of {self.latents.folder}")
        order = self.latents.shuffle(shuffle, window_parts)

        def make(step: int) -> dict[str, Any]:
            rows = batch_rows(order, batch_size, self.seed, epoch, step, rank, world_size)
            views = self.latents.draw_views(rows, self.seed, epoch)
            latent = self._whitening(self.latents.rows(rows, views))
            return {
                "latent": latent,
                "label": torch.from_numpy(self.latents.labels[rows]),
                "row": torch.from_numpy(rows),
            }

        with closing(prefetch(make, range(start_step, steps_per_epoch(len(self), batch_size)), workers)) as batches:
            yield from batches

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that views are drawn for."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.latents)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return self.__getitems__([row])[0]

    def __getitems__(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """A batch's items in one gather; DataLoader calls this where it can."""
        chosen = np.asarray(rows)
        views = self.latents.draw_views(chosen, self.seed, self.epoch)
        latents = self._whitening(self.latents.rows(chosen, views))
        labels = self.latents.labels[chosen]
        return [
            {"latent": latent, "label": int(label), "key": key, "row": int(row)}
            for latent, label, key, row in zip(latents, labels, self.latents.keys_of(chosen), chosen, strict=True)
        ]
