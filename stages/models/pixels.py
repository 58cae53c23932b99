"""Images at the border between numpy and torch: uint8 [B, H, W, 3] there, float [B, 3, H, W] in [0, 1] here."""

import numpy as np
import torch
from torch import Tensor

from rae.store.errors import ConfigError


def to_unit(images: np.ndarray, device: torch.device | str) -> Tensor:
    """uint8 [B, H, W, 3] -> float32 [B, 3, H, W] in [0, 1]."""
    return torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float().div_(255)


def as_unit(images: Tensor | np.ndarray) -> Tensor:
    """A batch in either form -> float [B, 3, H, W] in [0, 1]; `ConfigError` for anything else."""
    if isinstance(images, np.ndarray) and images.dtype == np.uint8 and images.ndim == 4 and images.shape[-1] == 3:
        return to_unit(images, "cpu")
    if isinstance(images, Tensor) and images.is_floating_point() and images.dim() == 4 and images.shape[1] == 3:
        return images
    array = isinstance(images, Tensor | np.ndarray)
    found = f"{images.dtype} {list(images.shape)}" if array else f"a {type(images).__name__}"
    raise ConfigError(
        f"images are a float tensor [B, 3, H, W] in [0, 1] or a uint8 array [B, H, W, 3], and these are {found}"
    )


def to_uint8(images: Tensor) -> np.ndarray:
    """Float [B, 3, H, W] in [0, 1] -> uint8 [B, H, W, 3], rounded: truncation would darken by half a level."""
    return images.float().mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def rounded_up(images: Tensor) -> np.ndarray:
    """Which values `to_uint8` raised: a bit each, packed by image, uint8 [B, ceil(H * W * 3 / 8)]."""
    scaled = images.float().mul(255)
    bits = (scaled.round() > scaled).permute(0, 2, 3, 1).flatten(1)
    return np.packbits(bits.cpu().numpy(), axis=1)
