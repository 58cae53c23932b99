"""diffusers' AutoencoderRAE: the same decoder under other names, with its encoder in the same file.

    decoder.decoder_layers.N.attention.to_q     `attention.attention.query` here; likewise the other three
    decoder_pos_embed                           not stored: built for 16 x 16 tokens, and stretched over other grids
    _latents_mean, _latents_std                 whitened = (tokens - mean) / (std + 1e-5)
    encoder.*                                   the frozen encoder, by the names of the transformers that wrote it

Its conversion from the release puts sqrt(var + 1e-5) into `_latents_std`, and use adds another 1e-5. Here `var` is what
whitens as diffusers does on use, so that latents agree in both directions.
"""

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, PositiveInt, ValidationError
from torch import Tensor

from rae.stages.models.autoencoder_kl import load_diffusers
from rae.stages.models.decoder import DecoderConfig, ViTDecoder, sincos_positions
from rae.stages.models.encoders import Encoder
from rae.stages.models.model_folder import EncoderKind, read_json
from rae.stages.models.official import read_tensors
from rae.stages.models.own_encoder import Triple
from rae.stages.models.saving import check_weights
from rae.store.errors import ConfigError, CorruptData
from rae.store.stats import EPSILON

CLASS_NAME = "AutoencoderRAE"
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
TOLERANCE = 1e-3  # of pixels in [0, 1]: how far two programs' reconstructions of one image may lie apart
_STD_EPSILON = 1e-5
STRETCHED_TO = 16  # tokens along the side that its positions count to, whatever the grid
_KINDS: dict[str, EncoderKind] = {"dinov2": "dinov2", "mae": "mae", "siglip2": "siglip"}
_THEIR_NAMES = {
    "attention.attention.query": "attention.to_q",
    "attention.attention.key": "attention.to_k",
    "attention.attention.value": "attention.to_v",
    "attention.output.dense": "attention.to_out.0",
}
_OUR_NAMES = {theirs: ours for ours, theirs in _THEIR_NAMES.items()}
_OWN_TENSORS = ("encoder_mean", "encoder_std", "_latents_mean", "_latents_std")
# Tensors of an encoder that its tokens do without: the last layer norm's affine part, pooling, what masking puts in.
_UNUSED = ("layernorm.", "post_layernorm.", "head.", "embeddings.mask_token", "embeddings.position_ids")


class _Config(BaseModel):
    """What config.json says that a reconstruction follows from; diffusers' defaults, and its other keys left aside."""

    encoder_type: Literal["dinov2", "mae", "siglip2"] = "dinov2"
    encoder_hidden_size: PositiveInt = 768
    encoder_patch_size: PositiveInt = 14
    encoder_input_size: PositiveInt = 224
    decoder_hidden_size: PositiveInt = 512
    decoder_num_hidden_layers: PositiveInt = 8
    decoder_num_attention_heads: PositiveInt = 16
    decoder_intermediate_size: PositiveInt = 2048
    patch_size: PositiveInt = 16
    num_channels: Literal[3] = 3
    reshape_to_2d: Literal[True] = True
    scaling_factor: float = 1.0


@dataclass(frozen=True)
class AutoencoderRae:
    """What a folder of diffusers' AutoencoderRAE holds.

    Attributes:
        config, state: the decoder, as `ViTDecoder` has it.
        stats: (mean, var) float32 [C, H, W] of its tokens, where it has any.
        kind, patch_size, input_size: the encoder's family, its patch, and the side in pixels of what it sees.
        encoder: the encoder's tensors.
    """

    config: DecoderConfig
    state: dict[str, Tensor]
    stats: tuple[Tensor, Tensor] | None
    kind: EncoderKind
    patch_size: int
    input_size: int
    encoder: dict[str, Tensor]


def read_autoencoder_rae(folder: Path) -> AutoencoderRae:
    """Read the folder, strictly; neither diffusers nor transformers has a part in it.

    Raises:
        ConfigError: a model that this decoder cannot be.
        MissingInput: no weights.
        CorruptData: files that cannot be read, or that do not hold what config.json says.
    """
    said, path = _read_config(folder / "config.json"), folder / WEIGHTS_FILE
    tensors = {name: tensor.float() for name, tensor in read_tensors(path).items()}
    for name in tensors:
        if not name.startswith(("encoder.", "decoder.")) and name not in _OWN_TENSORS:
            raise CorruptData(f"{path} holds `{name}`, which is no tensor of an AutoencoderRAE")
    grid = said.encoder_input_size // said.encoder_patch_size
    config = DecoderConfig(
        token_dim=said.encoder_hidden_size,
        grid=grid,
        hidden_size=said.decoder_hidden_size,
        depth=said.decoder_num_hidden_layers,
        num_heads=said.decoder_num_attention_heads,
        intermediate_size=said.decoder_intermediate_size,
        patch_size=said.patch_size,
        image_mean=_triple(tensors, "encoder_mean", path),
        image_std=_triple(tensors, "encoder_std", path),
    )
    state = {_renamed(name, _OUR_NAMES): tensor for name, tensor in _part(tensors, "decoder.").items()}
    state["decoder_pos_embed"] = positions(config)
    with torch.device("meta"):
        own = ViTDecoder(config).state_dict()
    check_weights(state, own, str(path))
    return AutoencoderRae(
        config=config,
        state=state,
        stats=_read_stats(tensors, (config.token_dim, grid, grid), said.scaling_factor, path),
        kind=_KINDS[said.encoder_type],
        patch_size=said.encoder_patch_size,
        input_size=said.encoder_input_size,
        encoder=_part(tensors, "encoder."),
    )


def _read_config(path: Path) -> _Config:
    try:
        said = _Config.model_validate(read_json(path))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise ConfigError(f"in {path}, `{key}` is {first['input']!r}, which has no counterpart here") from error
    if said.encoder_input_size % said.encoder_patch_size:
        raise CorruptData(f"in {path}, `encoder_input_size` is no multiple of `encoder_patch_size`")
    return said


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _renamed(name: str, names: Mapping[str, str]) -> str:
    for old, new in names.items():
        name = name.replace(old, new)
    return name


def _triple(tensors: Mapping[str, Tensor], name: str, path: Path) -> Triple:
    tensor = tensors.get(name)
    if tensor is None or tensor.numel() != 3:
        raise CorruptData(f"{path} does not hold three numbers as `{name}`")
    first, second, third = tensor.flatten().tolist()
    return _shortest(first), _shortest(second), _shortest(third)


def _shortest(value: float) -> float:
    """The decimal number that was meant by a float32: 0.485, not 0.48500001430511475."""
    return float(f"{value:.7g}")


def _read_stats(
    tensors: Mapping[str, Tensor], shape: tuple[int, int, int], scale: float, path: Path
) -> tuple[Tensor, Tensor] | None:
    missing = [name for name in _OWN_TENSORS if name not in tensors]
    if missing:
        raise CorruptData(f"{path} lacks `{missing[0]}`")
    mean, std = tensors["_latents_mean"], tensors["_latents_std"]
    if mean.numel() == std.numel() == 1 and mean.item() == 0 and std.item() == scale == 1:
        return None  # diffusers' way to say that there are none
    try:
        mean, std = (one.expand(1, *shape)[0].contiguous() for one in (mean, std))
    except RuntimeError as error:
        found = f"{list(mean.shape)} and {list(std.shape)}"
        raise CorruptData(f"{path} holds latent statistics of shapes {found} where {list(shape)} is needed") from error
    var = ((std.double() + _STD_EPSILON) / scale).square() - EPSILON
    if not bool(mean.isfinite().all() and var.isfinite().all()) or bool((var < -1e-9).any()):
        raise CorruptData(f"{path} holds latent statistics that whiten by no mean and variance")
    return mean, var.clamp(min=0).float()


def positions(config: DecoderConfig) -> Tensor:
    """The position table [1, 1 + H * W, D] that diffusers builds: from 0 to 16 along a side, whatever the grid."""
    return sincos_positions(config.hidden_size, config.grid, spacing=STRETCHED_TO / config.grid)


def same_weights(embedded: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> bool:
    """Whether two state dicts of one encoder family hold the same numbers, in float32, to the bit.

    Names are left aside: they changed with transformers' versions, and a file has those of the one that wrote it. So
    are tensors that tokens do without.
    """
    return _digests(embedded) == _digests(own)


def _digests(state: Mapping[str, Tensor]) -> Counter[str]:
    used = (tensor for name, tensor in state.items() if not name.removeprefix("vision_model.").startswith(_UNUSED))
    return Counter(hashlib.sha256(tensor.float().cpu().contiguous().numpy().tobytes()).hexdigest() for tensor in used)


# ---- writing ---------------------------------------------------------------------------------------------------------


def build_autoencoder_rae(decoder: ViTDecoder, encoder: Encoder, stats: tuple[Tensor, Tensor] | None) -> Any:
    """diffusers' model of an encoder and the decoder of its tokens, which reconstructs as they do.

    Args:
        decoder: its weights are shared, not copied.
        encoder: DINOv2 with four registers, MAE or SigLIP.
        stats: (mean, var) [C, H, W] that whiten its tokens; without them latents are raw.

    Raises:
        ConfigError: diffusers has no place for such an encoder or decoder, or makes other images of them.
        MissingInput: diffusers is not installed.
    """
    model = _sized(decoder.config, encoder, stats)
    state = {name: tensor for name, tensor in model.state_dict().items() if name in _OWN_TENSORS}
    backbone: Any = encoder.backbone.model
    state |= {f"encoder.{name}": tensor for name, tensor in backbone.state_dict().items()}
    for name, tensor in decoder.state_dict().items():
        state[f"decoder.{_renamed(name, _THEIR_NAMES)}"] = tensor
    table = state.pop("decoder.decoder_pos_embed")
    if not torch.allclose(table, model.decoder.decoder_pos_embed, atol=1e-5):
        side = decoder.config.grid
        raise ConfigError(
            f"AutoencoderRAE stores no positions, and those that it builds for {side} x {side} tokens are not this"
            f" decoder's: it stretches those of {STRETCHED_TO} x {STRETCHED_TO} over every grid"
        )
    try:
        check_weights(state, model.state_dict(), f"`{encoder.info.name}`")
    except CorruptData as error:
        raise ConfigError(f"AutoencoderRAE has no place for this encoder: {error.message}") from error
    model.load_state_dict(state)
    model.eval()
    _check_images(model, decoder, encoder)
    return model


def _sized(config: DecoderConfig, encoder: Encoder, stats: tuple[Tensor, Tensor] | None) -> Any:
    """diffusers' model of these sizes, its weights yet to be filled in."""
    diffusers = load_diffusers(CLASS_NAME)
    backbone: Any = encoder.backbone.model
    encoder_type = next(name for name, kind in _KINDS.items() if kind == encoder.info.kind)
    mean, std = (None, None) if stats is None else (stats[0], torch.sqrt(stats[1] + EPSILON) - _STD_EPSILON)
    settings = {
        "encoder_type": encoder_type,
        "encoder_hidden_size": config.token_dim,
        "encoder_patch_size": backbone.config.patch_size,
        "encoder_num_hidden_layers": backbone.config.num_hidden_layers,
        "encoder_input_size": encoder.input_size,
        "encoder_norm_mean": list(config.image_mean),
        "encoder_norm_std": list(config.image_std),
        "decoder_hidden_size": config.hidden_size,
        "decoder_num_hidden_layers": config.depth,
        "decoder_num_attention_heads": config.num_heads,
        "decoder_intermediate_size": config.intermediate_size,
        "patch_size": config.patch_size,
        "latents_mean": mean,
        "latents_std": std,
    }
    try:
        with torch.random.fork_rng(devices=[]):  # building draws weights that are overwritten; the caller's draws stay
            return diffusers.AutoencoderRAE(**settings)
    except AttributeError as error:  # its SigLIP2 asks for parts that newer transformers call otherwise
        import transformers

        versions = f"diffusers {diffusers.__version__} with transformers {transformers.__version__}"
        raise ConfigError(f"{versions} cannot build an AutoencoderRAE of `{encoder_type}`: {error}") from error


@torch.inference_mode()
def _check_images(model: Any, decoder: ViTDecoder, encoder: Encoder) -> None:
    """Shapes do not tell heads, epsilons and activations of an encoder, which diffusers takes for granted."""
    side = decoder.config.image_size
    image = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    apart = (decoder(encoder(image)) - model(image).sample).abs().max().item()
    if not apart < TOLERANCE:
        raise ConfigError(
            f"AutoencoderRAE would reconstruct images up to {apart:.2g} apart from this decoder's: it takes other heads"
            f" or constants of `{encoder.info.name}` for granted"
        )
