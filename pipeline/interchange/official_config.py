"""`rae import official-config`: the official release's YAML files as configurations of ours with the same meaning.

What is given officially is written out, also where it is our default. What has no counterpart, what is unknown, and
what is corrected because it is known to be a mistake, is said: in the terminal and at the head of the file.
"""

import re
import shlex
from pathlib import Path

import yaml

from rae.pipeline.config import PipelineConfig, closest, validated
from rae.pipeline.interchange.official_keys import ADAPTIVE, GAN, ODE_METHODS, OLDER, SCHEDULER, SDE, TRAINING, Reading
from rae.pipeline.interchange.official_yaml import (
    DECODER_FOLDERS,
    SHIFT_BASE,
    TRANSPORT_KEYS,
    dit_settings,
    encoder_name,
    number,
    part,
    read_mapping,
    time_dist_shift,
)
from rae.stages.models.model_folder import read_json
from rae.store.catalog import check_name
from rae.store.errors import ConfigError

_DINOV2_B = "facebook/dinov2-with-registers-base"


def convert(path: Path) -> Reading:
    """Read an official YAML file of decoder training, transformer training or sampling.

    Raises:
        MissingInput: there is no such file.
        ConfigError: it is no such file, or says what no configuration of ours can.
    """
    reading = Reading(read_mapping(path))
    if "stage_1" not in reading.official:
        raise ConfigError(f"{path} has no section `stage_1`, so it is no configuration of the official release")
    check_name(path.stem)
    reading.settings["name"] = path.stem
    grid = _encode(reading)
    trains = "training" in reading.official
    if "stage_2" in reading.official:
        if trains:
            _train_dit(reading, grid, str(path))
        else:
            _import_dit(reading, "stage_2", "dit", path)
        _sample(reading, path)
    elif trains:
        _train_decoder(reading)
    _import_decoder(reading)
    reading.put("shards", "val", reading.take("eval.data_path"))
    if trains:
        reading.notes.append("to add: the training images, an argument officially: -s shards.train=FOLDER")
    elif "sample" in reading.settings:
        del reading.settings["encode"]  # samples need no encoder
    reading.finish()
    validated(PipelineConfig, reading.settings, str(path))
    return reading


def to_yaml(reading: Reading) -> str:
    """The configuration, headed by the notes and by the commands that bring in what it names."""
    lines = [*reading.notes, *(f"first: {command}" for command in reading.commands)]
    head = "".join(f"# {line}\n" for line in lines)
    return head + yaml.safe_dump(reading.settings, sort_keys=False, allow_unicode=True)


def _encode(reading: Reading) -> int:
    """The encoder and its images; returns tokens along a side."""
    name = encoder_name(reading.official) or _DINOV2_B
    for key in ("encoder_cls", "encoder_config_path", "encoder_params.dinov2_path", "encoder_params.model_name"):
        reading.take(f"stage_1.params.{key}")
    input_size = int(reading.number("stage_1.params.encoder_input_size", 224))
    patch_size = _patch_size(name)
    if input_size % patch_size:
        raise ConfigError(
            f"`encoder_input_size` {input_size} is not a multiple of the {patch_size} px patches of {name}"
        )
    grid = input_size // patch_size
    reading.put("encode", "encoder", name)
    reading.put("encode", "image_size", grid * int(reading.number("stage_1.params.decoder_patch_size", 16)))
    reading.put("encode", "encoder_input_size", input_size)
    return grid


def _patch_size(encoder: str) -> int:
    """Pixels along a side of an encoder's patches: as its folder says, else as hub ids of its family mean it."""
    config = Path(encoder).expanduser() / "config.json"
    if config.is_file():
        settings = read_json(config)
        return int(
            number(part(settings, "vision_config").get("patch_size", settings.get("patch_size", 16)), str(config))
        )
    stated = re.search(r"patch(\d+)", encoder)
    return int(stated[1]) if stated else 14 if "dinov2" in encoder else 16


def _training(reading: Reading, section: str) -> None:
    """What both trainers are told."""
    reading.move(section, TRAINING)
    if part(reading.official, "training", "scheduler"):
        climbs = reading.take("training.scheduler.warmup_from_zero", False)
        epochs = reading.take("training.scheduler.warmup_epochs")
        reading.put(section, "warmup_epochs" if climbs else "decay_start_epoch", epochs)
        reading.move(section, SCHEDULER)
        return
    reading.move(section, OLDER)
    if (schedule := reading.settings[section].get("schedule")) is not None:
        reading.notes.append(
            "corrected: without a `scheduler` block the official trainer keeps lr constant;"
            f" `schedule_type: {schedule}` and what stands beside it is taken as meant"
        )


def _train_decoder(reading: Reading) -> None:
    section, image_size = "train_decoder", reading.settings["encode"]["image_size"]
    folder = str(reading.take("stage_1.params.decoder_config_path", "")).rstrip("/").rpartition("/")[2]
    if folder not in DECODER_FOLDERS:
        known = ", ".join(DECODER_FOLDERS)
        raise ConfigError(f"`decoder_config_path` ends in `{folder}`; decoders known by their folder are {known}")
    reading.put(section, "size", DECODER_FOLDERS[folder])
    reading.put(section, "resize_size", 384 if image_size == 256 else int(1.5 * image_size))
    reading.put(section, "noise_tau", reading.take("stage_1.params.noise_tau", 0.8))
    _training(reading, section)
    reading.move(section, GAN)
    for block in ("optimizer", "scheduler"):  # the discriminator's are the decoder's here
        for key, value in part(reading.official, "gan", "disc", block).items():
            reading.take(f"gan.disc.{block}.{key}")
            if part(reading.official, "training", block).get(key) != value:
                reading.notes.append(
                    f"no counterpart: `gan.disc.{block}.{key}: {value}`; the discriminator is trained like the decoder"
                )
    if weights := reading.path("gan.disc.arch.dino_ckpt_path"):
        reading.commands.append(shlex.join(["rae", "import", "official", weights, "--out", "disc.safetensors"]))
        reading.put(section, "disc_weights", "disc.safetensors")


def _train_dit(reading: Reading, grid: int, where: str) -> None:
    section, sizes = "train_dit", dit_settings(part(reading.official, "stage_2"), where)
    reading.take_below("stage_2")
    channels, sides = sizes.pop("in_channels"), {sizes.pop("input_size", grid), *_grid(reading)}
    if (patch_size := sizes.pop("patch_size", 1)) != 1:
        reading.notes.append(f"no counterpart: `stage_2.params.patch_size: {patch_size}`; here a token is a patch")
    for key, value in sizes.items():
        reading.put(section, key, value)
    for key in TRANSPORT_KEYS:
        value = reading.take(f"transport.params.{key}")
        reading.put(section, key, "logit-normal" if value == "logit-normal_0_1" else value)
    shift = _shift(reading)
    if wrong := sorted(sides - {grid}):
        reading.notes.append(
            f"corrected: the file has {wrong[0]} x {wrong[0]} latents and their shift, and its encoder makes {grid} x"
            f" {grid}; the transformer follows the latents, and its shift is `auto`"
        )
    paper = (channels * grid * grid / SHIFT_BASE) ** 0.5
    reading.put(section, "time_dist_shift", "auto" if wrong or shift in (None, paper) else shift)
    _training(reading, section)


def _grid(reading: Reading) -> list[int]:
    latent_size = reading.take("misc.latent_size")
    sides = latent_size[1:] if isinstance(latent_size, list) else []
    return [int(number(side, "misc.latent_size")) for side in sides]


def _shift(reading: Reading) -> float | None:
    shift = time_dist_shift(part(reading.official, "misc"))
    for key in ("time_dist_shift_dim", "time_dist_shift_base", "num_classes", "null_label"):
        reading.take(f"misc.{key}")  # the classes are those of stage_2
    return shift


def _sample(reading: Reading, path: Path) -> None:
    section, is_sde = "sample", _word(reading, "sampler.mode", "ODE", ("ode", "sde")) == "sde"
    known = ("euler", "heun") if is_sde else tuple(ODE_METHODS)
    method = _word(reading, "sampler.params.sampling_method", "euler" if is_sde else "dopri5", known)
    sampler = "sde" if is_sde else ODE_METHODS[method]
    reading.put(section, "sampler", sampler)
    if is_sde:
        if method == "heun":
            reading.notes.append("no counterpart: `sampler.params.sampling_method: Heun`; the SDE is stepped by Euler")
        reading.move(section, SDE)
        reading.settings[section]["last_step"] = reading.take("sampler.params.last_step", "Mean")  # null is none
    elif sampler == "adaptive":
        reading.move(section, ADAPTIVE)
    else:
        reading.put(section, "num_steps", reading.take("sampler.params.num_steps"))
    for key in ("num_steps", "atol", "rtol"):  # of no effect on this sampler, officially too
        reading.take(f"sampler.params.{key}")
    scale = reading.number("guidance.scale", 1.0)
    guidance = _word(reading, "guidance.method", "cfg", ("cfg", "autoguidance")) if scale > 1 else "none"
    reading.take("guidance.method")
    low, high = (
        reading.number(f"guidance.t_{end}", reading.number(f"guidance.t-{end}", default))
        for end, default in (("min", 0.0), ("max", 1.0))
    )
    if scale > 1:  # officially, less is no guidance either
        reading.put(section, "guidance_scale", scale)
        reading.put(section, "guidance_interval", [low, high])
        if guidance == "autoguidance":
            _import_dit(reading, "guidance.guidance_model", "guide", path)
    reading.take_below("guidance.guidance_model")


def _word(reading: Reading, key: str, default: str, known: tuple[str, ...]) -> str:
    word = str(reading.take(key, default)).lower()
    if word not in known:
        raise ConfigError(f"`{key}` is {word!r}; what has a counterpart is {', '.join(known)}{closest(word, [*known])}")
    return word


def _import_dit(reading: Reading, where: str, ours: str, path: Path) -> None:
    """A released transformer that samples or guides: its name, and the command that imports it."""
    described = part(reading.official, *where.split("."))
    dit_settings(described, str(path))  # refuses what cannot be imported
    reading.take_below(where)
    config: list[str] = []
    if where == "stage_2":
        config = ["--config", str(path)]
        for key in (*(f"transport.params.{key}" for key in TRANSPORT_KEYS), "misc.latent_size"):
            reading.take(key)
        _shift(reading)
    if not (checkpoint := described.get("ckpt")):
        reading.notes.append(f"to add: `sample.{ours}`; `{where}` names no checkpoint")
        return
    name = Path(str(checkpoint)).parent.name or ours
    stats = part(reading.official, "stage_1", "params").get("normalization_stat_path") or "stat.pt"
    words = ["rae", "import", "official", str(checkpoint), "--name", name, "--stats", str(stats), *config]
    reading.commands.append(shlex.join([*words, *_encoder_words(reading)]))
    reading.put("sample", ours, name)


def _import_decoder(reading: Reading) -> None:
    reading.take("stage_1.params.decoder_config_path")
    if (tau := reading.take("stage_1.params.noise_tau")) and "train_decoder" not in reading.settings:
        reading.notes.append(f"no counterpart: `stage_1.params.noise_tau: {tau}`; only a decoder's training adds noise")
    checkpoint = reading.path("stage_1.params.pretrained_decoder_path")
    stats = reading.path("stage_1.params.normalization_stat_path")
    if not checkpoint:
        return
    name = Path(checkpoint).parent.name or "decoder"
    words = ["rae", "import", "official", checkpoint, "--name", name, *(["--stats", stats] if stats else [])]
    reading.commands.append(shlex.join([*words, *_encoder_words(reading)]))
    if "sample" in reading.settings:
        reading.put("sample", "decoder", name)


def _encoder_words(reading: Reading) -> list[str]:
    encoder = reading.settings["encode"]["encoder"]
    return [] if encoder == _DINOV2_B else ["--encoder", encoder]
