"""The official release's YAML files, read as names and values: `target: stage2.models.DDT.DiTwDDTHead` is only a word.

What the files say of the models' sizes, of transport and encoder, in our words; `official_config.py` makes a whole
configuration of them.
"""

import math
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field

from rae.pipeline.config import validated
from rae.stages.section import Fraction, Positive, Rate, Section
from rae.store.errors import ConfigError, MissingInput
from rae.store.manifest import Json

Sizes = Positive | tuple[Positive, ...]


class OfficialDit(Section):
    """`params` of the official transformers; those with a default are no choice here, as the release makes none."""

    input_size: Positive | None = None
    patch_size: Positive | None = None
    in_channels: Positive | None = None
    hidden_size: Sizes | None = None
    depth: Sizes | None = None
    num_heads: Sizes | None = None
    mlp_ratio: Rate | None = None
    class_dropout_prob: Fraction | None = None
    num_classes: Annotated[int, Field(ge=0)] | None = None
    use_qknorm: bool | None = None
    use_swiglu: Literal[True] = True
    use_rope: Literal[True] = True
    use_rmsnorm: Literal[True] = True
    use_pos_embed: Literal[True] = True
    use_gembed: Literal[True] = True
    wo_shift: Literal[False] = False
    learn_sigma: Literal[False] = False


FIXED_DIT = {key: field.default for key, field in OfficialDit.model_fields.items() if field.default is not None}
DIT_MODELS = {"DiTwDDTHead": "DiT-DH", "LightningDiT": "LightningDiT"}
# What the official classes are built with where their `params` say nothing.
_DIT_DEFAULTS: Json = {"in_channels": 768, "num_classes": 1000, "hidden_size": 1152, "depth": 28, "num_heads": 16}
_HEAD_DEFAULTS: Json = {"hidden_size": 2048, "depth": 2, "num_heads": 16}
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
    given = validated(OfficialDit, part(stage_2, "params"), where).model_dump(mode="json", exclude_none=True)
    settings = _DIT_DEFAULTS | {key: value for key, value in given.items() if key not in FIXED_DIT}
    model = DIT_MODELS[target]
    for key, head in _HEAD_DEFAULTS.items():
        if isinstance(settings[key], int):
            settings[key] = [settings[key]]
            if model == "DiT-DH":  # of its arguments `num_heads` alone may be one number, which is for both
                settings[key].append(settings[key][0] if key in given else head)
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
    if "time_dist_shift_dim" not in misc:
        return None
    dim = number(misc["time_dist_shift_dim"], "misc.time_dist_shift_dim")
    base = number(misc.get("time_dist_shift_base", SHIFT_BASE), "misc.time_dist_shift_base")
    if dim <= 0 or base <= 0:
        raise ConfigError(f"`misc.time_dist_shift_dim` {dim} and `time_dist_shift_base` {base} must be positive")
    return math.sqrt(dim / base)


def number(value: Any, key: str) -> float:
    """A number that YAML may have read as text (`1e-6`); `ConfigError` for anything else."""
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ConfigError(f"`{key}` is {value!r}; it must be a number") from None


def decoder_heads(official: Json, where: str) -> tuple[int, float] | None:
    """Heads and layer-norm epsilon of a decoder, from its own config.json; None if `official` is no such file."""
    if "decoder_num_attention_heads" not in official:
        return None
    heads: Any = official["decoder_num_attention_heads"]
    if not isinstance(heads, int) or heads < 1:
        raise ConfigError(f"{where}: `decoder_num_attention_heads` is {heads!r}; it must be a positive whole number")
    return heads, number(official.get("layer_norm_eps", 1e-12), f"{where}: layer_norm_eps")
