"""The official release's YAML files, read as names and values: `target: stage2.models.DDT.DiTwDDTHead` is only a word.

What the files say of the models' sizes, of transport and encoder, in our words; `official_config.py` makes a whole
configuration of them.
"""

import math
from pathlib import Path
from typing import Any

import yaml

from rae.pipeline.config import closest
from rae.store.errors import ConfigError, MissingInput
from rae.store.manifest import Json

# Choices of the official transformers that are none here, with the only value that the release uses.
FIXED_DIT = {
    "use_swiglu": True,
    "use_rope": True,
    "use_rmsnorm": True,
    "use_pos_embed": True,
    "use_gembed": True,
    "wo_shift": False,
    "learn_sigma": False,
}
DIT_MODELS = {"DiTwDDTHead": "DiT-DH", "LightningDiT": "LightningDiT"}
DIT_KEYS = (
    "input_size",
    "patch_size",
    "in_channels",
    "hidden_size",
    "depth",
    "num_heads",
    "mlp_ratio",
    "class_dropout_prob",
    "num_classes",
    "use_qknorm",
)
TRANSPORT_KEYS = ("path_type", "prediction", "loss_weight", "time_dist_type")
# The sizes that `decoder_config_path` names by its last folder.
DECODER_FOLDERS = {"ViTS": "S", "ViTB": "B", "ViTL": "L", "ViTXL": "XL"}
SHIFT_BASE = 4096


def read_mapping(path: Path) -> Json:
    """The mapping in a YAML or JSON file; `MissingInput` if it is not there, `ConfigError` if it is no such file."""
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MissingInput(f"there is no file {path}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path} must hold a mapping, as the release's YAML files do")
    return value


def part(value: Json, *keys: str) -> Json:
    """The mapping at `value[key][key]...`; an empty one where there is none."""
    for key in keys:
        inner = value.get(key)
        value = inner if isinstance(inner, dict) else {}
    return value


def encoder_name(official: Json) -> str | None:
    """The hub id or folder of the encoder in `stage_1`."""
    params = part(official, "stage_1", "params")
    inner = part(params, "encoder_params")
    name = inner.get("dinov2_path") or inner.get("model_name") or params.get("encoder_config_path")
    return str(name) if name else None


def dit_settings(stage_2: Json, where: str) -> Json:
    """The arguments of `DiTConfig` that a `stage_2` section (or a guidance model's) states.

    Raises `ConfigError` for an unknown class or parameter, and for a choice that the released models did not make.
    """
    target = str(stage_2.get("target", "")).rpartition(".")[2]
    if target not in DIT_MODELS:
        raise ConfigError(f"{where}: `target` is {stage_2.get('target')!r}; known are {', '.join(DIT_MODELS)}")
    params = part(stage_2, "params")
    for key in params:
        if key not in (*DIT_KEYS, *FIXED_DIT):
            raise ConfigError(f"{where}: a `{target}` has no parameter `{key}`{closest(key, [*DIT_KEYS, *FIXED_DIT])}")
    for key, value in FIXED_DIT.items():
        if params.get(key, value) != value:
            raise ConfigError(
                f"{where}: `{key}` is {params[key]}, and the transformers here are built for {value} only"
            )
    settings = {key: params[key] for key in DIT_KEYS if key in params}
    model = DIT_MODELS[target]
    parts = 2 if model == "DiT-DH" else 1
    for key in ("hidden_size", "depth", "num_heads"):
        if isinstance(settings.get(key), int):
            settings[key] = [settings[key]] * parts
    return {"model": model, **settings}


def transport_settings(official: Json) -> Json:
    """What `transport` and `misc` state: the keys of `create_transport` that are given, the shift as a number."""
    settings = {key: value for key, value in part(official, "transport", "params").items() if key in TRANSPORT_KEYS}
    if settings.get("time_dist_type") == "logit-normal_0_1":
        settings["time_dist_type"] = "logit-normal"
    if shift := time_dist_shift(part(official, "misc")):
        settings["time_dist_shift"] = shift
    return settings


def time_dist_shift(misc: Json) -> float | None:
    """sqrt(time_dist_shift_dim / time_dist_shift_base), if `misc` has the first."""
    dim, base = misc.get("time_dist_shift_dim"), misc.get("time_dist_shift_base", SHIFT_BASE)
    return math.sqrt(float(dim) / float(base)) if dim else None


def decoder_heads(official: Json, where: str) -> tuple[int, float] | None:
    """Heads and layer-norm epsilon of a decoder, from its own config.json; None if `official` is no such file."""
    if "decoder_num_attention_heads" not in official:
        return None
    heads: Any = official["decoder_num_attention_heads"]
    if not isinstance(heads, int) or heads < 1:
        raise ConfigError(f"{where}: `decoder_num_attention_heads` is {heads!r}; it must be a positive whole number")
    return heads, float(official.get("layer_norm_eps", 1e-12))
