"""DiffAug: what the discriminator sees of an image, so that it cannot learn the images by heart (Zhao et al. 2020).

Translation and colour, as in the official recipe. The draws are the caller's, so that they can be a function of
(seed, purpose, epoch, row).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# What the numbers of an image decide. `translate` and `colour` are whether it is moved and recoloured at all.
DRAWS = ("translate", "down", "across", "colour", "brightness", "saturation", "contrast")
MAX_SHIFT = 1 / 8


def diff_augment(images: Tensor, draws: Tensor, prob: float) -> Tensor:
    """Images [B, 3, H, W] in [-1, 1] -> the same shape, differentiable; colours may leave the range.

    Each image is moved by up to an eighth of its size, zeros (grey) coming in, and changed in brightness by up to 0.5,
    in saturation by a factor up to 2 and in contrast by one of 0.5 to 1.5: each kind with probability `prob`.

    Args:
        images: what to augment.
        draws: uniform numbers in [0, 1), [B, 7], on the CPU; columns are named by `DRAWS`.
        prob: 0 changes nothing.
    """
    if not prob:
        return images
    # `<` leaves prob 1 certain.
    kinds = dict(zip(DRAWS, draws.unbind(1), strict=True))
    moved = _translate(images, kinds["translate"] < prob, kinds["down"], kinds["across"])
    chosen = [kinds[name].to(images.device)[:, None, None, None] for name in DRAWS[3:]]
    return torch.where(chosen[0] < prob, _recolour(moved, *chosen[1:]), moved)


def _translate(images: Tensor, chosen: Tensor, down: Tensor, across: Tensor) -> Tensor:
    height, width = images.shape[-2:]
    pad_y, pad_x = round(height * MAX_SHIFT), round(width * MAX_SHIFT)
    padded = F.pad(images, (pad_x, pad_x, pad_y, pad_y))
    # Where the image's corner lies in the padded one: the middle leaves it in place.
    tops = torch.where(chosen, (down * (2 * pad_y + 1)).floor(), pad_y).long().tolist()
    lefts = torch.where(chosen, (across * (2 * pad_x + 1)).floor(), pad_x).long().tolist()
    # Slices, because the backward pass of an index with one offset per image sums in no fixed order on a GPU.
    crops = zip(padded, tops, lefts, strict=True)
    return torch.stack([image[:, top : top + height, left : left + width] for image, top, left in crops])


def _recolour(images: Tensor, brightness: Tensor, saturation: Tensor, contrast: Tensor) -> Tensor:
    images = images + (brightness - 0.5)
    grey = images.mean(dim=1, keepdim=True)
    images = grey + 2 * saturation * (images - grey)
    level = images.mean(dim=(1, 2, 3), keepdim=True)
    return level + (contrast + 0.5) * (images - level)
