"""Raw latents from the store, whitened as torch tensors: the same numbers as numpy's `LatentStats.whiten`, sooner."""

import numpy as np
import torch
from torch import Tensor

from rae.store.buffers import Buffers
from rae.store.stats import EPSILON, LatentStats


class Whitening:
    """raw [B, C, H, W] -> (raw - mean) / sqrt(variance + 1e-5), float32 on `device` (RAE paper, section 3).

    On a CPU the result lies in memory that is used again once nobody holds it; a GPU is sent the raw numbers, which
    are half as many bytes, and whitens them itself.
    """

    def __init__(self, stats: LatentStats, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self._mean = torch.from_numpy(stats.mean).float().to(self.device)
        self._deviation = torch.from_numpy(np.sqrt(stats.variance + EPSILON)).float().to(self.device)
        self._buffers = Buffers()

    def __call__(self, raw: np.ndarray) -> Tensor:
        if self.device.type != "cpu":
            return torch.from_numpy(raw).to(self.device).float().sub_(self._mean).div_(self._deviation)
        whitened = torch.from_numpy(self._buffers.take(raw.shape, np.float32))
        for target, latent in zip(whitened, torch.from_numpy(raw), strict=True):  # one fits a cache, a batch does not
            target.copy_(latent).sub_(self._mean).div_(self._deviation)
        return whitened
