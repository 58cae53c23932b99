"""Frozen pretrained encoders: images in [0, 1] become a grid of tokens of unit scale (RAE paper, section 3).

Behind one module: DINOv2 (with or without registers), SigLIP and SigLIP2, MAE, and any timm model's feature map, which
all end in a layer norm without affine part, so that `noise_tau` means the same for each; besides, an encoder of your
own, and diffusers' AutoencoderKL, whose latents are left as they are.

Shapes: B images, S pixels along a side, C token width, H = W = grid side.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from rae.stages.models.autoencoder_kl import KlBackbone, load_autoencoder_kl
from rae.stages.models.backbones import (
    HuggingFaceBackbone,
    OwnBackbone,
    TimmBackbone,
    load_hugging_face,
    load_timm,
)
from rae.stages.models.geometry import (
    create_timm,
    encoder_geometry,
    folder_preprocessing,
    own_input_size,
    timm_feature_index,
    timm_geometry,
    timm_input_size,
)
from rae.stages.models.model_folder import EncoderKind
from rae.stages.models.own_encoder import OwnEncoder, Triple
from rae.stages.models.weights import EncoderFiles, EncoderSource
from rae.store.errors import CorruptData

__all__ = ["Encoder", "EncoderInfo", "describe", "describe_files", "encoder_geometry", "load_encoder", "resized"]


@dataclass(frozen=True)
class EncoderInfo:
    """What an encoder is, as manifests record it. `grid` is (rows, columns); `mean` and `std` are of [0, 1] pixels.

    Without a `digest` it is asserted and not verified: its weights were not at hand. `version` is what an encoder of
    your own declares; others have none.
    """

    name: str
    kind: EncoderKind | Literal["own"]
    token_dim: int
    grid: tuple[int, int]
    input_size: int
    mean: Triple
    std: Triple
    digest: str | None = None
    feature_index: int | None = None
    version: str | None = None

    def to_json(self) -> dict[str, Any]:
        """JSON-ready: name, kind, token_dim, grid, input_size, mean, std, digest, feature_index, version."""
        values = dataclasses.asdict(self)
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        """The inverse of `to_json`; `CorruptData` for what is no description of an encoder."""
        try:
            return TypeAdapter(cls).validate_python(value)
        except ValidationError as error:
            raise CorruptData(f"this does not describe an encoder: {error}") from error


class Encoder(nn.Module):
    """A frozen encoder: images [B, 3, S, S] in [0, 1] -> raw tokens [B, C, H, W] in float32.

    Images of another side than `input_size` are resized (bicubic, no antialias, as officially). Parameters take no
    gradient and the module stays in eval mode; gradients do flow to the images, which the perceptual loss needs.
    """

    _mean: Tensor
    _std: Tensor

    def __init__(
        self, backbone: TimmBackbone | HuggingFaceBackbone | KlBackbone | OwnBackbone, info: EncoderInfo
    ) -> None:
        super().__init__()
        self.info = info
        self.token_dim = info.token_dim
        self.grid = info.grid
        self.input_size = info.input_size
        self.mean = info.mean
        self.std = info.std
        self.digest = info.digest
        self.backbone = backbone
        self.register_buffer("_mean", torch.tensor(info.mean).reshape(1, 3, 1, 1), persistent=False)
        self.register_buffer("_std", torch.tensor(info.std).reshape(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False)
        self.eval()

    @property
    def device(self) -> torch.device:
        """Where it lies, weights or none."""
        return self._mean.device

    def train(self, mode: bool = True) -> Self:
        """Stays in eval mode whatever its parent does: a frozen encoder's batch norms and dropouts are part of it."""
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, S, S] in [0, 1] -> [B, C, H, W]; `ValueError` for what are no images."""
        return self.backbone.tokens(self._prepared(images)).float()

    def features(self, images: Tensor) -> list[Tensor]:
        """The maps [B, c, h, w] that a perceptual distance compares, finest first.

        timm: every feature map up to the one that becomes tokens. Others: the tokens.
        """
        return [feature.float() for feature in self.backbone.features(self._prepared(images))]

    def _prepared(self, images: Tensor) -> Tensor:
        images = resized(images, self.input_size)
        return images if self.info.kind == "own" else (images - self._mean) / self._std


def resized(images: Tensor, side: int) -> Tensor:
    """Images [B, 3, S, S] at `side` pixels: bicubic, no antialias, as officially; those of that size as they are."""
    if images.dim() != 4 or images.shape[1] != 3:
        raise ValueError(f"an encoder takes images [B, 3, S, S], not {list(images.shape)}")
    if images.shape[-2:] == (side, side):
        return images
    return F.interpolate(images, size=(side, side), mode="bicubic", align_corners=False)


def describe(encoder: Encoder) -> dict[str, Any]:
    """What an encoder is, as JSON; see `EncoderInfo`."""
    return encoder.info.to_json()


def load_encoder(
    source: EncoderSource,
    input_size: int | None = None,
    feature_index: int | None = None,
    device: str | torch.device = "cpu",
) -> Encoder:
    """Loads an encoder, strictly: a weight that is missing, unknown or of another shape is an error.

    Args:
        source: from `locate_encoder`, or an encoder of one's own.
        input_size: side in pixels of the images it sees; by default what its own preprocessing says (DINOv2: 224).
        feature_index: which feature map of a timm encoder becomes tokens; by default the last of stride 16 or less.
        device: where it goes.

    Raises:
        ConfigError: an input size or feature map that the encoder does not have.
        MissingInput: a folder without preprocessor_config.json, or diffusers is not installed.
        CorruptData: weights that cannot be read or are not those of the architecture.
    """
    if isinstance(source, OwnEncoder):
        encoder = _own_encoder(source, input_size, feature_index)
    elif source.kind == "timm":
        encoder = _timm_encoder(source, input_size, feature_index)
    else:
        encoder = _folder_encoder(source, input_size, feature_index)
    return encoder.to(device)


def _timm_encoder(files: EncoderFiles, input_size: int | None, feature_index: int | None) -> Encoder:
    with torch.device("meta"):
        shapes = create_timm(files.architecture)
    size, index = timm_input_size(shapes, input_size), timm_feature_index(shapes, feature_index)
    token_dim, grid = timm_geometry(shapes, size, index)
    info = EncoderInfo(
        name=files.name,
        kind=files.kind,
        token_dim=token_dim,
        grid=grid,
        input_size=size,
        mean=shapes.pretrained_cfg["mean"],
        std=shapes.pretrained_cfg["std"],
        digest=files.digest,
        feature_index=index,
    )
    return Encoder(TimmBackbone(load_timm(files), index), info)


def describe_files(files: EncoderFiles, input_size: int | None = None, feature_index: int | None = None) -> EncoderInfo:
    """What the encoder in a folder is, without loading its weights; arguments and errors as of `load_encoder`."""
    token_dim, grid = encoder_geometry(files, input_size, feature_index)
    preprocessing = folder_preprocessing(files)
    return EncoderInfo(
        name=files.name,
        kind=files.kind,
        token_dim=token_dim,
        grid=grid,
        input_size=input_size or preprocessing.input_size,
        mean=preprocessing.mean,
        std=preprocessing.std,
        digest=files.digest,
    )


def _folder_encoder(files: EncoderFiles, input_size: int | None, feature_index: int | None) -> Encoder:
    info = describe_files(files, input_size, feature_index)
    if files.kind == "autoencoder_kl":
        return Encoder(KlBackbone(load_autoencoder_kl(files)), info)
    return Encoder(HuggingFaceBackbone(load_hugging_face(files), files.kind, info.grid[0]), info)


def _own_encoder(source: OwnEncoder, input_size: int | None, feature_index: int | None) -> Encoder:
    token_dim, grid = encoder_geometry(source, input_size, feature_index)
    info = EncoderInfo(
        name=source.name,
        kind=source.kind,
        token_dim=token_dim,
        grid=grid,
        input_size=own_input_size(source, input_size),
        mean=source.mean,
        std=source.std,
        digest=source.digest,
        version=source.version,
    )
    return Encoder(OwnBackbone(source), info)
