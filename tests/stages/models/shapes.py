"""What the tests of shapes share: a checker, names of sizes, tiny models.

jaxtyping binds the sizes of a call, beartype holds it to them. A size has one name in arguments and result: `B` images,
`C` numbers in a token, `H` tokens along a side, `P` pixels along a patch's side, `N` tokens, `D` width, `S` pixels
along a side; `{}` takes a size from an argument.
"""

from itertools import product

import pytest
import torch
from beartype import beartype
from jaxtyping import Float32, Int64, jaxtyped
from torch import Tensor, nn

from rae.stages.models.decoder import DecoderConfig, ViTDecoder
from rae.stages.models.dit import DiTConfig, build_dit

BATCHES = (1, 3)
GRIDS = (2, 16, 32)

checked = jaxtyped(typechecker=beartype)
Latents = Float32[Tensor, "B C H H"]
Images = Float32[Tensor, "B 3 S S"]
Times = Float32[Tensor, " B"]
Labels = Int64[Tensor, " B"]
PerElement = Float32[Tensor, "C H H"]

every_size = pytest.mark.parametrize(("batch", "grid"), list(product(BATCHES, GRIDS)))


def draw(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


def tiny_decoder(token_dim: int, grid: int, patch_size: int) -> ViTDecoder:
    ends = {"image_mean": (0.5, 0.5, 0.5), "image_std": (0.5, 0.5, 0.5)}
    sizes = {"hidden_size": 8, "depth": 1, "num_heads": 2, "intermediate_size": 12}
    return ViTDecoder(DecoderConfig(token_dim=token_dim, grid=grid, patch_size=patch_size, **sizes, **ends))


def tiny_dit(model: str, grid: int, patch_size: int = 1) -> nn.Module:
    parts = {"DiT-DH": ((8, 16), (1, 1), (2, 2)), "LightningDiT": ((16,), (1,), (2,))}[model]
    sizes = dict(zip(("hidden_size", "depth", "num_heads"), parts, strict=True))
    return build_dit(
        DiTConfig(model=model, in_channels=4, input_size=grid, patch_size=patch_size, num_classes=5, **sizes)
    )
