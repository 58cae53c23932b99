"""The discriminator of the decoder's adversarial loss: small heads on frozen features (as in StyleGAN-T and VAR).

`dino` is the published recipe, heads on a DINO ViT, whose weights are on few machines. `encoder` has the same heads on
feature maps of an encoder that is there anyway. Neither stands in for the other.

Head names are those of the official release (`bytetriper/RAE`, `src/disc/dinodisc.py`); DINO's names are its own.

Shapes: B images, S pixels along a side, D a feature's width, N positions of it: of DINO, patches of a 224 pixel image.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.utils import spectral_norm

from rae.stages.models.backbones import read_state_dict
from rae.stages.models.encoders import Encoder
from rae.stages.models.saving import check_weights
from rae.store.errors import ConfigError

INPUT_SIZE = 224
# Blocks whose output a head reads; the last block's is read twice, the first time by the first head.
HEAD_BLOCKS = (11, 2, 5, 8, 11)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

BACKBONES: dict[str, dict[str, Any]] = {
    "S_8": {"patch_size": 8, "embed_dim": 384, "num_heads": 6},
    "S_16": {"patch_size": 16, "embed_dim": 384, "num_heads": 6},
    "B_16": {"patch_size": 16, "embed_dim": 768, "num_heads": 12},
}

GROUPS = 32  # of channels, in a group norm
NormType = Literal["bn", "gn"]


class Discriminator(nn.Module, ABC):
    """Images [B, 3, S, S] in [-1, 1] -> logits [B, sum of N], one per head and position; larger is more real.

    Only `heads` is trained and saved; in training mode each forward pass takes one step of their spectral norms' power
    iteration, so put them in eval mode for the generator's loss. `widths` are those of the features, one per head.
    """

    description: str

    def __init__(self, widths: Sequence[int], ks: int, norm_type: NormType, using_spec_norm: bool) -> None:
        super().__init__()
        self.heads = nn.ModuleList(_head(D, ks, norm_type, using_spec_norm) for D in widths)

    @abstractmethod
    def features(self, images: Tensor) -> list[Tensor]:
        """[B, 3, S, S] in [-1, 1] -> what each head reads: [B, D, N], positions row by row."""

    @property
    def blocks(self) -> Iterable[nn.Module]:
        """The parts of the frozen network that `torch.compile` is applied to, one by one."""
        return ()

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, S, S] of any S -> [B, sum of N], head after head."""
        features = self.features(images)
        return torch.cat([head(feature).flatten(1) for head, feature in zip(self.heads, features, strict=True)], dim=1)


class EncoderDiscriminator(Discriminator):
    """Heads on the feature maps of a frozen encoder: those that its perceptual distance compares, one head each.

    Raises `ConfigError` for widths that `norm_type` gn cannot group, and for a kernel that wraps around a whole map.
    """

    def __init__(self, encoder: Encoder, ks: int = 9, norm_type: NormType = "bn", using_spec_norm: bool = True) -> None:
        with torch.no_grad():
            seen = encoder.features(torch.zeros(1, 3, encoder.input_size, encoder.input_size, device=encoder.device))
        widths = [feature.shape[1] for feature in seen]
        if norm_type == "gn" and any(D % GROUPS for D in widths):
            raise ConfigError(
                f"`norm_type: gn` makes {GROUPS} groups of channels, and the features of {encoder.info.name} have"
                f" {', '.join(map(str, widths))}: leave it at `bn`"
            )
        fewest = min(feature[0, 0].numel() for feature in seen)
        if ks // 2 > fewest:
            raise ConfigError(
                f"`ks` {ks} wraps around the {fewest} positions of {encoder.info.name}'s smallest feature map: take"
                f" {2 * fewest + 1} or less"
            )
        super().__init__(widths, ks, norm_type, using_spec_norm)
        self.encoder = encoder
        maps = "the tokens" if len(widths) == 1 else f"the {len(widths)} finest feature maps"
        self.description = f"{maps} of {encoder.info.name} at {encoder.input_size} pixels"

    def features(self, images: Tensor) -> list[Tensor]:
        """The encoder's maps, finest first; the encoder resizes."""
        return [feature.flatten(2) for feature in self.encoder.features((images + 1) / 2)]


class DinoDiscriminator(Discriminator):
    """Heads on five blocks of DINO: [B, 3, S, S] in [-1, 1] -> [B, 5 * N]. `recipe` says which DINO."""

    scale: Tensor
    shift: Tensor

    def __init__(
        self, recipe: str = "S_8", ks: int = 9, norm_type: NormType = "bn", using_spec_norm: bool = True
    ) -> None:
        # The backbone is drawn first, as officially: the heads' initial weights follow from the same seed.
        tanh_gelu: Any = partial(nn.GELU, approximate="tanh")
        backbone = VisionTransformer(
            img_size=INPUT_SIZE, depth=12, num_classes=0, act_layer=tanh_gelu, **BACKBONES[recipe]
        )
        super().__init__([BACKBONES[recipe]["embed_dim"]] * len(HEAD_BLOCKS), ks, norm_type, using_spec_norm)
        self.backbone = backbone.requires_grad_(False)
        self.description = f"DINO {recipe}"
        mean, std = (torch.tensor(values).reshape(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
        self.register_buffer("scale", 0.5 / std, persistent=False)
        self.register_buffer("shift", (0.5 - mean) / std, persistent=False)

    def load_backbone(self, path: str | Path) -> None:
        """Loads DINO's weights (`dino_vit_small_patch8_224.pth`).

        The keys' biases, which no softmax over keys can see, are zeroed as officially.

        Raises:
            CorruptData: other weights than the backbone's.
        """
        state = read_state_dict(Path(path))
        for name, tensor in state.items():
            if name.endswith("attn.qkv.bias"):
                tensor[len(tensor) // 3 : 2 * len(tensor) // 3] = 0
        check_weights(state, self.backbone.state_dict(), str(path), "the discriminator's backbone")
        self.backbone.load_state_dict(state)

    @property
    def blocks(self) -> Iterable[nn.Module]:
        """The transformer's."""
        return self.backbone.blocks

    def features(self, images: Tensor) -> list[Tensor]:
        """The patch tokens after the blocks that heads read, of the image resized."""
        resized = F.interpolate(images, size=(INPUT_SIZE, INPUT_SIZE), mode="bilinear", align_corners=False)
        normalised = self.scale * resized + self.shift
        blocks = sorted(set(HEAD_BLOCKS))
        outputs: Any = self.backbone.forward_intermediates(
            normalised, indices=blocks, norm=False, output_fmt="NLC", intermediates_only=True
        )  # [B, N, D] each, without the class token
        tokens: dict[int, Tensor] = dict(zip(blocks, outputs, strict=True))
        return [tokens[block].transpose(1, 2) for block in HEAD_BLOCKS]


class ScaledResidual(nn.Module):
    """x -> (x + fn(x)) / sqrt(2): keeps the variance."""

    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        """Any shape that `fn` keeps -> the same."""
        grown: Tensor = (x + self.fn(x)) * (1 / math.sqrt(2))
        return grown


class TokenNorm(nn.Module):
    """[B, D, N] -> every channel of every image with mean 0 and variance 1 over its tokens, then affine.

    Batch norm over a virtual batch of one image: instance norm, rounded as the official release rounds.
    """

    def __init__(self, channels: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """[B, D, N] -> the same, float32."""
        x = x.float()
        mean, var = x.mean(dim=2, keepdim=True), x.var(dim=2, keepdim=True, unbiased=False)
        return (x - mean) / torch.sqrt(var + self.eps) * self.weight[:, None] + self.bias[:, None]


def _head(D: int, ks: int, norm_type: NormType, using_spec_norm: bool) -> nn.Sequential:
    """[B, D, N] -> [B, 1, N]."""

    def convolution(channels: int, kernel_size: int) -> nn.Module:
        layer = nn.Conv1d(D, channels, kernel_size, padding=kernel_size // 2, padding_mode="circular")
        return spectral_norm(layer) if using_spec_norm else layer

    def block(kernel_size: int) -> nn.Sequential:
        norm = TokenNorm(D, eps=1e-6) if norm_type == "bn" else nn.GroupNorm(GROUPS, D, eps=1e-6)
        return nn.Sequential(convolution(D, kernel_size), norm, nn.LeakyReLU(0.2))

    return nn.Sequential(block(1), ScaledResidual(block(ks)), convolution(1, 1))
