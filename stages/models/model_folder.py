"""Folders of Hugging Face and diffusers models: found locally or in the hub's cache, and which of their files matter.

Light: imports neither torch nor transformers, and huggingface_hub for hub ids alone.
"""

from pathlib import Path
from typing import Any, Literal

from rae.store.errors import ConfigError, CorruptData, MissingInput
from rae.store.json_data import parse_object

EncoderKind = Literal["timm", "dinov2", "siglip", "naflex", "mae", "autoencoder_kl"]

KIND_OF_MODEL_TYPE: dict[str, EncoderKind] = {
    "dinov2": "dinov2",
    "dinov2_with_registers": "dinov2",
    "siglip": "siglip",
    "siglip_vision_model": "siglip",
    "siglip2": "naflex",
    "siglip2_vision_model": "naflex",
    "vit_mae": "mae",
}

# What a model folder may hold that its tokens follow from, and the weights that are read where it holds no better.
HUB_FILES = ("config.json", "preprocessor_config.json")
SAFETENSORS = ("model*.safetensors", "model.safetensors.index.json", "diffusion_pytorch_model.safetensors")
PICKLES = ("pytorch_model.bin", "diffusion_pytorch_model.bin")


def model_files(name: str, folder: Path) -> tuple[EncoderKind, tuple[Path, ...]]:
    """The family of the model in `folder`, and every file that its tokens follow from, sorted by name.

    Raises:
        ConfigError: a family that is not supported.
        MissingInput: no config.json, or no weights.
        CorruptData: a folder whose own files contradict or cannot be read.
    """
    config = folder / "config.json"
    if not config.is_file():
        where = "; its folder `vae` may be meant" if (folder / "vae" / "config.json").is_file() else ""
        raise MissingInput(f"{folder} is no model folder: it has no config.json{where}")
    kind = _kind(name, read_json(config))
    preprocessing = [path for path in (folder / "preprocessor_config.json",) if path.is_file()]
    weights = _checkpoint_files(folder, "diffusion_pytorch_model" if kind == "autoencoder_kl" else "model")
    return kind, tuple(sorted([config, *preprocessing, *weights], key=lambda path: path.name))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a model folder; `CorruptData` for what is none."""
    return parse_object(path.read_bytes(), str(path))


def hub_snapshot(hub_id: str, allow_download: bool) -> Path:
    """The folder of a hub model's newest cached version; asks the hub first where that is allowed."""
    # Imported where it is needed: half a second that no other encoder has to wait for.
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HFValidationError

    def fetch(*patterns: str) -> Path:
        return Path(snapshot_download(hub_id, allow_patterns=list(patterns), local_files_only=not allow_download))

    try:
        folder = fetch(*HUB_FILES, *SAFETENSORS)
        if allow_download and not any(folder.glob("*model*.safetensors")):
            folder = fetch(*HUB_FILES, *PICKLES)
    except HFValidationError as error:
        raise ConfigError(f"`{hub_id}` is no Hugging Face hub id: {error}") from error
    except OSError as error:
        if allow_download:
            raise MissingInput(
                f"the encoder `{hub_id}` could not be fetched from the Hugging Face hub into {constants.HF_HUB_CACHE}:"
                f" {error}",
                f"hf download {hub_id}",
            ) from error
        raise _not_cached(hub_id, constants.HF_HUB_CACHE) from error
    if not allow_download and not _has_checkpoint(folder):
        raise _not_cached(hub_id, constants.HF_HUB_CACHE)
    return folder


def _not_cached(hub_id: str, cache: str) -> MissingInput:
    return MissingInput(
        f"the encoder `{hub_id}` is not in the Hugging Face cache {cache}, and nothing is downloaded unasked",
        "rae encode CONFIG -s encode.allow_download=true",
    )


def _has_checkpoint(folder: Path) -> bool:
    weights = any(any(folder.glob(pattern)) for pattern in (*SAFETENSORS, *PICKLES))
    return (folder / "config.json").is_file() and weights


def _kind(name: str, config: dict[str, Any]) -> EncoderKind:
    """The family of a model, by its configuration: transformers says `model_type`, diffusers `_class_name`."""
    model_type, diffusers_class = config.get("model_type"), config.get("_class_name")
    if diffusers_class == "AutoencoderKL":
        return "autoencoder_kl"
    if diffusers_class is not None:
        raise ConfigError(f"`{name}` is diffusers' {diffusers_class}; of its models AutoencoderKL is an encoder here")
    if model_type not in KIND_OF_MODEL_TYPE:
        known = ", ".join(sorted(KIND_OF_MODEL_TYPE))
        raise ConfigError(f"`{name}` is a model of type `{model_type}`; encoders are of type {known}")
    return KIND_OF_MODEL_TYPE[model_type]


def _checkpoint_files(folder: Path, stem: str) -> list[Path]:
    """The weight files in the libraries' order of preference: safetensors whole, in shards, then a pickle."""
    pickle = "pytorch_model.bin" if stem == "model" else f"{stem}.bin"
    index = folder / f"{stem}.safetensors.index.json"
    if (folder / f"{stem}.safetensors").is_file():
        return [folder / f"{stem}.safetensors"]
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        shards = sorted(set(weight_map.values())) if isinstance(weight_map, dict) else []
        if not shards or any(not isinstance(shard, str) or Path(shard).name != shard for shard in shards):
            raise CorruptData(f"{index} does not list the weight files beside it")
        for shard in shards:
            if not (folder / shard).is_file():
                raise MissingInput(f"{folder} lacks {shard}, which its {index.name} lists")
        return [index, *(folder / shard for shard in shards)]
    if (folder / pickle).is_file():
        return [folder / pickle]
    raise MissingInput(f"{folder} holds no weights: neither {stem}.safetensors nor {pickle}")
