"""Perceptual distances between a reconstruction and its image, for training the decoder (RAE paper, section 3).

`lpips` is the published recipe; its VGG weights are on few machines and are never fetched unasked. `encoder` compares
feature maps of an encoder that is there anyway. `none` leaves the pixels alone. None of them stands in for another.
"""

import hashlib
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rae.stages.models.backbones import read_state_dict
from rae.stages.models.encoders import Encoder
from rae.stages.models.weights import digest_file, locate_lpips
from rae.store.errors import ConfigError, CorruptData


def build_perceptual(
    kind: Literal["lpips", "encoder", "none"], encoder: Encoder | None, lpips_weights: str | None
) -> "LpipsDistance | EncoderDistance | None":
    """The distance called `kind`: a module (reconstruction, target), both [B, 3, S, S] in [0, 1] -> distances [B].

    It carries `digest`, one sha256 over the weights it rests on, and `description`, for the manifest.

    Args:
        kind: which one.
        encoder: what `encoder` compares with.
        lpips_weights: torchvision's VGG-16 file for `lpips`; by default the one in torch hub's cache.

    Raises:
        ConfigError: `encoder` without an encoder, or weights given for another distance than `lpips`.
        MissingInput: no VGG-16 weights on this machine.
        CorruptData: weights that are not torchvision's VGG-16.
    """
    if lpips_weights is not None and kind != "lpips":
        raise ConfigError(f"`lpips_weights` has no part in `perceptual_loss: {kind}`")
    if kind == "lpips":
        return LpipsDistance(locate_lpips(lpips_weights))
    if kind == "encoder":
        if encoder is None:
            raise ConfigError("`perceptual_loss: encoder` needs an encoder to compare with")
        return EncoderDistance(encoder)
    return None


class EncoderDistance(nn.Module):
    """Distance of unit-normalised features (the form of LPIPS, Zhang et al. 2018, eq. 1, with all weights one).

    Squared differences, summed over channels and averaged over positions and maps: between 0 and 4. Images are resized
    to the encoder's input size by the encoder. The target takes no gradient.
    """

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.digest = encoder.digest
        index = encoder.info.feature_index
        maps = "the tokens" if index is None else f"the {index + 1} finest feature maps"
        self.description = f"unit-normalised distance of {maps} of {encoder.info.name} at {encoder.input_size} pixels"

    def forward(self, reconstruction: Tensor, target: Tensor) -> Tensor:
        """Images [B, 3, S, S] in [0, 1] -> distances float32 [B]."""
        with torch.no_grad():
            wanted = self.encoder.features(target)
        found = self.encoder.features(reconstruction)
        distances = [
            (F.normalize(a, dim=1) - F.normalize(b, dim=1)).square().sum(dim=1).mean(dim=(1, 2))
            for a, b in zip(found, wanted, strict=True)
        ]
        return torch.stack(distances).mean(dim=0)


class LpipsDistance(nn.Module):
    """LPIPS (Zhang et al. 2018) on VGG-16, version 0.1, of images scaled to [-1, 1]; summed over its five layers."""

    def __init__(self, vgg_file: Path) -> None:
        super().__init__()
        import lpips  # brings torchvision, which only this distance needs

        linear_file = Path(lpips.__file__).parent / "weights" / "v0.1" / "vgg.pth"
        with torch.device("meta"), warnings.catch_warnings():  # else 138 million numbers are drawn to be overwritten
            warnings.filterwarnings("ignore", module="torchvision")  # of arguments that the package passes
            network = lpips.LPIPS(net="vgg", pretrained=False, pnet_rand=True, verbose=False)
        network.load_state_dict(_lpips_state(network, vgg_file, linear_file), strict=True, assign=True)
        self.network = network.requires_grad_(False).eval()
        digests = digest_file(vgg_file) + digest_file(linear_file)
        self.digest = hashlib.sha256(digests.encode()).hexdigest()
        self.description = f"LPIPS of VGG-16, package lpips {version('lpips')}"

    def train(self, mode: bool = True) -> "LpipsDistance":
        """Stays in eval mode: the linear layers' dropout is for fitting them."""
        return super().train(False)

    def forward(self, reconstruction: Tensor, target: Tensor) -> Tensor:
        """Images [B, 3, S, S] in [0, 1] -> distances float32 [B]."""
        distances: Tensor = self.network(reconstruction, target, normalize=True)
        return distances.flatten().float()


def _lpips_state(network: nn.Module, vgg_file: Path, linear_file: Path) -> dict[str, Tensor]:
    """The state dict of the package's LPIPS, from torchvision's VGG-16 and the package's linear layers.

    `net.slice3.12.weight` there is `features.12.weight` in torchvision; `lins.0` and `lin0` are one module.
    """
    vgg, linear = read_state_dict(vgg_file), read_state_dict(linear_file)
    state: dict[str, Tensor] = {}
    for name, empty in network.state_dict().items():
        part, _, rest = name.partition(".")
        if part == "scaling_layer":
            state[name] = empty  # two constants of the package, not weights
        elif part == "net":
            state[name] = _tensor(vgg, f"features.{rest.partition('.')[2]}", empty, vgg_file)
        else:
            state[name] = _tensor(linear, name.replace("lins.", "lin"), empty, linear_file)
    return state


def _tensor(tensors: dict[str, Tensor], name: str, empty: Tensor, path: Path) -> Tensor:
    if name not in tensors or tensors[name].shape != empty.shape:
        raise CorruptData(f"{path} lacks the tensor `{name}` of shape {list(empty.shape)} that LPIPS on VGG-16 reads")
    return tensors[name]
