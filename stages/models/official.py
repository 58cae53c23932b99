"""Checkpoints of the official release (`bytetriper/RAE`): recognised by their tensors, read strictly, never unpickled.

Names of tensors are the same there and here, so what is left is to tell the models apart and to infer their sizes from
the tensors' shapes.
"""

import errno
import math
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor

from rae.stages.models.decoder import DecoderConfig, ViTDecoder
from rae.stages.models.dit import DiTConfig, build_dit
from rae.stages.models.saving import check_weights
from rae.stages.models.sizes import VIT_SIZES
from rae.store.errors import ConfigError, CorruptData, MissingInput
from rae.store.manifest import Json

Kind = Literal["decoder", "dit", "backbone"]
State = Mapping[str, Tensor]

# A tensor that each kind of model has, and no other.
_MARKS: dict[Kind, str] = {"decoder": "decoder_", "dit": "x_embedder.", "backbone": "patch_embed."}
# What torch's wrappers put before every name: `torch.compile`, and DistributedDataParallel.
_WRAPPERS = ("_orig_mod.", "module.")


@dataclass(frozen=True)
class Checkpoint:
    """Tensors of one model by their official names; `weights` says which set of a training checkpoint they are."""

    path: Path
    kind: Kind
    state: State
    weights: Literal["ema", "model"]

    def shape(self, name: str, dims: int) -> tuple[int, ...]:
        """A tensor's shape; `CorruptData` unless it is there with that many dimensions, none of them empty."""
        if name not in self.state:
            raise CorruptData(f"{self.path} does not hold a whole {self.kind}: it lacks `{name}`")
        shape = tuple(self.state[name].shape)
        if len(shape) != dims or 0 in shape:
            raise CorruptData(f"{self.path} holds `{name}` as {list(shape)}, which is no shape that a {self.kind} has")
        return shape

    def count(self, prefix: str) -> int:
        """How many `PREFIX.N` there are."""
        return len({name.split(".")[1] for name in self.state if name.startswith(f"{prefix}.")})


def read_tensors(path: Path) -> dict[str, Any]:
    """What a .safetensors, .pt or .pth file holds; its large tensors stay on the disk until they are used.

    Raises:
        MissingInput: there is no such file.
        CorruptData: no tensors by name, or a pickle that asks for more than tensors.
    """
    if not path.is_file():
        raise MissingInput(f"there is no file {path}")
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        value = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except OSError as error:
        if error.errno != errno.EINVAL:  # of a file that is cut off: its beginning is looked for before it
            raise
        raise CorruptData(f"{path} cannot be read as weights: it is cut off") from error
    except pickle.UnpicklingError as error:
        raise CorruptData(
            f"{path} is no checkpoint of plain tensors: it is damaged, or a pickle that would run code, which is never"
            " loaded"
        ) from error
    except Exception as error:  # a damaged file makes the unpickler raise anything
        raise CorruptData(f"{path} cannot be read as weights: {error}") from error
    if not isinstance(value, dict) or not value:
        raise CorruptData(f"{path} holds no tensors by name")
    return value


def read_checkpoint(path: Path, weights: Literal["ema", "model"] | None = None) -> Checkpoint:
    """The model in a bare state dict or in a training checkpoint {model, ema, optimizer, ...}.

    Args:
        path: .safetensors, .pt or .pth.
        weights: which set of a training checkpoint; by default `ema`, which the release samples from.

    Raises:
        ConfigError: `weights` asks for a set that the file does not have.
        MissingInput, CorruptData: as `read_tensors`, or the tensors are of no model of the release.
    """
    value = read_tensors(path)
    known: tuple[Literal["ema", "model"], ...] = ("ema", "model")
    sets = [name for name in known if isinstance(value.get(name), dict)]
    if weights is not None and weights not in sets:
        found = f"has {' and '.join(f'`{name}`' for name in sets)}" if sets else "is a bare state dict with one set"
        raise ConfigError(f"{path} {found}, so `--weights {weights}` cannot be had; leave it out")
    chosen = weights or (sets[0] if sets else "ema")
    state = value[chosen] if sets else value
    if not all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in state.items()):
        raise CorruptData(f"{path} holds other things than tensors by name")
    for wrapper in (*_WRAPPERS, *_WRAPPERS):  # either may be inside the other
        if all(name.startswith(wrapper) for name in state):
            state = {name.removeprefix(wrapper): tensor for name, tensor in state.items()}
    if any(name.startswith("decoder.decoder_") for name in state):  # a whole autoencoder; its encoder is frozen
        state = {name.removeprefix("decoder."): value for name, value in state.items() if name.startswith("decoder.")}
    kinds = [kind for kind, mark in _MARKS.items() if any(name.startswith(mark) for name in state)]
    if len(kinds) != 1:
        raise CorruptData(
            f"{path} holds no model of the release (a decoder, a DiT, or DINO's ViT for the discriminator); its first"
            f" tensors are {', '.join(f'`{name}`' for name in list(state)[:3])}"
        )
    return Checkpoint(path, kinds[0], {name: _floats(path, name, tensor) for name, tensor in state.items()}, chosen)


def _floats(path: Path, name: str, tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        raise CorruptData(f"{path} holds `{name}` as {tensor.dtype}, which no weights of the release are")
    if not bool(tensor.isfinite().all()):
        raise CorruptData(f"{path} holds `{name}` with values that are not finite: a training that failed, or damage")
    return tensor.float()


def read_stats(path: Path, latent_shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Mean and variance, float32 [C, H, W], of a `stat.pt`; an absent mean is zero.

    Raises `CorruptData` unless they are finite, of the latents' shape, and the variance is not negative.
    """
    value = read_tensors(path)
    for name in value:
        if name not in ("mean", "var"):
            raise CorruptData(f"{path} is no file of latent statistics: it holds `{name}` besides `mean` and `var`")
    if value.get("mean") is None:
        value["mean"] = torch.zeros(latent_shape)
    for name in ("mean", "var"):
        tensor = value.get(name)
        if not isinstance(tensor, Tensor) or tuple(tensor.shape) != latent_shape:
            found = list(tensor.shape) if isinstance(tensor, Tensor) else "not there"
            raise CorruptData(f"in {path}, `{name}` is {found} where {list(latent_shape)} is needed")
        if not bool(tensor.isfinite().all()) or (name == "var" and bool((tensor < 0).any())):
            raise CorruptData(f"in {path}, `{name}` has values that are no {'mean' if name == 'mean' else 'variance'}")
    return value["mean"].float(), value["var"].float()


# ---- sizes from shapes -----------------------------------------------------------------------------------------------


def latent_size(checkpoint: Checkpoint) -> tuple[int, int]:
    """Channels of the latents that a decoder or DiT takes, and the side of their grid."""
    if checkpoint.kind == "decoder":
        channels = checkpoint.shape("decoder_embed.weight", 2)[1]
        return channels, math.isqrt(checkpoint.shape("decoder_pos_embed", 3)[1])  # a class token before the grid's
    _, channels, patch_size, _ = checkpoint.shape("x_embedder.proj.weight", 4)
    return channels, math.isqrt(checkpoint.shape("pos_embed", 3)[1]) * patch_size


def infer_decoder(
    checkpoint: Checkpoint, encoder: Json, num_heads: int | None = None, layer_norm_eps: float = 1e-12
) -> DecoderConfig:
    """The sizes of a decoder; its number of heads, which no shape tells, by its width if it is not given.

    Raises:
        ConfigError: a width of none of the released sizes, without `num_heads`.
        CorruptData: the tensors are not exactly those of a decoder of these sizes.
    """
    hidden_size, (token_dim, grid) = checkpoint.shape("decoder_embed.weight", 2)[0], latent_size(checkpoint)
    if num_heads is None:
        known = [size["num_heads"] for size in VIT_SIZES.values() if size["hidden_size"] == hidden_size]
        if not known:
            raise ConfigError(
                f"no released decoder is {hidden_size} wide, so the number of heads of {checkpoint.path} must be given:"
                " name its config.json with `--config`"
            )
        num_heads = known[0]
    config = DecoderConfig(
        token_dim=token_dim,
        grid=grid,
        hidden_size=hidden_size,
        depth=checkpoint.count("decoder_layers"),
        num_heads=num_heads,
        intermediate_size=checkpoint.shape("decoder_layers.0.intermediate.dense.weight", 2)[0],
        patch_size=math.isqrt(checkpoint.shape("decoder_pred.weight", 2)[0] // 3),
        image_mean=tuple(encoder["mean"]),
        image_std=tuple(encoder["std"]),
        layer_norm_eps=layer_norm_eps,
    )
    with torch.device("meta"):
        own = ViTDecoder(config).state_dict()
    check_weights(checkpoint.state, own, str(checkpoint.path))
    return config


def infer_dit(checkpoint: Checkpoint, given: DiTConfig | None = None) -> DiTConfig:
    """The sizes of a DiT-DH or LightningDiT: as `given`, else from the shapes, with labels dropped in training.

    Raises:
        ConfigError: sizes that shapes leave open (a body as wide as the head, an unusual MLP ratio), without `given`.
        CorruptData: the tensors are not exactly those of a transformer of these sizes.
    """
    config = given or _dit_from_shapes(checkpoint)
    with torch.device("meta"):
        own = build_dit(config).state_dict()
    check_weights(checkpoint.state, own, str(checkpoint.path))
    return config


def _dit_from_shapes(checkpoint: Checkpoint) -> DiTConfig:
    width, _, patch_size, _ = checkpoint.shape("x_embedder.proj.weight", 4)
    channels, input_size = latent_size(checkpoint)
    blocks = range(checkpoint.count("blocks"))
    widths = [checkpoint.shape(f"blocks.{block}.norm1.weight", 1)[0] for block in blocks]
    hidden = [checkpoint.shape(f"blocks.{block}.mlp.w3.weight", 2)[1] for block in blocks]
    parts, ropes = [width], ["feat_rope"]
    if paired := "s_embedder.proj.weight" in checkpoint.state:
        parts, ropes = [checkpoint.shape("s_embedder.proj.weight", 4)[0], width], ["enc_feat_rope", "dec_feat_rope"]
    if len(set(parts)) != len(parts):
        raise ConfigError(
            f"body and head of the DiT-DH in {checkpoint.path} are both {width} wide, so its shapes do not tell where"
            " one ends: name its YAML file with `--config`"
        )
    return DiTConfig(
        model="DiT-DH" if paired else "LightningDiT",
        in_channels=channels,
        input_size=input_size,
        patch_size=patch_size,
        hidden_size=tuple(parts),
        depth=tuple(widths.count(part) for part in parts),
        num_heads=tuple(
            max(part // checkpoint.shape(f"{rope}.freqs_cos", 2)[1], 1) for part, rope in zip(parts, ropes, strict=True)
        ),
        mlp_ratio=_mlp_ratio(checkpoint.path, widths, hidden),
        num_classes=checkpoint.shape("y_embedder.embedding_table.weight", 2)[0] - 1,
        use_qknorm="blocks.0.attn.q_norm.weight" in checkpoint.state,
    )


def _mlp_ratio(path: Path, widths: list[int], hidden: list[int]) -> float:
    """The roundest ratio r for which every block's hidden width is 2/3 of r times its width, rounded down."""
    least = max((1.5 * one / width for width, one in zip(widths, hidden, strict=True)), default=0.0)
    for scale in (1, 10, 100, 1000):
        ratio = math.ceil(least * scale - 1e-6) / scale
        if all(int(2 / 3 * int(width * ratio)) == one for width, one in zip(widths, hidden, strict=True)):
            return ratio
    raise ConfigError(f"the MLP ratio of the blocks in {path} is no round number: name its YAML file with `--config`")


def count_parameters(config: DecoderConfig | DiTConfig) -> int:
    """Numbers that are trained in a model of this configuration."""
    with torch.device("meta"):
        model = ViTDecoder(config) if isinstance(config, DecoderConfig) else build_dit(config)
    return sum(parameter.numel() for parameter in model.parameters())


def check_backbone(checkpoint: Checkpoint) -> str:
    """Which recipe of the discriminator this backbone is for: `S_8`, `S_16` or `B_16`.

    Raises `CorruptData` unless the tensors are exactly those of one of them.
    """
    from rae.stages.models.discriminator import BACKBONES, DinoDiscriminator  # timm, seconds that others do without

    width, _, patch_size, _ = checkpoint.shape("patch_embed.proj.weight", 4)
    sizes = {name: (size["embed_dim"], size["patch_size"]) for name, size in BACKBONES.items()}
    for name, size in sizes.items():
        if size == (width, patch_size):
            with torch.device("meta"):
                own = DinoDiscriminator(name).backbone.state_dict()
            check_weights(checkpoint.state, own, str(checkpoint.path))
            return name
    known = ", ".join(f"{name} ({width} wide, patch {patch})" for name, (width, patch) in sizes.items())
    raise CorruptData(
        f"{checkpoint.path} is a ViT {width} wide with patches of {patch_size} pixels, and no discriminator has it;"
        f" there are {known}"
    )
