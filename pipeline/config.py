"""Configuration: a preset or a YAML file, plus dotted overrides, validated whole before anything is loaded."""

import difflib
import re
from collections.abc import Sequence
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, Self, TypeVar

import yaml
from pydantic import Field, ValidationError, model_validator

from rae.pipeline.sweep_section import SweepSection
from rae.stages.section import Section
from rae.stages.sections import EncodeSection, EvaluateSection, SampleSection, ShardsSection
from rae.stages.training.sections import TrainDecoderSection, TrainDitSection
from rae.store.catalog import check_name
from rae.store.errors import ConfigError, MissingInput

S = TypeVar("S", bound=Section)

# Faults that pydantic tells in Python's words.
_PLAIN = {
    "tuple_type": "input should be a list",
    "model_type": "input should be a section, keys with values",
    "bool_parsing": "input should be true or false",
    "bool_type": "input should be true or false",
}
_EXPONENTIAL = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")


class PipelineConfig(Section):
    """One YAML file: a name and a section per stage. A stage without a section is not part of the pipeline.

    `extends: OTHER`, a preset's name or a file beside this one, takes over what OTHER says: its sections key by key,
    save what stands here. It is resolved before validation, so that what is validated and shown is the whole.
    """

    shorthands = ("extends",)

    name: str
    description: str = ""
    shards: ShardsSection = Field(default_factory=ShardsSection)
    encode: EncodeSection | None = None
    train_decoder: TrainDecoderSection | None = None
    train_dit: TrainDitSection | None = None
    sample: SampleSection | None = None
    evaluate: EvaluateSection | None = None
    sweep: SweepSection | None = None

    @model_validator(mode="after")
    def _scored_alone(self) -> Self:
        if self.evaluate is not None and self.evaluate.decoder is not None and self.sample is not None:
            raise ValueError(
                "`evaluate.decoder` names a decoder whose reconstructions are scored alone, and there is a section"
                " `sample`: leave it out (-s sample=null), or score samples of another decoder with `sample.decoder`"
            )
        return self


def presets() -> list[str]:
    """Names of the configurations that come with rae, the experiments apart."""
    return _names_in(resources.files("rae.configs"))


def experiments() -> list[str]:
    """Names of the sweeps that come with rae."""
    return _names_in(resources.files("rae.configs") / "experiments")


def _names_in(folder: Traversable) -> list[str]:
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def read_text(config: str) -> str:
    """The YAML text of a preset's name or of a file."""
    path = Path(config)
    if path.suffix in {".yaml", ".yml"} or path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise MissingInput(f"there is no configuration file {config}", "rae config ls") from None
        except OSError as error:
            raise MissingInput(f"the configuration file {config} cannot be read ({error.strerror})") from None
        except UnicodeDecodeError:
            raise ConfigError(f"{config} is not text in UTF-8, so it is no configuration") from None
    root = resources.files("rae.configs")
    if config in experiments():
        root = root / "experiments"
    elif config not in presets():
        guess = closest(config, [*presets(), *experiments()])
        raise ConfigError(f"there is no preset or file `{config}`{guess}", "rae config ls")
    return root.joinpath(f"{config}.yaml").read_text(encoding="utf-8")


def load(config: str, overrides: Sequence[str] | None = None) -> PipelineConfig:
    """Read, override and validate a configuration; `ConfigError` names every key that is wrong."""
    value = _at_size(_read(config), config, overrides or ())
    for override in overrides or ():
        _apply(value, override)
    settings = validated(PipelineConfig, value, config)
    check_name(settings.name)
    return settings


def _read(config: str, heirs: tuple[str, ...] = ()) -> dict[str, Any]:
    """What a file says, upon what the file says that it `extends`; `heirs` are those that extend this one."""
    if Path(config).resolve() in map(Path.resolve, map(Path, heirs)):
        raise ConfigError(f"{' extends '.join((*heirs, config))}: a circle that ends nowhere")
    try:
        value = yaml.safe_load(read_text(config))
    except yaml.YAMLError as error:
        raise ConfigError(f"{config} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{config} must hold a mapping with a `name` and a section per stage")
    return _extended(value, config, heirs)


def _extended(value: dict[str, Any], config: str, heirs: tuple[str, ...] = ()) -> dict[str, Any]:
    """Settings upon those of the file that they `extends`, if they do; `config` is where they stand."""
    other = value.pop("extends", None)
    if other is None:
        return value
    if not isinstance(other, str):
        raise ConfigError(f"{config}: `extends` is {other!r}: it names one preset or file")
    beside = Path(config).parent / other
    base = _read(str(beside) if beside.suffix in {".yaml", ".yml"} else other, (*heirs, config))
    base.pop("name", None)  # another configuration is another name
    return base | {key: _upon(base.get(key), own) for key, own in value.items()}


def _at_size(value: dict[str, Any], config: str, overrides: Sequence[str]) -> dict[str, Any]:
    """A sweep's settings at the size that is asked for: upon what the size extends, and under what else it says."""
    sweep = value.get("sweep")
    if not isinstance(sweep, dict) or not isinstance(sweep.get("sizes"), dict):
        return value
    asked = [text.strip() for key, _, text in (one.partition("=") for one in overrides) if key.strip() == "sweep.size"]
    own = sweep["sizes"].get(asked[-1] if asked else sweep.get("size", "cpu"))
    if not isinstance(own, dict):  # validation says so
        return value
    base = _extended({"extends": own["extends"]}, config) if "extends" in own else {}
    for settings in (value, {key: one for key, one in own.items() if key != "extends"}):
        base |= {key: _upon(base.get(key), section) for key, section in settings.items()}
    return base


def _upon(base: Any, own: Any) -> Any:
    """A section upon the one that it extends, key by key; anything else replaces it."""
    return {**base, **own} if isinstance(base, dict) and isinstance(own, dict) else own


def words(config: str, overrides: Sequence[str] | None = None) -> list[str]:
    """How a command names this configuration."""
    return [config, *(word for override in overrides or () for word in ("-s", override))]


def validated(model: type[S], value: dict[str, Any], where: str) -> S:
    """The typed section, or `ConfigError` naming every key that is wrong."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise ConfigError(_explain(error, model, where)) from None


def _apply(value: dict[str, Any], override: str) -> None:
    """Set one dotted key, `train_dit.lr=1e-3`; the value is read as YAML."""
    dotted, separator, text = override.partition("=")
    keys = [key.replace("-", "_") for key in dotted.strip().split(".")]
    if not separator or not all(keys):
        raise ConfigError(f"`-s {override}` is not of the form key=value, such as -s train_dit.lr=1e-3")
    node = value
    for key in keys[:-1]:
        if node.get(key) is None:
            node[key] = {}
        node = node[key]
        if not isinstance(node, dict):
            raise ConfigError(f"`-s {override}`: `{key}` is a value, not a section")
    try:
        # YAML 1.1 reads `1e-3` as text; people mean the number.
        node[keys[-1]] = float(text) if _EXPONENTIAL.fullmatch(text.strip()) else yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"`-s {override}`: {text!r} is not a YAML value") from None


def _explain(error: ValidationError, model: type[Section], where: str) -> str:
    """Every fault of a configuration in one sentence, with the closest match for an unknown key."""
    faults: dict[str, list[str]] = {}
    for fault in error.errors():
        unknown = fault["type"] == "extra_forbidden"
        keys, fields = _path(model, fault["loc"], unknown)
        dotted = ".".join(keys)
        if unknown:
            what, why = f"unknown key `{dotted}`", closest(keys[-1], fields)
        elif fault["type"] == "missing":
            what, why = f"`{dotted}` is missing", ""
        elif fault["type"] == "value_error":
            what, why = f"in `{dotted}`, {fault['ctx']['error']}", ""
        else:
            message = _PLAIN.get(fault["type"], fault["msg"])
            what, why = f"`{dotted}` is {fault['input']!r}: ", message[0].lower() + message[1:]
        faults.setdefault(what, []).append(why)  # a value that is none of several kinds has a fault for each
    return f"{where}: " + "; ".join(what + ", or ".join(dict.fromkeys(whys)) for what, whys in faults.items())


def _path(model: type[Section], loc: tuple[int | str, ...], unknown: bool) -> tuple[list[str], list[str]]:
    """The keys that lead to a fault, without pydantic's names of the kinds it tried, and the keys known there."""
    keys: list[str] = []
    for place, part in enumerate(loc):
        field = model.model_fields.get(str(part))
        if field is not None:
            options = getattr(field.annotation, "__args__", (field.annotation,))
            model = next((one for one in options if isinstance(one, type) and issubclass(one, Section)), model)
        if field is not None or isinstance(part, int) or (unknown and place == len(loc) - 1):
            keys.append(str(part))
    return keys, [*model.model_fields, *model.shorthands]


def closest(word: str, known: list[str]) -> str:
    """` (did you mean `X`?)` for the closest known word, or nothing."""
    match = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f" (did you mean `{match[0]}`?)" if match else ""


def to_yaml(settings: PipelineConfig) -> str:
    """The whole configuration with every default written out."""
    return yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
