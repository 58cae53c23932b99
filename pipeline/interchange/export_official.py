"""`rae export official`: a decoder or transformer as the files that the release (`bytetriper/RAE`) loads.

    decoder    model.pt (a bare state dict), config.json (`decoder_config_path` names its folder)
    dit        stage2_model.pt (a bare state dict), config.yaml (what `--config` of the official scripts takes)
    both       stat.pt ({mean, var} of the latents), where there are statistics

A decoder and a transformer exported into one folder are what config.yaml samples with.
"""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from rae.pipeline.console import Console
from rae.pipeline.interchange.exports import exported
from rae.pipeline.interchange.official_yaml import DIT_MODELS, FIXED_DIT, SHIFT_BASE, TRANSPORT_KEYS
from rae.store.artifacts import Workspace
from rae.store.errors import ConfigError
from rae.store.manifest import Artifact, Json

if TYPE_CHECKING:
    from torch import Tensor

    from rae.stages.models.dit import DiTConfig
    from rae.stages.models.trained import DitDescription

# The official class for each kind of encoder, and the argument that names its weights.
_ENCODER_CLASSES = {
    "dinov2": ("Dinov2withNorm", "dinov2_path"),
    "mae": ("MAEwNorm", "model_name"),
    "siglip": ("SigLIP2wNorm", "model_name"),
}
# Choices that one of the official classes has and the other has not.
_ONLY_OF = {"use_pos_embed": "DiT-DH", "use_gembed": "LightningDiT", "learn_sigma": "LightningDiT"}


def export_official(ref: str, out: Path, workspace: Workspace, console: Console) -> Json:
    """Write the files into the folder `out`; returns what `--json` prints.

    Raises:
        ConfigError: an artifact of another kind, or a model that the official code cannot load or would misread.
        StaleInput: other files of these names are there already.
    """
    artifact = workspace.resolve(ref)
    if artifact.kind not in ("decoder", "dit"):
        raise ConfigError(f"`{ref}` is of kind {artifact.kind}; the release has files for decoders and dits")
    files = _decoder_files(artifact) if artifact.kind == "decoder" else _dit_files(artifact, out)
    with exported(out, console) as partial:
        for name, write in files.items():
            write(partial / name)
    if "stat.pt" not in files:
        console.say(
            f"{artifact.kind}/{artifact.id} has no latent statistics beside it: stat.pt comes with the transformer"
        )
    return {"kind": artifact.kind, "id": artifact.id, "files": [str(out / name) for name in files]}


def _decoder_files(artifact: Artifact) -> dict[str, Callable[[Path], None]]:
    from rae.stages.models.decoder import ViTDecoder
    from rae.stages.models.trained import Decoder, read_latent_stats

    decoder = Decoder.load(artifact.payload)
    check_encoder(decoder.encoder, artifact)
    assert isinstance(decoder.model, ViTDecoder)  # what else reads the tokens of these encoders
    config = decoder.model.config
    about = {
        "architectures": ["ViTMAEForPreTraining"],
        "model_type": "vit_mae",
        "decoder_hidden_size": config.hidden_size,
        "decoder_intermediate_size": config.intermediate_size,
        "decoder_num_attention_heads": config.num_heads,
        "decoder_num_hidden_layers": config.depth,
        "hidden_size": config.token_dim,
        "hidden_act": "gelu",
        "layer_norm_eps": config.layer_norm_eps,
        "qkv_bias": True,
        "patch_size": config.patch_size,
        "image_size": config.image_size,
    }
    files = {"model.pt": _saved(decoder.model.state_dict()), "config.json": _text(json.dumps(about, indent=1))}
    if (artifact.payload / "latent_stats.safetensors").exists():
        files["stat.pt"] = _stats(*read_latent_stats(artifact.payload, config.token_dim, config.grid))
    return files


def _dit_files(artifact: Artifact, out: Path) -> dict[str, Callable[[Path], None]]:
    from rae.stages.models.trained import Dit

    dit = Dit.load(artifact.payload)
    check_encoder(dit.about.encoder, artifact)
    check_transport(dit.about, artifact)
    text = yaml.safe_dump(official_config(dit.about, out), sort_keys=False)
    return {
        "stage2_model.pt": _saved(dit.model.state_dict()),
        "config.yaml": _text(text),
        "stat.pt": _stats(dit.mean, dit.var),
    }


def check_encoder(encoder: Json, artifact: Artifact) -> None:
    """Refuse the tokens of encoders that the official code has no class for."""
    name, kind = encoder["name"], encoder["kind"]
    if kind not in _ENCODER_CLASSES:
        raise _refused(artifact, f"its encoder `{name}` is a {kind}, and there are classes for DINOv2, MAE and SigLIP")
    if re.fullmatch(r"facebook/dinov2-(small|base|large|giant)", name):
        raise _refused(artifact, f"its encoder `{name}` has no registers, of which the class for DINOv2 drops four")


def check_transport(about: "DitDescription", artifact: Artifact) -> None:
    """Refuse what the official sampler would take for something else."""
    path_type, prediction = about.transport["path_type"], about.transport["prediction"]
    if prediction == "data":
        raise _refused(artifact, "it predicts data, which would be read as a velocity without a word")
    if path_type == "VP" and prediction != "velocity":
        raise _refused(artifact, f"the drift of a {prediction} prediction on the VP path is another process's there")
    if about.config.num_classes == 0:
        raise _refused(artifact, "it is unconditional, and the sampling scripts ask for classes")


def _refused(artifact: Artifact, why: str) -> ConfigError:
    return ConfigError(f"the official code cannot use {artifact.kind}/{artifact.id}: {why}")


def official_config(about: "DitDescription", folder: Path) -> Json:
    """The YAML file with which the official scripts sample from what is exported into `folder`."""
    config, encoder = about.config, about.encoder
    transport = {key: about.transport[key] for key in TRANSPORT_KEYS}
    if transport["time_dist_type"] == "logit-normal":
        transport["time_dist_type"] = "logit-normal_0_1"
    encoder_cls, argument = _ENCODER_CLASSES[encoder["kind"]]
    shape = [config.in_channels, config.input_size, config.input_size]
    return {
        "stage_1": {
            "target": "stage1.RAE",
            "params": {
                "encoder_cls": encoder_cls,
                "encoder_config_path": encoder["name"],
                "encoder_input_size": encoder["input_size"],
                "encoder_params": {argument: encoder["name"]},
                "decoder_config_path": str(folder),
                "pretrained_decoder_path": str(folder / "model.pt"),
                "noise_tau": 0.0,
                "reshape_to_2d": True,
                "normalization_stat_path": str(folder / "stat.pt"),
            },
        },
        "stage_2": {"target": _target(config), "params": _dit_params(config), "ckpt": str(folder / "stage2_model.pt")},
        "transport": {"params": transport},
        "sampler": {"mode": "ODE", "params": {"sampling_method": "euler", "num_steps": 50}},
        "guidance": {"method": "cfg", "scale": 1.0, "t_min": 0.0, "t_max": 1.0},
        "misc": {
            "latent_size": shape,
            "num_classes": config.num_classes,
            "time_dist_shift_dim": math.prod(shape),
            "time_dist_shift_base": _shift_base(math.prod(shape), about.transport["time_dist_shift"]),
        },
    }


def _target(config: "DiTConfig") -> str:
    name = next(official for official, ours in DIT_MODELS.items() if ours == config.model)
    return {"DiTwDDTHead": "stage2.models.DDT.", "LightningDiT": "stage2.models.lightningDiT."}[name] + name


def _dit_params(config: "DiTConfig") -> Json:
    params = {key: value for key, value in config.to_dict().items() if key != "model"}
    if config.model == "LightningDiT":
        params |= {key: params[key][0] for key in ("hidden_size", "depth", "num_heads")}
    return params | {key: value for key, value in FIXED_DIT.items() if _ONLY_OF.get(key, config.model) == config.model}


def _shift_base(dim: int, shift: float) -> float:
    """The base for which sqrt(dim / base) is the shift; the paper's where that is meant."""
    return SHIFT_BASE if math.isclose(math.sqrt(dim / SHIFT_BASE), shift) else dim / shift**2


def _saved(value: dict[str, Any]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        import torch

        torch.save(value, path)  # equal values make equal files of one name

    return write


def _stats(mean: "Tensor", var: "Tensor") -> Callable[[Path], None]:
    return _saved({"mean": mean, "var": var})


def _text(text: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_text(text, encoding="utf-8")

    return write
