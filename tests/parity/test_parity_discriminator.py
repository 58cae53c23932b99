"""The DINO discriminator's logits against the official release's, in eval mode and float32.

`RAE_PARITY_DIR` names another folder of such files. Weights are drawn here as the fixture says, not carried.
"""

import json
import os
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from rae.stages.models.discriminator import BACKBONES, DinoDiscriminator

FOLDER = Path(os.environ.get("RAE_PARITY_DIR", Path(__file__).parent))
FILES = sorted(FOLDER.glob("discriminator_*.safetensors"))


def drawn(shapes: dict[str, list[int]], scale: float) -> dict[str, torch.Tensor]:
    """A tensor is seeded by crc32 of its name; norms' weights lie around one, `_u` and `_v` have length one."""
    tensors = {}
    for name, shape in shapes.items():
        generator = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
        tensor = torch.from_numpy(generator.standard_normal(shape).astype("float32") * scale)
        if "norm" in name and name.endswith("weight"):
            tensor += 1
        if name.endswith(("_u", "_v")):
            tensor /= tensor.norm()
        tensors[name] = tensor
    return tensors


@pytest.mark.parametrize("path", [pytest.param(path, id=path.name) for path in FILES])
def test_logits_are_the_official_ones(path: Path, tmp_path: Path) -> None:
    with safe_open(path, "pt") as file:
        about = file.metadata()
    recipe = json.loads(about["recipe"])
    size = {"patch_size": recipe["patch_size"], "embed_dim": recipe["embed_dim"], "num_heads": recipe["num_heads"]}
    name = next(name for name, known in BACKBONES.items() if known == size)
    discriminator = DinoDiscriminator(name, ks=recipe["ks"], norm_type=recipe["norm_type"]).eval()

    torch.save(drawn(json.loads(about["backbone_keys"]), 0.03), tmp_path / "dino.pth")
    discriminator.load_backbone(tmp_path / "dino.pth")
    heads = drawn(json.loads(about["head_keys"]), 0.05)
    discriminator.heads.load_state_dict({key.removeprefix("heads."): value for key, value in heads.items()})

    known = load_file(path)
    with torch.inference_mode():
        logits = discriminator(known["image_pm1"])
    torch.testing.assert_close(logits, known["logits"], atol=1e-4, rtol=1e-4)
