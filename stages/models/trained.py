"""Trained models as they lie in artifacts: written by the trainers, read by sampling, scoring and the Python API.

decoder.json, model.safetensors, ema.safetensors
dit.json, model.safetensors, ema.safetensors, latent_stats.safetensors

What was imported has one set of weights, ema.safetensors, and an imported decoder may have latent_stats.safetensors.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self, get_args

import torch
from torch import Tensor, nn

from rae.stages.models.autoencoder_kl import KlDecoder
from rae.stages.models.decoder import DecoderConfig, ViTDecoder, noise_tokens, unwhiten
from rae.stages.models.dit import DiTConfig, build_dit
from rae.stages.models.encoders import Encoder
from rae.stages.models.payload import Payload
from rae.stages.models.power_ema import reconstruct
from rae.stages.models.saving import (
    check_room,
    check_weights,
    is_saved,
    load_weights,
    read_tensors,
    read_weights,
)
from rae.stages.models.transport import Transport, create_transport, named
from rae.store.errors import CorruptData, MissingInput
from rae.store.json_data import parse_object
from rae.store.manifest import Json

Weights = Literal["ema", "model"]


class Decoder(nn.Module):
    """A trained decoder: raw tokens [B, C, H, W] -> images [B, 3, S, S] in [0, 1]."""

    def __init__(self, model: ViTDecoder | KlDecoder, encoder: Json) -> None:
        super().__init__()
        self.model = model
        self.encoder = encoder  # description of the encoder whose tokens it reads
        self.requires_grad_(False).eval()

    @property
    def image_size(self) -> int:
        """Pixels along one side of the images it makes."""
        return self.model.image_size

    def forward(self, tokens: Tensor) -> Tensor:
        """Raw tokens [B, C, H, W] -> images float32 [B, 3, S, S], clamped to [0, 1]."""
        images: Tensor = self.model(tokens).float().clamp(0, 1)
        return images

    @classmethod
    def load(cls, folder: Path, weights: Weights = "ema", device: str = "cpu") -> Self:
        """Read what `save_decoder` or `save_kl_decoder` wrote."""
        about = read_about(folder / "decoder.json", "config", "encoder")
        config, encoder = about["config"], about["encoder"]
        model: ViTDecoder | KlDecoder
        if "_class_name" in config:  # diffusers' word, in what was imported from there
            model = KlDecoder.from_config(config, encoder["input_size"])
        else:
            sizes = DecoderConfig.from_dict(config)
            blocks = sizes.depth * sizes.hidden_size * (sizes.hidden_size + sizes.intermediate_size)
            ends = sizes.grid**2 + sizes.token_dim + sizes.patch_size**2
            check_room(_weights_file(folder, weights), blocks + sizes.hidden_size * ends)
            model = ViTDecoder(sizes)
        load_weights(model, _weights_file(folder, weights))
        return cls(model, encoder).to(device)


class Dit(nn.Module):
    """A trained diffusion transformer with what sampling needs to know of its training.

    `dit(x, t, y)` is the model's output (a velocity, unless trained otherwise) for whitened latents x [B, C, H, W],
    times t [B] in [0, 1] (1 is noise) and labels y [B]; the label `num_classes` means none.
    """

    mean: Tensor
    var: Tensor

    def __init__(self, model: nn.Module, about: "DitDescription", mean: Tensor, var: Tensor) -> None:
        super().__init__()
        self.model = model
        self.about = about
        self.register_buffer("mean", mean)
        self.register_buffer("var", var)
        self.requires_grad_(False).eval()

    @property
    def config(self) -> DiTConfig:
        """The transformer's sizes."""
        return self.about.config

    @property
    def num_classes(self) -> int:
        """How many classes it knows; 0 if it is unconditional."""
        return self.config.num_classes

    @property
    def null_label(self) -> float:
        """What y is where nothing is asked for: the label `num_classes`, or of vectors NaN."""
        return math.nan if self.config.conditioning_dim else self.num_classes

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W)"""
        return self.config.in_channels, self.config.input_size, self.config.input_size

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Whitened [B, C, H, W], times [B] in [0, 1], labels int64 [B] -> [B, C, H, W]."""
        out: Tensor = self.model(x, t, y)
        return out

    def raw(self, whitened: Tensor) -> Tensor:
        """Whitened latents [B, C, H, W] back to the encoder's own scale, which decoders read."""
        return unwhiten(whitened, self.mean, self.var)

    @classmethod
    def load(
        cls, folder: Path, weights: Weights = "ema", device: str = "cpu", ema_sigma_rel: float | None = None
    ) -> Self:
        """Read what `save_dit` wrote; with the power-function average of this length, if one is given, for weights."""
        about = DitDescription.from_json(read_about(folder / "dit.json", "config", "transport", "encoder", "classes"))
        sizes = about.config
        blocks = sum(
            depth * width**2 * (1 + sizes.mlp_ratio)
            for depth, width in zip(sizes.depth, sizes.hidden_size, strict=True)
        )
        ends = (sizes.input_size // sizes.patch_size) ** 2 + sizes.num_classes + sizes.in_channels
        check_room(_weights_file(folder, weights), blocks + sizes.hidden_size[0] * ends)
        model = build_dit(sizes)
        load_weights(model, _weights_file(folder, weights))
        if ema_sigma_rel is not None:
            average = reconstruct(folder, ema_sigma_rel)
            check_weights(average, dict(model.named_parameters()), f"{folder}'s snapshots")
            model.load_state_dict(average, strict=False)
        mean, var = read_latent_stats(folder, about.config.in_channels, about.config.input_size)
        return cls(model, about, mean, var).to(device)


@dataclass(frozen=True)
class DitDescription:
    """What stands beside a transformer's weights: sizes, transport, the encoder of its latents, class names."""

    config: DiTConfig
    transport: Json
    encoder: Json
    classes: tuple[str, ...] | None = None

    def create_transport(self) -> Transport:
        """The transport that it was trained with."""
        return create_transport(**self.transport)

    def to_json(self) -> Json:
        """What `dit.json` holds."""
        classes = list(self.classes) if self.classes is not None else None
        parts = {"config": self.config.to_dict(), "transport": self.transport, "encoder": self.encoder}
        return parts | {"classes": classes}

    @classmethod
    def from_json(cls, value: Json) -> Self:
        """The inverse of `to_json`; `ConfigError` for sizes that are unknown, missing or do not fit."""
        classes = tuple(value["classes"]) if value["classes"] is not None else None
        return cls(DiTConfig.from_dict(value["config"]), value["transport"], value["encoder"], classes)


class Autoencoder(nn.Module):
    """A frozen encoder and its trained decoder (RAE paper, section 3)."""

    def __init__(self, encoder: Encoder, decoder: Decoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder

    def encode(self, images: Tensor) -> Tensor:
        """Images [B, 3, S, S] in [0, 1] -> raw tokens [B, C, H, W]."""
        tokens: Tensor = self.encoder(images)
        return tokens

    def decode(self, tokens: Tensor) -> Tensor:
        """Raw tokens [B, C, H, W] -> images [B, 3, S, S] in [0, 1]."""
        images: Tensor = self.decoder(tokens)
        return images

    def noising(self, tokens: Tensor, noise_tau: float, generator: torch.Generator | None = None) -> Tensor:
        """Raw tokens [B, C, H, W] with noise of a level drawn per image from tau * U[0, 1), as the decoder trains on.

        RAE paper, section 4.3. Draws come from `generator`, on the tokens' device; from torch's global one without.
        """
        uniform = torch.rand(len(tokens), generator=generator, device=tokens.device)
        normal = torch.randn(tokens.shape, generator=generator, device=tokens.device)
        return noise_tokens(tokens, noise_tau, uniform, normal)


def decoder_payload(config: DecoderConfig, encoder: Json, stats: tuple[Tensor, Tensor] | None = None) -> Payload:
    """A ViT decoder's, with the (mean, var) [C, H, W] of its tokens if they are to travel with it."""
    return Payload("decoder.json", {"config": config.to_dict(), "encoder": encoder}, stats)


def dit_payload(about: DitDescription, stats: tuple[Tensor, Tensor]) -> Payload:
    """A transformer's, with the (mean, var) [C, H, W] that whiten its latents."""
    shift = {"time_dist_shift": round(about.transport["time_dist_shift"], 4)}
    return Payload("dit.json", about.to_json(), stats, shift)


def save_decoder(
    folder: Path,
    config: DecoderConfig,
    encoder: Json,
    model: Mapping[str, Tensor] | None,
    ema: Mapping[str, Tensor],
    stats: tuple[Tensor, Tensor] | None = None,
) -> tuple[tuple[Path, ...], str]:
    """Write a decoder's payload; returns its files and its content digest.

    `model` is None where there is one set of weights. `stats` are the (mean, var) [C, H, W] of its tokens, for those
    who bring a transformer to it: the decoder itself reads raw tokens.
    """
    return decoder_payload(config, encoder, stats).save(folder, model, ema)


def save_kl_decoder(folder: Path, model: KlDecoder, encoder: Json) -> tuple[tuple[Path, ...], str]:
    """Write the decoder of diffusers' AutoencoderKL, which has one set of weights; returns files and content digest."""
    about = {"config": model.config, "encoder": encoder}
    return Payload("decoder.json", about).save(folder, None, model.state_dict())


def save_dit(
    folder: Path,
    about: DitDescription,
    stats: tuple[Tensor, Tensor],
    model: Mapping[str, Tensor] | None,
    ema: Mapping[str, Tensor],
) -> tuple[tuple[Path, ...], str]:
    """Write a transformer's payload with the (mean, var) [C, H, W] that whiten its latents.

    `model` is None where there is one set of weights.
    """
    return dit_payload(about, stats).save(folder, model, ema)


def read_latent_stats(folder: Path, channels: int, side: int) -> tuple[Tensor, Tensor]:
    """The (mean, var) [C, H, W] beside a model's weights."""
    shape = torch.empty(channels, side, side, device="meta")
    stats = read_weights(folder / "latent_stats.safetensors", {"mean": shape, "var": shape})
    return stats["mean"], stats["var"]


def load_weights_of(folder: Path, weights: Weights) -> dict[str, Tensor]:
    """One set of a trained model's tensors as they lie there; `CorruptData` if they can't be read."""
    return read_tensors(_weights_file(folder, weights))


def _weights_file(folder: Path, weights: Weights) -> Path:
    named("weights", weights, get_args(Weights))
    path = folder / f"{weights}.safetensors"
    if weights == "model" and not is_saved(path):
        raise MissingInput(f"{folder} was imported with one set of weights: ask for `ema` instead of `model`")
    return path


def read_encoder(latents: Path) -> Json:
    """The description of the encoder that made the latents in this folder."""
    return read_about(latents / "encoder.json")


def read_about(path: Path, *keys: str) -> Json:
    """What stands beside a model's weights: a JSON object with these keys; else `CorruptData`."""
    try:
        value = parse_object(path.read_bytes(), str(path))
    except OSError as error:
        raise CorruptData(f"{path} can't be read ({error})") from error
    if not set(keys) <= set(value):
        raise CorruptData(f"{path} does not hold a JSON object with {', '.join(keys)}")
    return value
