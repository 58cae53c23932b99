"""The released models' state dicts by key and shape; sizes are read from the shapes."""

from collections.abc import Mapping
from math import isqrt
from pathlib import Path

import torch
from torch import nn

from parity.drawn import shapes_of
from parity.fixture import read_shapes
from rae.stages.models.decoder import DecoderConfig, ViTDecoder
from rae.stages.models.dit import DiTConfig, build_dit
from rae.stages.models.sizes import VIT_SIZES

Shapes = Mapping[str, list[int]]


def check_state_dicts(path: Path) -> None:
    for name, official in read_shapes(path).items():
        with torch.device("meta"):
            model = decoder_of(name, official) if "decoder_embed.weight" in official else dit_of(official)
        assert shapes_of(model) == official, name


def decoder_of(name: str, official: Shapes) -> nn.Module:
    """The decoder of the size that `name` ends in (`decoder-ViTXL`), else of the size that its shapes say."""
    D, token_dim = official["decoder_embed.weight"]
    size = VIT_SIZES.get(name.rpartition("ViT")[2]) or {
        "hidden_size": D,
        "depth": depth_of(official, "decoder_layers"),
        "num_heads": 1,  # any number has these shapes
        "intermediate_size": official["decoder_layers.0.intermediate.dense.weight"][0],
    }
    config = DecoderConfig(
        token_dim=token_dim,
        grid=isqrt(official["decoder_pos_embed"][1] - 1),
        patch_size=isqrt(official["decoder_pred.weight"][0] // 3),
        image_mean=(0.5, 0.5, 0.5),
        image_std=(0.5, 0.5, 0.5),
        **size,
    )
    return ViTDecoder(config)


def dit_of(official: Shapes) -> nn.Module:
    """DiT-DH, whose body embeds the latent by `s_embedder` and whose head by `x_embedder`; else LightningDiT."""
    parts = {"s_embedder": "enc_feat_rope", "x_embedder": "dec_feat_rope"}
    if "s_embedder.proj.weight" not in official:
        parts = {"x_embedder": "feat_rope"}
    widths = [official[f"{embedder}.proj.weight"][0] for embedder in parts]
    heads = [width // official[f"{rope}.freqs_cos"][1] for width, rope in zip(widths, parts.values(), strict=True)]
    _, in_channels, patch_size, _ = official["x_embedder.proj.weight"]
    depth = depth_of(official, "blocks")
    body = sum(official[f"blocks.{block}.norm1.weight"] == widths[:1] for block in range(depth))
    config = DiTConfig(
        model="DiT-DH" if len(parts) == 2 else "LightningDiT",
        in_channels=in_channels,
        input_size=isqrt(official["pos_embed"][1]) * patch_size,
        patch_size=patch_size,
        hidden_size=tuple(widths),
        depth=(body, depth - body) if len(parts) == 2 else (depth,),
        num_heads=tuple(heads),
        mlp_ratio=round(1.5 * official["blocks.0.mlp.w3.weight"][1] / widths[0], 1),
        num_classes=official["y_embedder.embedding_table.weight"][0] - 1,
        use_qknorm="blocks.0.attn.q_norm.weight" in official,
    )
    return build_dit(config)


def depth_of(official: Shapes, blocks: str) -> int:
    return len({key.split(".")[1] for key in official if key.startswith(f"{blocks}.")})
