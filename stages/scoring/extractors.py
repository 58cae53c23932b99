"""Networks that turn images into the features which Fréchet distances, precision and recall are taken in.

Images are uint8 [N, H, W, 3] in numpy. The features of an image must not depend on how many others the caller hands
over with it, and convolution kernels change last bits with the batch size: so every network runs on blocks of
`BLOCK_SIZE` images in the order of their index, the last block padded.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from rae.store.errors import StaleInput

BLOCK_SIZE = 16
"""Images that pass the network together. Part of the protocol: another size gives other last bits."""

Resize = Literal["bicubic-clamped", "bicubic", "pillow-bicubic", "own"]
_RESIZES: dict[Resize, str] = {
    "bicubic-clamped": "bicubic, antialiased, float32, clamped",
    "bicubic": "bicubic, antialiased, float32",
    "pillow-bicubic": "bicubic of Pillow, antialiased, uint8",
    "own": "the network's own",
}


@dataclass(frozen=True)
class Preprocessing:
    """From pixels to what the network takes: a resize to `input_size` squared, then `mean` and `std` of [0, 1].

    `bicubic` has a = -0.5 and antialiases what shrinks, as Pillow does; `bicubic-clamped` keeps it within the range of
    pixels, unrounded; `pillow-bicubic` rounds to whole grey levels. `own` hands over uint8 pixels as they are, and the
    network does the rest: `described` then says what that is.
    """

    resize: Resize
    input_size: int | None = None
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    described: str | None = None

    @property
    def description(self) -> str:
        """What scores say of it."""
        return self.described or _RESIZES[self.resize]

    def __call__(self, pixels: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] -> float32 [B, 3, S, S], or the pixels themselves for `own`."""
        if self.resize == "own" or self.input_size is None:
            return pixels
        resized = self._resized(pixels, self.input_size)
        mean, std = (torch.tensor(values, device=pixels.device).view(3, 1, 1) for values in (self.mean, self.std))
        return (resized / 255 - mean) / std

    def _resized(self, pixels: Tensor, side: int) -> Tensor:
        if pixels.shape[2:] == (side, side):
            return pixels.float()
        if self.resize == "pillow-bicubic":
            images = (Image.fromarray(one) for one in pixels.permute(0, 2, 3, 1).cpu().numpy())
            small = np.stack([np.asarray(one.resize((side, side), Image.Resampling.BICUBIC)) for one in images])
            return torch.from_numpy(small).to(pixels.device).permute(0, 3, 1, 2).float()
        resized = F.interpolate(pixels.float(), (side, side), mode="bicubic", antialias=True, align_corners=False)
        return resized.clamp(0, 255) if self.resize == "bicubic-clamped" else resized


class Extractor:
    """A frozen network that maps images of any one size to features [N, dim], float32.

    `network` takes what `preprocessing` makes of [B, 3, H, W] uint8 to [B, dim]. `digest` is the sha256 of its weights.
    `head` [C, dim], of Inception alone, takes features to the logits (without bias) of the Inception Score.
    """

    def __init__(
        self,
        name: str,
        network: nn.Module,
        preprocessing: Preprocessing,
        *,
        dim: int,
        digest: str,
        head: NDArray[np.float32] | None = None,
        device: str = "cpu",
    ) -> None:
        self.name = name
        self.dim = dim
        self.digest = digest
        self.preprocessing = preprocessing
        self.head = head
        self._device = torch.device(device)
        self._network = network.eval().requires_grad_(False).to(self._device)

    def protocol(self) -> dict[str, str | int | None]:
        """What two scores must have in common to be compared; `digest` is the sha256 of the weights."""
        return {
            "name": self.name,
            "digest": self.digest,
            "resize": self.preprocessing.description,
            "input_size": self.preprocessing.input_size,
            "block_size": BLOCK_SIZE,
        }

    def __call__(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Features [N, dim] of images [N, H, W, 3]. Raises StaleInput for images that are not uint8 RGB."""
        blocks = list(self.stream([images]))
        return np.concatenate(blocks) if blocks else np.empty((0, self.dim), np.float32)

    def stream(self, batches: Iterable[NDArray[np.uint8]]) -> Iterator[NDArray[np.float32]]:
        """Features of images that arrive in batches of any size: one array [<= BLOCK_SIZE, dim] after another.

        Bit for bit those of the same images in one piece. Holds one block in memory besides the caller's batch.
        """
        for block in _blocks(batches):
            yield self.block(block)

    @torch.inference_mode()
    def block(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Features [B, dim] of at most `BLOCK_SIZE` images, padded to that many on their way."""
        padding = np.zeros((BLOCK_SIZE - len(images), *images.shape[1:]), np.uint8)
        pixels = torch.from_numpy(np.concatenate([images, padding])).to(self._device).permute(0, 3, 1, 2)
        inputs = self.preprocessing(pixels.contiguous())
        if inputs.is_floating_point():
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        # On a GPU, TF32 convolutions and autotuned kernels would make features depend on the card and the run.
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            features: NDArray[np.float32] = self._network(inputs).float().cpu().numpy()
        return features[: len(images)]


def _blocks(batches: Iterable[NDArray[np.uint8]]) -> Iterator[NDArray[np.uint8]]:
    """The same images in the same order, `BLOCK_SIZE` at a time; the last block may be shorter."""
    waiting: NDArray[np.uint8] | None = None
    for batch in batches:
        if batch.dtype != np.uint8 or batch.ndim != 4 or batch.shape[3] != 3:
            raise StaleInput(f"Features are taken of uint8 images [N, H, W, 3], got {batch.dtype} {batch.shape}.")
        if waiting is not None and batch.shape[1:] != waiting.shape[1:]:
            raise StaleInput(f"Images of one set have one size, got {waiting.shape[1:3]} and then {batch.shape[1:3]}.")
        waiting = batch if waiting is None else np.concatenate([waiting, batch])
        full = len(waiting) - len(waiting) % BLOCK_SIZE
        for start in range(0, full, BLOCK_SIZE):
            yield waiting[start : start + BLOCK_SIZE]
        waiting = waiting[full:]
    if waiting is not None and len(waiting):
        yield waiting
