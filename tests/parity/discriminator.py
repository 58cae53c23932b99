"""The DINO discriminator's logits, in eval mode. Weights are drawn as the fixture says, not carried."""

import json
from pathlib import Path

import torch

from parity.drawn import drawn_discriminator, shapes_of
from parity.fixture import close, read
from rae.stages.models.discriminator import BACKBONES

# The same in every recipe of the release, and no choice here.
FIXED = {"depth": 12, "key_depths": [2, 5, 8, 11], "norm_eps": 1e-6, "in_chans": 3, "mlp_ratio": 4.0}


def check_discriminator(path: Path) -> None:
    about, known = read(path)
    recipe, head_keys = json.loads(about["recipe"]), json.loads(about["head_keys"])
    for key, value in FIXED.items():
        assert recipe.get(key, value) == value, f"{key} is not {value}"
    size = {key: recipe[key] for key in ("patch_size", "embed_dim", "num_heads")}
    assert size in BACKBONES.values(), f"no recipe of the release has {size}"
    name = next(name for name, known_size in BACKBONES.items() if known_size == size)
    using_spec_norm = "heads.0.0.0.weight_orig" in head_keys
    discriminator = drawn_discriminator(name, recipe["ks"], recipe["norm_type"], using_spec_norm, about["weights"])
    assert shapes_of(discriminator.backbone) == json.loads(about["backbone_keys"])
    assert shapes_of(discriminator.heads, "heads.") == head_keys
    with torch.inference_mode():
        close(discriminator(known["image_pm1"]), known["logits"])
