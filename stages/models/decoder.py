"""The ViT decoder of a representation autoencoder (RAE paper, section 3): encoder tokens in, pixels out.

Also what stands between stored tokens and models: whitening, its inverse, and the noise that the decoder is trained
with. Module names are those of the official release (`bytetriper/RAE`, `src/stage1/decoders`), so that its checkpoints
load as they are.

Shapes: B images, C token width, H = W = grid side, N = H * W tokens, D decoder width, P patch side, S = H * P pixels.
"""

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rae.stages.models import layers
from rae.store.errors import ConfigError
from rae.store.stats import EPSILON


@dataclass(frozen=True)
class DecoderConfig:
    """Everything that builds a `ViTDecoder`. `sizes.VIT_SIZES` has the transformer's numbers for S, B, L and XL.

    Attributes:
        token_dim: width C of an encoder token.
        grid: tokens along one side of the image.
        hidden_size, depth, num_heads, intermediate_size: the transformer's width, blocks, heads and MLP width.
        patch_size: pixels along one side of the patch that a token becomes.
        image_mean, image_std: the encoder's normalisation, undone on the way out.
        layer_norm_eps: 1e-12, as in ViT-MAE.

    Raises:
        ConfigError: sizes that do not fit each other.
    """

    token_dim: int
    grid: int
    hidden_size: int
    depth: int
    num_heads: int
    intermediate_size: int
    patch_size: int
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    layer_norm_eps: float = 1e-12

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads:
            raise ConfigError(
                f"the decoder's `hidden_size` {self.hidden_size} is not a multiple of `num_heads` {self.num_heads}"
            )
        if self.hidden_size % 4:
            raise ConfigError(
                f"the decoder's `hidden_size` {self.hidden_size} is not a multiple of 4, which its sine and cosine"
                " positions along two axes need"
            )

    @property
    def image_size(self) -> int:
        """Pixels along one side of the image."""
        return self.grid * self.patch_size

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; `from_dict` undoes it."""
        values = dataclasses.asdict(self)
        return values | {"image_mean": list(self.image_mean), "image_std": list(self.image_std)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The configuration that `to_dict` wrote.

        Raises:
            ConfigError: an unknown or a missing key.
        """
        fields = {field.name: field for field in dataclasses.fields(cls)}
        for key in values:
            if key not in fields:
                close = difflib.get_close_matches(key, fields, n=1)
                hint = f"; did you mean `{close[0]}`?" if close else ""
                raise ConfigError(f"a decoder's configuration has no key `{key}`{hint}")
        for name, field in fields.items():
            if name not in values and field.default is dataclasses.MISSING:
                raise ConfigError(f"a decoder's configuration lacks its key `{name}`")
        mean, std = (tuple(float(number) for number in values[key]) for key in ("image_mean", "image_std"))
        return cls(**{**values, "image_mean": mean, "image_std": std})


def whiten(tokens: Tensor, mean: Tensor | None, var: Tensor, eps: float = EPSILON) -> Tensor:
    """Raw tokens [B, C, H, W] -> (tokens - mean) / sqrt(var + eps); `mean` (may be absent) and `var` are [C, H, W]."""
    centred = tokens if mean is None else tokens - mean
    return centred / torch.sqrt(var + eps)


def unwhiten(tokens: Tensor, mean: Tensor | None, var: Tensor, eps: float = EPSILON) -> Tensor:
    """Whitened tokens [B, C, H, W] -> raw ones: the inverse of `whiten` with the same statistics."""
    scaled = tokens * torch.sqrt(var + eps)
    return scaled if mean is None else scaled + mean


def noise_tokens(tokens: Tensor, tau: float, uniform: Tensor, normal: Tensor) -> Tensor:
    """Noise-augmented decoding (RAE paper, section 4.3): raw tokens + sigma * normal, sigma = tau * uniform per image.

    The draws are the caller's, so that they can be a function of (seed, purpose, epoch, row).

    Args:
        tokens: raw encoder tokens [B, C, H, W].
        tau: the largest noise level, in units of a token's scale; 0.8 in the paper.
        uniform: [B], in [0, 1).
        normal: standard normal, of the tokens' shape.
    """
    sigma = (tau * uniform).reshape(-1, *(1,) * (tokens.dim() - 1))
    return tokens + sigma * normal


def sincos_positions(dim: int, grid: int, spacing: float = 1.0) -> Tensor:
    """The fixed position table of ViT-MAE [1, 1 + grid * grid, dim]: zeros for the class token, then the grid's."""
    return torch.cat([torch.zeros(1, 1, dim), layers.sincos_positions(dim, grid, spacing)], dim=1)


class DecoderAttention(nn.Module):
    """Multi-head self-attention with biases everywhere."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        D = config.hidden_size
        self.num_heads = config.num_heads
        self.attention = nn.ModuleDict({name: nn.Linear(D, D) for name in ("query", "key", "value")})
        self.output = nn.ModuleDict({"dense": nn.Linear(D, D)})

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        query, key, value = (
            self.attention[name](x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for name in ("query", "key", "value")
        )  # [B, heads, N, D / heads] each
        attended = F.scaled_dot_product_attention(query, key, value)
        mixed: Tensor = self.output["dense"](attended.transpose(1, 2).flatten(2))
        return mixed


class DecoderBlock(nn.Module):
    """A pre-norm transformer block with exact GELU (ViT-MAE, He et al., 2022)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        D, hidden, eps = config.hidden_size, config.intermediate_size, config.layer_norm_eps
        self.attention = DecoderAttention(config)
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(D, hidden)})
        self.output = nn.ModuleDict({"dense": nn.Linear(hidden, D)})
        self.layernorm_before = nn.LayerNorm(D, eps=eps)
        self.layernorm_after = nn.LayerNorm(D, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        x = x + self.attention(self.layernorm_before(x))
        hidden = F.gelu(self.intermediate["dense"](self.layernorm_after(x)))
        grown: Tensor = x + self.output["dense"](hidden)
        return grown


class ViTDecoder(nn.Module):
    """Raw encoder tokens [B, C, H, W] -> images [B, 3, S, S], about [0, 1] and not clamped.

    Set `grad_checkpoint` to recompute each block in the backward pass: less memory, a third more time.
    """

    decoder_pos_embed: Tensor
    image_mean: Tensor
    image_std: Tensor

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.grad_checkpoint = False
        D = config.hidden_size
        self.decoder_embed = nn.Linear(config.token_dim, D)
        self.trainable_cls_token = nn.Parameter(torch.zeros(1, 1, D))
        self.register_buffer("decoder_pos_embed", sincos_positions(D, config.grid))
        self.decoder_layers = nn.ModuleList(DecoderBlock(config) for _ in range(config.depth))
        self.decoder_norm = nn.LayerNorm(D, eps=config.layer_norm_eps)
        self.decoder_pred = nn.Linear(D, 3 * config.patch_size**2)
        # Known from the configuration, and absent from the official state dict.
        self.register_buffer("image_mean", torch.tensor(config.image_mean).reshape(1, 3, 1, 1), persistent=False)
        self.register_buffer("image_std", torch.tensor(config.image_std).reshape(1, 3, 1, 1), persistent=False)

    @property
    def image_size(self) -> int:
        """Pixels along one side of the image."""
        return self.config.image_size

    @property
    def last_layer(self) -> Tensor:
        """The last linear weight [3 * P * P, D], where the adversarial loss is weighed against the others."""
        return self.decoder_pred.weight

    def patches(self, tokens: Tensor) -> Tensor:
        """Raw tokens [B, C, H, W] -> pixels of each patch [B, N, P * P * 3], in the encoder's normalisation.

        Raises:
            ValueError: tokens of another width or grid than the configuration's.
        """
        wanted = (self.config.token_dim, self.config.grid, self.config.grid)
        if tokens.shape[1:] != wanted:
            raise ValueError(f"this decoder takes tokens [B, {', '.join(map(str, wanted))}], not {list(tokens.shape)}")
        x = self.decoder_embed(tokens.flatten(2).transpose(1, 2))
        x = torch.cat([self.trainable_cls_token.expand(len(x), -1, -1), x], dim=1)
        x = x + self.decoder_pos_embed
        for block in self.decoder_layers:
            if self.grad_checkpoint and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        pixels: Tensor = self.decoder_pred(self.decoder_norm(x))
        return pixels[:, 1:]

    def forward(self, tokens: Tensor) -> Tensor:
        """Raw tokens [B, C, H, W] -> images [B, 3, S, S]; raises as `patches` does."""
        grid, side = self.config.grid, self.config.patch_size
        pixels = self.patches(tokens).reshape(-1, grid, grid, side, side, 3)  # [B, H, W, P, P, 3]
        images = pixels.permute(0, 5, 1, 3, 2, 4).reshape(-1, 3, grid * side, grid * side)
        return images * self.image_std + self.image_mean
