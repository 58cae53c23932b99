"""The diffusion transformers: DiT-DH (a wide, shallow head on a DiT body) and the plain LightningDiT.

Both take noisy latents, times and labels to a prediction of the latents' shape; `transport` says what it means. Equal
to the official release number for number and key for key (`DiTwDDTHead`, `LightningDiT` of `bytetriper/RAE`), except
that labels are dropped by the trainer, not in here: `model(x, t, y)` is a function of its arguments and weights.
"""

from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from difflib import get_close_matches
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from rae.stages.models.layers import (
    Block,
    FinalLayer,
    LabelEmbed,
    PatchEmbed,
    RotaryPositions,
    TimeEmbed,
    VectorEmbed,
    sincos_positions,
    unpatchify,
    zero_bias,
)
from rae.store.errors import ConfigError

ModelName = Literal["DiT-DH", "LightningDiT"]


@dataclass(frozen=True, kw_only=True)
class DiTConfig:
    """Sizes of a diffusion transformer. `hidden_size`, `depth` and `num_heads` are (body, head) for DiT-DH.

    `input_size` is the side of the latent's grid, `in_channels` its channels. With `num_classes` 0 the model is
    unconditional and `y` is all zeros; or, with a `conditioning_dim`, `y` is vectors [B, D], of which NaN asks for
    nothing. Raises `ConfigError` where the sizes do not fit each other.
    """

    model: ModelName
    in_channels: int
    input_size: int
    patch_size: int = 1
    hidden_size: tuple[int, ...]
    depth: tuple[int, ...]
    num_heads: tuple[int, ...]
    mlp_ratio: float = 4.0
    class_dropout_prob: float = 0.1
    num_classes: int
    use_qknorm: bool = False
    conditioning_dim: int = 0

    def __post_init__(self) -> None:
        if self.model not in get_args(ModelName):
            raise ConfigError(f"`model` is {self.model!r}; it must be one of {', '.join(get_args(ModelName))}")
        parts = 2 if self.model == "DiT-DH" else 1
        for name in ("hidden_size", "depth", "num_heads"):
            if len(getattr(self, name)) != parts:
                raise ConfigError(f"`{name}` needs {parts} number(s) for {self.model}: {list(getattr(self, name))}")
        for width, num_heads in zip(self.hidden_size, self.num_heads, strict=True):
            if width % (4 * num_heads):
                raise ConfigError(f"`hidden_size` {width} is not a multiple of 4 x `num_heads` {num_heads}")
        if self.input_size % self.patch_size:
            raise ConfigError(f"`input_size` {self.input_size} is not a multiple of `patch_size` {self.patch_size}")

    @property
    def grid(self) -> int:
        """Tokens along a side."""
        return self.input_size // self.patch_size

    @property
    def token_width(self) -> int:
        """Numbers in a token of the latent."""
        return self.in_channels * self.patch_size**2

    @property
    def has_null_label(self) -> bool:
        """Whether label `num_classes`, "no label", has a row of its own."""
        return self.class_dropout_prob > 0 or self.num_classes == 0

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; without a `conditioning_dim` of 0, which most know nothing of."""
        values = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
        if not self.conditioning_dim:
            del values["conditioning_dim"]
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`. Raises `ConfigError` for unknown and missing keys."""
        known = {field.name: field for field in fields(cls)}
        for key in values:
            if key not in known:
                near = get_close_matches(key, known, n=1)
                raise ConfigError(f"A DiT has no setting `{key}`" + (f"; did you mean `{near[0]}`?" if near else ""))
        missing = [key for key, field in known.items() if field.default is MISSING and key not in values]
        if missing:
            raise ConfigError(f"A DiT's configuration lacks {', '.join(f'`{key}`' for key in missing)}")
        given: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
        }
        return cls(**given)


def build_dit(config: DiTConfig) -> "DiTDH | LightningDiT":
    """A freshly initialised model; draws from torch's global generator. `float32`, on the default device."""
    return DiTDH(config) if config.model == "DiT-DH" else LightningDiT(config)


def condition_embed(config: DiTConfig, width: int) -> LabelEmbed | VectorEmbed:
    """What embeds `y`, for a body of this width."""
    if config.conditioning_dim:
        return VectorEmbed(config.conditioning_dim, width)
    return LabelEmbed(config.num_classes + config.has_null_label, width)


class LightningDiT(nn.Module):
    """DiT with RMSNorm, SwiGLU and rotary positions (Yao et al., "Reconstruction vs. Generation", 2025)."""

    pos_embed: Tensor

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        (width,), (depth,), (num_heads,) = config.hidden_size, config.depth, config.num_heads
        self.config = config
        self.grad_checkpoint = False
        self.x_embedder = PatchEmbed(config.in_channels, config.patch_size, width)
        self.t_embedder = TimeEmbed(width)
        self.y_embedder = condition_embed(config, width)
        self.register_buffer("pos_embed", sincos_positions(width, config.grid))
        self.feat_rope = RotaryPositions(width // num_heads, config.grid)
        self.blocks = nn.ModuleList(Block(width, num_heads, config.mlp_ratio, config.use_qknorm) for _ in range(depth))
        self.final_layer = FinalLayer(width, config.token_width)
        self.reset()

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Latents [B, C, H, W], times [B] in [0, 1], labels [B] int64 or vectors [B, D] -> [B, C, H, W]."""
        condition = (self.t_embedder(t) + self.y_embedder(y)).unsqueeze(1)
        tokens = self.x_embedder(x) + self.pos_embed
        tokens = run_blocks(self.blocks, tokens, condition, self.feat_rope, self.grad_checkpoint)
        return unpatchify(self.final_layer(tokens, condition), self.config.grid, self.config.patch_size)

    def reset(self) -> None:
        """The official initialisation: Xavier everywhere, identity blocks, zero output."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                zero_bias(module)
        reset_ends(self)


class DiTDH(nn.Module):
    """DiT with a wide, shallow head (RAE paper, section 5; the split is DDT's, Wang et al., 2025).

    The body sees the noisy tokens and writes, for each, the condition s under which the head denoises it.
    """

    pos_embed: Tensor

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        (body_width, head_width), (body_depth, head_depth) = config.hidden_size, config.depth
        (body_heads, head_heads) = config.num_heads
        self.config = config
        self.grad_checkpoint = False
        self.x_embedder = PatchEmbed(config.in_channels, config.patch_size, head_width)
        self.s_embedder = PatchEmbed(config.in_channels, config.patch_size, body_width)
        self.s_projector = nn.Linear(body_width, head_width) if body_width != head_width else nn.Identity()
        self.t_embedder = TimeEmbed(body_width)
        self.y_embedder = condition_embed(config, body_width)
        self.register_buffer("pos_embed", sincos_positions(body_width, config.grid))
        self.enc_feat_rope = RotaryPositions(body_width // body_heads, config.grid)
        self.dec_feat_rope = RotaryPositions(head_width // head_heads, config.grid)
        body = [Block(body_width, body_heads, config.mlp_ratio, config.use_qknorm) for _ in range(body_depth)]
        head = [Block(head_width, head_heads, config.mlp_ratio, config.use_qknorm) for _ in range(head_depth)]
        self.blocks = nn.ModuleList(body + head)
        self.final_layer = FinalLayer(head_width, config.token_width)
        self.reset()

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Latents [B, C, H, W], times [B] in [0, 1], labels [B] int64 or vectors [B, D] -> [B, C, H, W]."""
        blocks, body_depth = list(self.blocks), self.config.depth[0]
        time = self.t_embedder(t).unsqueeze(1)
        condition = F.silu(time + self.y_embedder(y).unsqueeze(1))
        body = self.s_embedder(x) + self.pos_embed
        body = run_blocks(blocks[:body_depth], body, condition, self.enc_feat_rope, self.grad_checkpoint)
        per_token = self.s_projector(F.silu(time + body))
        head = self.x_embedder(x)
        head = run_blocks(blocks[body_depth:], head, per_token, self.dec_feat_rope, self.grad_checkpoint)
        return unpatchify(self.final_layer(head, per_token), self.config.grid, self.config.patch_size)

    def reset(self) -> None:
        """The official initialisation: torch's for linear layers, identity blocks, zero output."""
        self.s_embedder.reset()
        reset_ends(self)


def run_blocks(
    blocks: Iterable[nn.Module], tokens: Tensor, condition: Tensor, positions: RotaryPositions, grad_checkpoint: bool
) -> Tensor:
    """Tokens [B, N, D] through the blocks; with `grad_checkpoint` activations are recomputed in the backward pass."""
    for block in blocks:
        if grad_checkpoint and torch.is_grad_enabled():
            tokens = checkpoint(block, tokens, condition, positions, use_reentrant=False)
        else:
            tokens = block(tokens, condition, positions)
    return tokens


def reset_ends(model: LightningDiT | DiTDH) -> None:
    """What both initialisations end with: embedders, identity blocks, zero output."""
    model.x_embedder.reset()
    model.y_embedder.reset()
    model.t_embedder.reset()
    for module in model.modules():
        if isinstance(module, Block):
            module.reset()
    model.final_layer.reset()
