"""Images at the border between numpy and torch: uint8 [B, H, W, 3] there, float [B, 3, H, W] in [0, 1] here."""

import numpy as np
import torch
from torch import Tensor


def to_unit(images: np.ndarray, device: torch.device | str) -> Tensor:
    """uint8 [B, H, W, 3] -> float32 [B, 3, H, W] in [0, 1]."""
    return torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float().div_(255)


def to_uint8(images: Tensor) -> np.ndarray:
    """Float [B, 3, H, W] in [0, 1] -> uint8 [B, H, W, 3], rounded: truncation would darken by half a level."""
    return images.float().mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
