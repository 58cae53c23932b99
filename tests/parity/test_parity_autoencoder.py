"""Encoders and the ViT decoder against outputs of the official release, in float32.

`RAE_PARITY_DIR` names another folder of such files; shapes and sizes are read from them.
"""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from rae.stages.models.decoder import DecoderConfig, ViTDecoder, sincos_positions, unwhiten, whiten
from rae.stages.models.encoders import encoder_geometry, load_encoder
from rae.stages.models.weights import locate_encoder

FOLDER = Path(os.environ.get("RAE_PARITY_DIR", Path(__file__).parent))
TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata() or {}


ENCODERS = sorted(path.parent for path in FOLDER.glob("*/parity.safetensors") if (path.parent / "config.json").exists())
DECODERS = sorted(path for path in FOLDER.glob("*.safetensors") if metadata(path).get("kind") == "decoder")


def named(paths: list[Path]) -> list[object]:
    return [pytest.param(path, id=path.name) for path in paths]


@pytest.mark.parametrize("folder", named(ENCODERS))
def test_encoder_tokens_are_the_official_ones(folder: Path) -> None:
    known = load_file(folder / "parity.safetensors")
    input_size = int(metadata(folder / "parity.safetensors")["encoder_input_size"])
    files = locate_encoder(str(folder))
    encoder = load_encoder(files, input_size)
    with torch.inference_mode():
        tokens = encoder(known["image"])
    torch.testing.assert_close(tokens, known["latent"], **TOLERANCE)
    assert encoder_geometry(files, input_size) == (tokens.shape[1], tuple(tokens.shape[2:]))


@pytest.mark.parametrize("path", named(DECODERS))
def test_decoder_images_are_the_official_ones(path: Path) -> None:
    about, tensors = metadata(path), load_file(path)
    official = json.loads(about["config"])
    assert official.get("hidden_act", "gelu") == "gelu"
    config = DecoderConfig(
        token_dim=official["latent_dim"],
        grid=official["grid"],
        hidden_size=official["decoder_hidden_size"],
        depth=official["decoder_num_hidden_layers"],
        num_heads=official["decoder_num_attention_heads"],
        intermediate_size=official["decoder_intermediate_size"],
        patch_size=official["patch_size"],
        image_mean=tuple(json.loads(about["image_mean"])),
        image_std=tuple(json.loads(about["image_std"])),
        layer_norm_eps=official["layer_norm_eps"],
    )
    decoder = ViTDecoder(config)
    weights = {key.removeprefix("weight/"): value for key, value in tensors.items() if key.startswith("weight/")}
    decoder.load_state_dict(weights, strict=True)
    positions = sincos_positions(config.hidden_size, config.grid)
    torch.testing.assert_close(positions, weights["decoder_pos_embed"], atol=1e-6, rtol=0)

    mean, var, eps = tensors.get("io/latent_mean"), tensors["io/latent_var"], float(about["stats_eps"])
    tokens = unwhiten(tensors["io/z_normalized"], mean, var, eps)
    with torch.inference_mode():
        torch.testing.assert_close(decoder.patches(tokens), tensors["io/logits"], **TOLERANCE)
        torch.testing.assert_close(decoder(tokens), tensors["io/image"], **TOLERANCE)
    torch.testing.assert_close(whiten(tokens, mean, var, eps), tensors["io/z_normalized"], **TOLERANCE)
