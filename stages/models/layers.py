"""Blocks that the diffusion transformers share.

Submodule names are those of the official release (`bytetriper/RAE`, `src/stage2/models`), because released checkpoints
are keyed by them. Everything constant (position tables, time frequencies) is a buffer: saved, never trained.

Shapes: B samples, N tokens, D width, H heads, K width of a head.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

TIME_FREQUENCIES = 256
POSITION_BASE = 10_000.0


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis, computed in float32 whatever the dtype of `x`."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> the same shape and dtype."""
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).type_as(x)


class RotaryPositions(nn.Module):
    """Rotary positions on a square grid (RoFormer, section 3.2, along two axes).

    Neighbouring pairs of a head's numbers are turned: those of the first half by the token's row, those of the second
    by its column. A head's width must be a multiple of 4.
    """

    freqs_cos: Tensor
    freqs_sin: Tensor

    def __init__(self, head_width: int, grid: int) -> None:
        super().__init__()
        axis = head_width // 2
        frequency = POSITION_BASE ** (-torch.arange(0, axis, 2, dtype=torch.float64) / axis)
        angle = (torch.arange(grid, dtype=torch.float64)[:, None] * frequency).repeat_interleave(2, dim=-1)
        rows = angle[:, None, :].expand(grid, grid, axis)
        columns = angle[None, :, :].expand(grid, grid, axis)
        angles = torch.cat([rows, columns], dim=-1).flatten(0, 1)
        self.register_buffer("freqs_cos", angles.cos().float())
        self.register_buffer("freqs_sin", angles.sin().float())

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, N, K] -> float32 of the same shape, turned."""
        if torch.compiler.is_compiling():  # the compiler fuses real arithmetic, and leaves complex numbers alone
            first, second = torch.unflatten(x, -1, (-1, 2)).unbind(-1)
            quarter_turn = torch.stack([-second, first], dim=-1).flatten(-2)
            return x * self.freqs_cos + quarter_turn * self.freqs_sin
        # A product of complex numbers: half the time of the same written out.
        turn = torch.complex(self.freqs_cos[:, ::2], self.freqs_sin[:, ::2])
        pairs = torch.view_as_complex(torch.unflatten(x.float(), -1, (-1, 2)))
        return torch.view_as_real(pairs * turn).flatten(-2)


class Attention(nn.Module):
    """Self-attention with rotary positions; `use_qknorm` normalises each head's queries and keys before the turn."""

    def __init__(self, width: int, num_heads: int, use_qknorm: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = RMSNorm(width // num_heads) if use_qknorm else nn.Identity()
        self.k_norm = RMSNorm(width // num_heads) if use_qknorm else nn.Identity()
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, positions: RotaryPositions) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        query, key, value = torch.unflatten(self.qkv(x), -1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        # Turned in float32, also under autocast, which gives the values another dtype.
        query = positions(self.q_norm(query)).type_as(value)
        key = positions(self.k_norm(key)).type_as(value)
        attended: Tensor = self.proj(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))
        return attended


class SwiGLU(nn.Module):
    """w3(silu(a) * b), (a, b) = w12(x) (Shazeer, "GLU Variants Improve Transformer")."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w12 = nn.Linear(width, 2 * hidden)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        gate, value = self.w12(x).chunk(2, dim=-1)
        out: Tensor = self.w3(F.silu(gate) * value)
        return out


class Block(nn.Module):
    """Transformer block with adaLN-zero (DiT, section 3.2): the condition gives shift, scale and gate of each half."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float, use_qknorm: bool) -> None:
        super().__init__()
        self.norm1 = RMSNorm(width)
        self.norm2 = RMSNorm(width)
        self.attn = Attention(width, num_heads, use_qknorm)
        self.mlp = SwiGLU(width, int(2 / 3 * int(width * mlp_ratio)))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, condition: Tensor, positions: RotaryPositions) -> Tensor:
        """Tokens [B, N, D] and their condition, [B, 1, D] for all or [B, N, D] for each -> [B, N, D]."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(condition).chunk(6, dim=-1)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1, positions)
        out: Tensor = x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)
        return out

    def reset(self) -> None:
        """Make the block the identity, so that training starts from one."""
        zero(self.adaLN_modulation[1])


class FinalLayer(nn.Module):
    """Modulated norm and the projection from width to the numbers of a patch."""

    def __init__(self, width: int, patch_numbers: int) -> None:
        super().__init__()
        self.norm_final = RMSNorm(width)
        self.linear = nn.Linear(width, patch_numbers)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """[B, N, D], [B, 1 or N, D] -> [B, N, patch_numbers]."""
        shift, scale = self.adaLN_modulation(condition).chunk(2, dim=-1)
        out: Tensor = self.linear(self.norm_final(x) * (1 + scale) + shift)
        return out

    def reset(self) -> None:
        """Make the model's first output zero."""
        zero(self.adaLN_modulation[1])
        zero(self.linear)


class PatchEmbed(nn.Module):
    """Non-overlapping patches, row by row, to tokens."""

    def __init__(self, in_channels: int, patch_size: int, width: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_channels, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, height, width], whole patches -> [B, N, D], in the dtype of `x`: it begins the residual stream."""
        B, C, H, W = x.shape
        size = self.patch_size
        patches = x.reshape(B, C, H // size, size, W // size, size).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        # As a matrix product: cuDNN would run the convolution in TF32 by default, and float32 would not mean float32.
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias).type_as(x)

    def reset(self) -> None:
        """Initialise as the linear layer that it is."""
        nn.init.xavier_uniform_(self.proj.weight.view(self.proj.weight.shape[0], -1))
        zero_bias(self.proj)


def unpatchify(tokens: Tensor, grid: int, patch_size: int) -> Tensor:
    """[B, grid^2, patch_size^2 * C], a patch's channels innermost -> [B, C, grid * patch_size, grid * patch_size]."""
    patches = tokens.reshape(-1, grid, grid, patch_size, patch_size, tokens.shape[-1] // patch_size**2)
    return patches.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


class TimeEmbed(nn.Module):
    """Gaussian Fourier features of t (Tancik et al., 2020) and an MLP. The frequencies `W` are drawn once and kept."""

    W: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("W", torch.randn(TIME_FREQUENCIES))
        self.mlp = nn.Sequential(nn.Linear(2 * TIME_FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        """Times [B] in [0, 1] -> [B, D]."""
        phase = t[:, None] * self.W * 2 * torch.pi
        out: Tensor = self.mlp(torch.cat([phase.sin(), phase.cos()], dim=-1))
        return out

    def reset(self) -> None:
        """Draw the weights, with standard deviation 0.02."""
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)


class LabelEmbed(nn.Module):
    """A row for each class and, where labels are dropped, a last one for "no label". Dropping is the trainer's."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(rows, width)

    def forward(self, y: Tensor) -> Tensor:
        """[B] int64 in [0, rows) -> [B, D]."""
        out: Tensor = self.embedding_table(y)
        return out

    def reset(self) -> None:
        """Draw the table, with standard deviation 0.02."""
        nn.init.normal_(self.embedding_table.weight, std=0.02)


class VectorEmbed(nn.Module):
    """A vector's projection; for a row of NaN, which asks for nothing, a learned vector. Dropping is the trainer's."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.projection = nn.Linear(dim, width)
        self.null = nn.Parameter(torch.zeros(width))

    def forward(self, y: Tensor) -> Tensor:
        """[B, dim] -> [B, D]."""
        out: Tensor = torch.where(y.isnan().any(1, keepdim=True), self.null, self.projection(y.nan_to_num()))
        return out

    def reset(self) -> None:
        """Begin as a table of labels does, at a standard deviation of 0.02."""
        nn.init.normal_(self.null, std=0.02)
        nn.init.normal_(self.projection.weight, std=0.02 / self.projection.in_features**0.5)
        nn.init.zeros_(self.projection.bias)


def sincos_positions(width: int, grid: int, spacing: float = 1.0) -> Tensor:
    """Fixed positions (Transformer, section 3.5, along two axes), [1, grid^2, width]: columns, then rows.

    Each half is the sines of all its frequencies, then the cosines. `width` must be a multiple of 4. Neighbours lie
    `spacing` apart.
    """
    quarter = width // 4
    frequency = POSITION_BASE ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    angle = spacing * torch.arange(grid, dtype=torch.float64)[:, None] * frequency
    axis = torch.cat([angle.sin(), angle.cos()], dim=-1)
    columns = axis[None, :, :].expand(grid, grid, -1)
    rows = axis[:, None, :].expand(grid, grid, -1)
    return torch.cat([columns, rows], dim=-1).flatten(0, 1).unsqueeze(0).float()


def zero(layer: nn.Module) -> None:
    """Set every parameter of a layer to zero."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


def zero_bias(layer: nn.Linear | nn.Conv2d) -> None:
    """Set a layer's bias, which it must have, to zero."""
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
