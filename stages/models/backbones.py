"""The networks inside an `Encoder`, loaded strictly and brought to one shape of output: tokens [B, C, H, W].

timm's and Hugging Face's take normalised images [B, 3, S, S], and their tokens leave a layer norm without affine part.
Yours takes images in [0, 1], and its tokens are left as they are.
"""

import contextlib
import copy
import pickle
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from rae.stages.models.geometry import create_timm
from rae.stages.models.model_folder import EncoderKind, read_json
from rae.stages.models.own_encoder import OwnEncoder, checked
from rae.stages.models.saving import check_weights
from rae.stages.models.weights import EncoderFiles
from rae.store.errors import CorruptData

# Parts of a Hugging Face checkpoint that are rightly left unread: the text tower, MAE's decoder, pooling, heads.
UNUSED_PARTS = ("text_model.", "logit_", "decoder.", "pooler.", "classifier.")


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Tensors by name from a .safetensors file, or from torch's own format without unpickling code.

    Raises:
        CorruptData: neither of these.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise CorruptData(f"{path} cannot be read as weights: {error}") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CorruptData(f"{path} is not a state dict of tensors")
    return state


class TimmBackbone(nn.Module):
    """A timm model, read at the feature map `feature_index`."""

    def __init__(self, model: nn.Module, feature_index: int) -> None:
        super().__init__()
        self.model = model
        self.feature_index = feature_index

    def features(self, images: Tensor) -> list[Tensor]:
        """Normalised images [B, 3, S, S] -> every map [B, c, h, w] up to the one that becomes tokens, finest first."""
        return self._maps(images, list(range(self.feature_index + 1)))

    def tokens(self, images: Tensor) -> Tensor:
        """Normalised images [B, 3, S, S] -> [B, C, H, W], the layer norm over C taken."""
        (feature_map,) = self._maps(images, [self.feature_index])
        channels_last = feature_map.float().movedim(1, -1)
        # A raw feature map has the scale of its batch norm; a transformer's tokens leave a layer norm. So do these.
        normed = F.layer_norm(channels_last, channels_last.shape[-1:], eps=1e-6)
        return normed.movedim(-1, 1).contiguous()

    def _maps(self, images: Tensor, indices: list[int]) -> list[Tensor]:
        # On the whole model, so that its weights load strictly; equal to `features_only` to the bit.
        run: Any = self.model.forward_intermediates
        maps: list[Tensor] = run(images, indices=indices, stop_early=True, intermediates_only=True)
        return maps


def load_timm(files: EncoderFiles) -> nn.Module:
    """timm's model with the file's weights.

    Raises:
        CorruptData: the file cannot be read, or holds other tensors than the architecture's.
    """
    state = read_state_dict(files.folder_or_file)
    with torch.random.fork_rng(devices=[]):  # building draws weights that are overwritten; the caller's draws stay
        model: nn.Module = create_timm(files.architecture)
    if "_conv_stem.weight" in state:
        state = _renamed_in_order(state, model.state_dict(), files)
    check_weights(state, model.state_dict(), str(files.folder_or_file), f"timm's `{files.architecture}`")
    model.load_state_dict(state)
    return model


def _renamed_in_order(state: dict[str, Tensor], wanted: dict[str, Tensor], files: EncoderFiles) -> dict[str, Tensor]:
    """Gives the tensors of the EfficientNet-PyTorch port (`_conv_stem`, `_blocks.0._bn1`) timm's names.

    Both list the same tensors in the same order; shapes are checked one by one.
    """
    shapes = [tuple(value.shape) for value in state.values()]
    if shapes != [tuple(value.shape) for value in wanted.values()]:
        raise CorruptData(
            f"{files.folder_or_file} does not hold the tensors of timm's `{files.architecture}` in its order"
        )
    return dict(zip(wanted, state.values(), strict=True))


class OwnBackbone(nn.Module):
    """A copy of a module of one's own: freezing it and moving it to another device leave the original alone."""

    def __init__(self, source: OwnEncoder) -> None:
        super().__init__()
        self.model = copy.deepcopy(source.module)
        self.name = source.name
        # Batches are encoded by several threads, and nobody promised that a module keeps nothing between its lines.
        self._one_at_a_time = threading.Lock()

    def features(self, images: Tensor) -> list[Tensor]:
        """The tokens alone."""
        return [self.tokens(images)]

    def tokens(self, images: Tensor) -> Tensor:
        """Images [B, 3, S, S] in [0, 1] -> [B, C, H, W]; `ConfigError` if the module returns anything else."""
        with self._one_at_a_time:
            return checked(self.model(images), images, self.name)


class HuggingFaceBackbone(nn.Module):
    """A vision transformer of transformers: its patch tokens after the last layer norm, stripped of its affine part."""

    def __init__(self, model: Any, kind: EncoderKind, grid: int) -> None:
        super().__init__()
        self.model = model
        self.kind = kind
        self.grid = grid
        if kind == "mae":
            model.config.mask_ratio = 0.0
        _strip_final_norm(model)

    def features(self, images: Tensor) -> list[Tensor]:
        """The tokens alone."""
        return [self.tokens(images)]

    def tokens(self, images: Tensor) -> Tensor:
        """Normalised images [B, 3, S, S] -> [B, C, H, W], class and register tokens left out."""
        hidden: Tensor = self._run(images).last_hidden_state
        patches = hidden[:, hidden.shape[1] - self.grid**2 :]  # class and register tokens stand in front
        return patches.transpose(1, 2).reshape(len(patches), -1, self.grid, self.grid)

    def _run(self, images: Tensor) -> Any:
        if self.kind == "dinov2":
            return self.model(pixel_values=images)
        if self.kind == "siglip":
            return self.model(pixel_values=images, interpolate_pos_encoding=True)
        if self.kind == "naflex":
            return self._run_naflex(images)
        # MAE shuffles patches by sorting this noise, even when it masks none: ascending noise keeps their order.
        order = torch.arange(self.grid**2, device=images.device, dtype=torch.float32).expand(len(images), -1)
        return self.model(pixel_values=images, noise=order, interpolate_pos_encoding=True)

    def _run_naflex(self, images: Tensor) -> Any:
        """SigLIP2 of variable resolution takes patches [B, N, P * P * 3], which of them count, and each grid."""
        side = self.grid
        patch = images.shape[-1] // side
        grid = images.reshape(-1, 3, side, patch, side, patch)  # [B, 3, H, P, W, P]
        patches = grid.permute(0, 2, 4, 3, 5, 1).reshape(len(images), side**2, -1)
        shapes = torch.full((len(images), 2), side, device=images.device)
        every = torch.ones(patches.shape[:2], dtype=torch.long, device=images.device)
        return self.model(pixel_values=patches, pixel_attention_mask=every, spatial_shapes=shapes)


def _strip_final_norm(model: nn.Module) -> None:
    """Replaces the last layer norm by one without affine part, and skips SigLIP's pooling head behind it."""
    for name, module in list(model.named_modules()):
        path, _, leaf = name.rpartition(".")
        if leaf == "post_layernorm" or name == "layernorm":
            owner: Any = model.get_submodule(path)
            norm: Any = module
            setattr(owner, leaf, nn.LayerNorm(norm.normalized_shape, eps=norm.eps, elementwise_affine=False))
            if hasattr(owner, "use_head"):
                owner.use_head = False
            return
    raise RuntimeError(f"{type(model).__name__} has no final layer norm under the names that transformers uses")


def load_hugging_face(files: EncoderFiles) -> Any:
    """The vision model of a Hugging Face folder, in float32.

    Raises:
        CorruptData: weights that cannot be read, are missing, unknown or of another shape.
    """
    # Seconds that only these encoders need.
    import transformers

    folder = files.folder_or_file
    architectures = {
        "dinov2": transformers.Dinov2Model,
        "dinov2_with_registers": transformers.Dinov2WithRegistersModel,
        "siglip": transformers.SiglipVisionModel,
        "siglip_vision_model": transformers.SiglipVisionModel,
        "siglip2": transformers.Siglip2VisionModel,
        "siglip2_vision_model": transformers.Siglip2VisionModel,
        "vit_mae": transformers.ViTMAEModel,
    }
    architecture: Any = architectures[read_json(folder / "config.json")["model_type"]]
    safetensors = not any(path.suffix == ".bin" for path in files.files)  # .bin is read with weights_only=True
    try:
        with _quiet_transformers(), torch.random.fork_rng(devices=[]):
            model, report = architecture.from_pretrained(
                folder,
                local_files_only=True,
                use_safetensors=safetensors,
                dtype=torch.float32,
                output_loading_info=True,
            )
    except (OSError, RuntimeError, ValueError, SafetensorError, pickle.UnpicklingError) as error:
        raise CorruptData(f"{folder} cannot be loaded as `{files.name}`: {error}") from error
    unknown = [key for key in report["unexpected_keys"] if not key.startswith(UNUSED_PARTS)]
    for problem, keys in (("lacks the", report["missing_keys"]), ("has an unknown", unknown)):
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise CorruptData(f"the checkpoint in {folder} {problem} tensor `{min(keys)}`{more}")
    return model


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No progress bars or reports while loading; what matters in them is raised instead."""
    from transformers.utils import logging as transformers_logging

    logging: Any = transformers_logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
