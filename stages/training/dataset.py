"""Stored latents as a torch dataset, for training loops that are not ours."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from rae.store.latents import LatentStore


class LatentDataset(Dataset[dict[str, Any]]):
    """Map-style: item `row` is {"latent": float32 [C, H, W], "label": int, "key": str, "row": int}.

    The view (identity or flip) is drawn from (seed, epoch, row), so workers and batch size do not change it.
    """

    def __init__(self, latents: LatentStore, seed: int = 0) -> None:
        self.latents = latents
        self.seed = seed
        self.epoch = 0

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
        latents = torch.from_numpy(self.latents.stats.whiten(self.latents.rows(chosen, views)))
        labels = self.latents.labels[chosen]
        return [
            {"latent": latent, "label": int(label), "key": self.latents.keys[row], "row": int(row)}
            for latent, label, row in zip(latents, labels, chosen, strict=True)
        ]
