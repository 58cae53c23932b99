"""Weights that a fixture does not carry: drawn from their names, so that any implementation can draw the same."""

import re
import zlib
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from parity.fixture import below
from rae.stages.models.discriminator import DinoDiscriminator


def drawn(shapes: Mapping[str, Sequence[int]], scale: float) -> dict[str, Tensor]:
    """A tensor is seeded by crc32 of its name; norms' weights lie around one, `_u` and `_v` have length one."""
    tensors = {}
    for name, shape in shapes.items():
        tensor = standard_normal(name, tuple(shape)) * scale
        if "norm" in name and name.endswith("weight"):
            tensor += 1
        if name.endswith(("_u", "_v")):
            tensor /= tensor.norm()
        tensors[name] = tensor
    return tensors


@cache
def standard_normal(name: str, shape: tuple[int, ...]) -> Tensor:
    """float32; drawn once, since discriminators of one width share most of their names."""
    generator = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
    return torch.from_numpy(generator.standard_normal(shape).astype("float32"))


def shapes_of(module: nn.Module, prefix: str = "") -> dict[str, list[int]]:
    return {prefix + key: list(value.shape) for key, value in module.state_dict().items()}


def drawn_discriminator(recipe: str, ks: int, norm_type: str, using_spec_norm: bool, note: str) -> DinoDiscriminator:
    """A discriminator in eval mode with drawn weights, at the scales that the fixture's `note` states."""
    discriminator = DinoDiscriminator(recipe, ks, norm_type, using_spec_norm).eval()
    with TemporaryDirectory() as folder:
        dino = Path(folder) / "dino.safetensors"
        save_file(drawn(shapes_of(discriminator.backbone), scale_of("backbone", note)), dino)
        discriminator.load_backbone(dino)
    heads = drawn(shapes_of(discriminator.heads, "heads."), scale_of("heads", note))
    discriminator.heads.load_state_dict(below(heads, "heads."))
    return discriminator


def scale_of(part: str, note: str) -> float:
    """The scale that a note states for `backbone` or `heads`: "scale 0.03 for the backbone, 0.05 heads"."""
    stated = re.search(rf"([\d.]+)\s+(?:for the )?{part}", note)
    assert stated, f"the fixture says no scale for its {part}: {note}"
    return float(stated[1])
