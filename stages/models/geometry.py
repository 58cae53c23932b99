"""What an encoder will make of an image, known before its weights are loaded.

An encoder that lies in a folder is answered from its JSON files, without torch; a timm encoder is built on the meta
device; an encoder of your own is tried out.
"""

import difflib
import inspect
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rae.stages.models.model_folder import read_json
from rae.stages.models.own_encoder import OwnEncoder, Triple
from rae.stages.models.weights import EncoderFiles, EncoderSource
from rae.store.errors import ConfigError, CorruptData, MissingInput

# transformers leaves a nested configuration's default values out of config.json; these are those of SiglipVisionConfig
# and of Siglip2VisionConfig, whose position table is said by its `num_patches`.
SIGLIP_VISION_DEFAULTS = {"hidden_size": 768, "patch_size": 16, "image_size": 224}
NAFLEX_VISION_DEFAULTS = {"hidden_size": 768, "patch_size": 16, "num_patches": 256}


@dataclass(frozen=True)
class Preprocessing:
    """How an encoder wants its images: mean and std per channel of [0, 1] pixels, and the side in pixels."""

    mean: Triple
    std: Triple
    input_size: int


def encoder_geometry(
    source: EncoderSource, input_size: int | None = None, feature_index: int | None = None
) -> tuple[int, tuple[int, int]]:
    """Token width and grid (rows, columns) of an encoder at `input_size` pixels, without loading its weights.

    Args:
        source: from `locate_encoder`, or an encoder of one's own.
        input_size: side in pixels; by default what the encoder's own preprocessing says.
        feature_index: which feature map of a timm encoder; by default the last of stride 16 or less.

    Raises:
        ConfigError: an input size or feature map that the encoder does not have.
        MissingInput, CorruptData: a folder without usable config.json or preprocessor_config.json.
    """
    if source.kind == "timm":
        import torch  # the others do without

        with torch.device("meta"):
            model = create_timm(source.architecture)
        size = timm_input_size(model, input_size)
        return timm_geometry(model, size, timm_feature_index(model, feature_index))
    if feature_index is not None:
        raise ConfigError(f"`feature_index` chooses a map of a timm encoder; `{source.name}` has one kind of tokens")
    if isinstance(source, OwnEncoder):
        return source.geometry(own_input_size(source, input_size))
    token_dim, side = folder_geometry(source, input_size)
    return token_dim, (side, side)


def input_size_for(source: EncoderSource, image_size: int, asked: int | None = None) -> int:
    """The side in pixels that images of `image_size` are resized to for this encoder: as asked, or 16 pixels a token.

    So 256 px become 224 for DINOv2 (patch 14) and stay 256 for patch 16: 16 x 16 tokens each (RAE paper, section 3).
    A timm encoder and an AutoencoderKL are fed the image as it is; an encoder of your own may say its `input_size`.
    """
    if asked is not None:
        return asked
    if isinstance(source, OwnEncoder):
        return source.input_size or image_size
    if source.kind in ("timm", "autoencoder_kl"):
        return image_size
    return vision_config(source)["patch_size"] * max(image_size // 16, 1)


def own_input_size(source: OwnEncoder, input_size: int | None) -> int:
    """The side in pixels that an encoder of one's own is fed at."""
    size = input_size or source.input_size
    if size is None:
        raise ConfigError(f"the encoder `{source.name}` has no attribute `input_size`, and no size of images is given")
    return size


def folder_geometry(files: EncoderFiles, input_size: int | None) -> tuple[int, int]:
    """Token width and tokens along one side of an encoder that lies in a folder."""
    vision = vision_config(files)
    size = input_size or folder_preprocessing(files).input_size
    patch = vision["patch_size"]
    if size % patch or size < patch:
        below = max(size // patch, 1) * patch
        what = "stride" if files.kind == "autoencoder_kl" else "patch size"
        raise ConfigError(
            f"`encoder_input_size` {size} is not a multiple of the {what} {patch} of `{files.name}`: take {below}"
            f" or {below + patch}"
        )
    return vision["hidden_size"], size // patch


def vision_config(files: EncoderFiles) -> dict[str, int]:
    """`hidden_size`, `patch_size` and `image_size` of the encoder in a folder, from config.json.

    Of an AutoencoderKL these are latent channels, pixels per latent, and `sample_size`.
    """
    path = files.folder_or_file / "config.json"
    config = read_json(path)
    if files.kind in ("siglip", "naflex"):
        defaults = SIGLIP_VISION_DEFAULTS if files.kind == "siglip" else NAFLEX_VISION_DEFAULTS
        config = defaults | config.get("vision_config", config)
    if files.kind == "naflex":
        side = math.isqrt(_positive(config, "num_patches", path))
        config["image_size"] = side * _positive(config, "patch_size", path)
    if files.kind == "autoencoder_kl":
        widths = config.get("block_out_channels")
        stride = (
            2 ** (len(widths) - 1) if isinstance(widths, list) else None
        )  # every block but the last halves the sides
        config = {
            "hidden_size": config.get("latent_channels"),
            "patch_size": stride,
            "image_size": config.get("sample_size"),
        }
    return {key: _positive(config, key, path) for key in SIGLIP_VISION_DEFAULTS}


def _positive(config: dict[str, Any], key: str, path: Path) -> int:
    value = config.get(key)
    if not isinstance(value, int) or value <= 0:
        raise CorruptData(f"{path} says no usable `{key}`: {value!r}")
    return value


def folder_preprocessing(files: EncoderFiles) -> Preprocessing:
    """Normalisation and default input size of an encoder in a folder, from preprocessor_config.json.

    The input size is its crop, else its resize, else the size that the position table was made for. An AutoencoderKL
    has no such file: its images lie in [-1, 1], and its size is `sample_size`.

    Raises:
        MissingInput: no such file; guessing a normalisation would make other tokens without a word.
    """
    if files.kind == "autoencoder_kl":
        return Preprocessing((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), vision_config(files)["image_size"])
    path = files.folder_or_file / "preprocessor_config.json"
    if not path.is_file():
        raise MissingInput(
            f"{files.folder_or_file} has no preprocessor_config.json, which says the mean and std of the images that"
            f" `{files.name}` was trained on",
            f"hf download {files.name} preprocessor_config.json --local-dir {files.folder_or_file}",
        )
    config = read_json(path)
    mean, std = _triple(config, "image_mean", path), _triple(config, "image_std", path)
    sides = [config["crop_size"]] if config.get("do_center_crop", "crop_size" in config) else []
    for side in [*sides, config.get("size")]:
        pixels = side.get("height", side.get("shortest_edge")) if isinstance(side, dict) else side
        if isinstance(pixels, int) and pixels > 0:
            return Preprocessing(mean, std, pixels)
    return Preprocessing(mean, std, vision_config(files)["image_size"])


def _triple(config: dict[str, Any], key: str, path: Path) -> Triple:
    values = config.get(key)
    if not isinstance(values, list) or len(values) != 3 or not all(isinstance(v, int | float) for v in values):
        raise CorruptData(f"{path} says no usable `{key}`: {values!r}")
    return float(values[0]), float(values[1]), float(values[2])


def create_timm(architecture: str) -> Any:
    """A timm model without pretrained weights, on the current default device.

    Raises:
        ConfigError: timm has no such model, or none with feature maps.
    """
    import timm  # seconds that only a timm encoder needs
    import torch

    if not timm.is_model(architecture):
        close = difflib.get_close_matches(architecture, timm.list_models(), n=1)
        raise ConfigError(f"timm has no model `{architecture}`{f'; did you mean `{close[0]}`?' if close else ''}")
    with torch.device("meta"):
        parameters = inspect.signature(type(timm.create_model(architecture))).parameters
    sizes: dict[str, Any] = (
        {"dynamic_img_size": True} if "dynamic_img_size" in parameters else {}
    )  # a ViT that interpolates positions
    model = timm.create_model(architecture, pretrained=False, **sizes)
    if not hasattr(model, "forward_intermediates") or not getattr(model, "feature_info", None):
        raise ConfigError(f"timm's `{architecture}` offers no feature maps (`forward_intermediates`)")
    return model


def timm_input_size(model: Any, input_size: int | None) -> int:
    """The side in pixels that a timm model is fed at; its pretraining's by default."""
    trained: int = model.pretrained_cfg["input_size"][-1]
    fixed = model.pretrained_cfg.get("fixed_input_size") and not getattr(model, "dynamic_img_size", False)
    if input_size not in (None, trained) and fixed:
        name = model.pretrained_cfg["architecture"]
        raise ConfigError(f"timm's `{name}` takes images of {trained} pixels only: set `encoder_input_size` to that")
    return input_size or trained


def timm_feature_index(model: Any, feature_index: int | None) -> int:
    """The feature map that becomes tokens: the one asked for, else the last of stride 16 or less (a ViT's patch)."""
    strides = [feature["reduction"] for feature in model.feature_info]
    if feature_index is None:
        return max((index for index, stride in enumerate(strides) if stride <= 16), default=0)
    if feature_index >= len(strides):
        name = model.pretrained_cfg["architecture"]
        raise ConfigError(
            f"timm's `{name}` has {len(strides)} feature maps, of strides {', '.join(map(str, strides))}:"
            f" `feature_index` {feature_index} is not among 0 to {len(strides) - 1}"
        )
    return feature_index


def timm_geometry(model: Any, input_size: int, feature_index: int) -> tuple[int, tuple[int, int]]:
    """Channels and grid of one feature map, from a forward pass of shapes alone; `model` lies on the meta device."""
    import torch  # this module is light for everyone else

    image = torch.empty(1, 3, input_size, input_size, device="meta")
    try:
        (feature_map,) = model.eval().forward_intermediates(
            image, indices=[feature_index], stop_early=True, intermediates_only=True
        )
    except (RuntimeError, AssertionError) as error:
        name = model.pretrained_cfg["architecture"]
        raise ConfigError(f"timm's `{name}` cannot take images of {input_size} pixels: {error}") from error
    _, channels, rows, columns = feature_map.shape
    return channels, (rows, columns)
