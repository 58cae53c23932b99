"""Encoders' tokens and the ViT decoder's images."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from parity.fixture import below, close, read
from rae.stages.models.decoder import DecoderConfig, ViTDecoder, sincos_positions, unwhiten, whiten
from rae.stages.models.discriminator import IMAGENET_MEAN, IMAGENET_STD
from rae.stages.models.encoders import encoder_geometry, load_encoder
from rae.stages.models.weights import locate_encoder
from rae.store.stats import EPSILON


def check_encoder(folder: Path) -> None:
    about, known = read(folder / "parity.safetensors")
    input_size = int(about["encoder_input_size"])
    files = locate_encoder(str(folder))
    with torch.inference_mode():
        tokens = load_encoder(files, input_size)(known["image"])
    close(tokens, known["latent"])
    assert encoder_geometry(files, input_size) == (tokens.shape[1], tuple(tokens.shape[2:]))


def decoder_from_official(about: Mapping[str, str]) -> DecoderConfig:
    """A fixture's decoder; without the encoder's mean and std in it, those of ImageNet."""
    official = json.loads(about["config"])
    assert official.get("hidden_act", "gelu") == "gelu"
    return DecoderConfig(
        token_dim=official["latent_dim"],
        grid=official["grid"],
        hidden_size=official["decoder_hidden_size"],
        depth=official["decoder_num_hidden_layers"],
        num_heads=official["decoder_num_attention_heads"],
        intermediate_size=official["decoder_intermediate_size"],
        patch_size=official["patch_size"],
        image_mean=tuple(json.loads(about["image_mean"])) if "image_mean" in about else IMAGENET_MEAN,
        image_std=tuple(json.loads(about["image_std"])) if "image_std" in about else IMAGENET_STD,
        layer_norm_eps=official["layer_norm_eps"],
    )


def check_decoder(path: Path) -> None:
    about, tensors = read(path)
    config = decoder_from_official(about)
    decoder, weights = ViTDecoder(config), below(tensors, "weight/")
    decoder.load_state_dict(weights, strict=True)
    positions = sincos_positions(config.hidden_size, config.grid)
    close(positions, weights["decoder_pos_embed"], "positions")

    # Either of the statistics may be absent; officially a variance is then one.
    io, eps = below(tensors, "io/"), float(about.get("stats_eps", EPSILON))
    mean, var = io.get("latent_mean"), io.get("latent_var", torch.ones(()))
    tokens = unwhiten(io["z_normalized"], mean, var, eps)
    with torch.inference_mode():
        close(decoder.patches(tokens), io["logits"], "logits")
        close(decoder(tokens), io["image"], "image")
    close(whiten(tokens, mean, var, eps), io["z_normalized"], "whitened")
