"""diffusers' AutoencoderKL, the VAE whose place a representation autoencoder takes: the baseline.

Its latents are the mean of the posterior, raw: `scaling_factor` and `shift_factor` of its configuration are for other
trainers, and whitening with the store's own statistics does their work here. Its decoder reads them raw, too.
"""

import pickle
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from rae.stages.models.weights import EncoderFiles
from rae.store.errors import CorruptData, MissingInput
from rae.store.manifest import Json


class KlBackbone(nn.Module):
    """Images [B, 3, S, S] in [-1, 1] -> the posterior's mean [B, C, S / stride, S / stride]."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        model.decoder = nn.Identity()  # most of its memory, and of no use here

    def features(self, images: Tensor) -> list[Tensor]:
        """The latents alone."""
        return [self.tokens(images)]

    def tokens(self, images: Tensor) -> Tensor:
        """Images [B, 3, S, S] in [-1, 1] -> [B, C, H, W]."""
        mean: Tensor = self.model.encode(images).latent_dist.mean
        return mean


class KlDecoder(nn.Module):
    """The decoder of an AutoencoderKL: raw latents [B, C, H, W] -> images [B, 3, S, S], about [0, 1] and not clamped.

    `image_size` is the side in pixels of the images that it is to make of them.
    """

    def __init__(self, model: Any, image_size: int) -> None:
        super().__init__()
        # Without what diffusers notes besides sizes: its version, and where the model lay.
        sizes = {key: value for key, value in model.config.items() if not key.startswith("_")}
        self.config: Json = {"_class_name": "AutoencoderKL", **sizes}
        self.image_size = image_size
        self.post_quant_conv = model.post_quant_conv if model.post_quant_conv is not None else nn.Identity()
        self.decoder = model.decoder

    @classmethod
    def from_config(cls, config: Json, image_size: int) -> Self:
        """With weights yet to be loaded; `config` is diffusers'. Raises `MissingInput` if that is not installed."""
        with torch.random.fork_rng(devices=[]):  # building draws weights that are overwritten; the caller's draws stay
            return cls(load_diffusers("AutoencoderKL").AutoencoderKL.from_config(config), image_size)

    def forward(self, tokens: Tensor) -> Tensor:
        """Raw latents [B, C, H, W] -> images [B, 3, S, S]."""
        images: Tensor = self.decoder(self.post_quant_conv(tokens))
        return images / 2 + 0.5


def load_autoencoder_kl(files: EncoderFiles) -> Any:
    """diffusers' model in float32, with every one of its weights and no other.

    Raises:
        MissingInput: diffusers is not installed.
        CorruptData: weights that cannot be read, are missing, unknown or of another shape.
    """
    folder = files.folder_or_file
    model_class: Any = load_diffusers("AutoencoderKL").AutoencoderKL
    try:
        model, report = model_class.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=_safetensors(files.files),
            torch_dtype=torch.float32,
            low_cpu_mem_usage=False,
            output_loading_info=True,
        )
    except (OSError, RuntimeError, ValueError, SafetensorError, pickle.UnpicklingError) as error:
        raise CorruptData(f"{folder} cannot be loaded as `{files.name}`: {error}") from error
    for problem, key in (("lacks the", "missing_keys"), ("has an unknown", "unexpected_keys")):
        if names := report[key]:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise CorruptData(f"the checkpoint in {folder} {problem} tensor `{min(names)}`{more}")
    return model


def _safetensors(files: tuple[Path, ...]) -> bool:
    return not any(path.suffix == ".bin" for path in files)  # .bin is read with weights_only=True


def load_diffusers(what: str) -> Any:
    """The package diffusers, for its class `what`; `MissingInput` if it is not installed."""
    try:
        import diffusers  # optional, and seconds to load
    except ModuleNotFoundError as error:
        raise MissingInput(
            f"diffusers' {what} needs the package diffusers, which is not installed",
            'pip install "rae-pipeline[diffusers]"',
        ) from error
    return diffusers
