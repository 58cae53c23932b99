"""`rae import official`: models of the release (`bytetriper/RAE`), told apart by their tensors."""

import shlex
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rae.pipeline.interchange.imports import import_artifact, say_encoder
from rae.pipeline.interchange.official_yaml import (
    decoder_heads,
    dit_settings,
    encoder_name,
    part,
    read_mapping,
    transport_settings,
)
from rae.pipeline.plan import Stage
from rae.pipeline.runner import Options, Outcome
from rae.stages.job import Job, Result
from rae.stages.models.weights import digest_file
from rae.stages.sections import EncodeSection
from rae.store.artifacts import Workspace
from rae.store.catalog import check_name
from rae.store.errors import ConfigError, MissingInput, StaleInput
from rae.store.manifest import Json

if TYPE_CHECKING:
    from rae.stages.models.official import Checkpoint

_READ_OF_CONFIG = {"stage_1", "stage_2", "transport", "misc", "decoder_num_attention_heads"}


@dataclass(frozen=True)
class Official:
    """A file of the official release and what a person says of it: the options of `rae import official`."""

    file: Path
    name: str | None = None
    out: Path | None = None
    stats: Path | None = None
    encoder: str | None = None
    config: Path | None = None
    weights: Literal["ema", "model"] | None = None

    @cached_property
    def given(self) -> Json:
        """What the configuration file says; an empty mapping without one.

        Raises as `read_mapping` does, and `ConfigError` for a file that says nothing of a model.
        """
        if self.config is None:
            return {}
        found = read_mapping(self.config)
        if not _READ_OF_CONFIG & found.keys():
            raise ConfigError(
                f"{self.config} says nothing of an official model: `--config` takes the release's YAML files, which"
                " have sections `stage_1` and `stage_2`, or a decoder's config.json"
            )
        return found

    @property
    def files(self) -> dict[str, Path]:
        return {"weights": self.file} | ({"stats": self.stats} if self.stats else {})

    def describe_encoder(self, token_dim: int, grid: int) -> Json:
        from rae.stages.models.official_encoder import describe_encoder

        default = str(EncodeSection.model_fields["encoder"].default)
        return describe_encoder(self.encoder or encoder_name(self.given) or default, token_dim, grid)


def import_official(official: Official, workspace: Workspace, options: Options) -> Json:
    """Import a decoder or transformer as an artifact, or the discriminator's backbone as a file; what `--json` prints.

    Raises:
        ConfigError: the kind of model needs another option, or its shapes leave open what `config` must say.
        MissingInput: a file that is not there, statistics that a transformer needs, an encoder that nobody knows.
        StaleInput: an encoder of other tokens.
        CorruptData: the file is no checkpoint of these models.
    """
    if official.name is not None:
        check_name(official.name)
    for path in official.files.values():
        if not path.is_file():
            raise MissingInput(f"there is no file {path}")
    _ = official.given  # a typing error should not wait for torch

    from rae.stages.models.official import read_checkpoint

    checkpoint = read_checkpoint(official.file, official.weights)
    if checkpoint.kind == "backbone":
        return _import_backbone(official, checkpoint, options)
    if official.out is not None or official.name is None:
        raise ConfigError(
            f"{official.file} holds a {checkpoint.kind}, which becomes an artifact and no file: name it with `--name`,"
            " and leave out `--out`"
        )
    outcome = (_import_decoder if checkpoint.kind == "decoder" else _import_dit)(
        official, official.name, checkpoint, workspace, options
    )
    return outcome.to_json()


def _import_decoder(
    official: Official, name: str, checkpoint: "Checkpoint", workspace: Workspace, options: Options
) -> Outcome:
    from rae.stages.models.official import count_parameters, infer_decoder, latent_size, read_stats
    from rae.stages.models.trained import save_decoder

    channels, side = latent_size(checkpoint)
    encoder = official.describe_encoder(channels, side)
    config = infer_decoder(checkpoint, encoder, *(decoder_heads(official.given, str(official.config)) or ()))
    stats = read_stats(official.stats, (channels, side, side)) if official.stats else None
    say_encoder(encoder, options)

    def write(job: Job) -> Result:
        files, content = save_decoder(job.folder, config, encoder, None, checkpoint.state, stats)
        return Result(content, {"parameters": count_parameters(config), "image_size": config.image_size}, files)

    settings = {"config": config.to_dict(), "encoder": encoder, "weights": checkpoint.weights}
    stage = Stage("import official", "decoder", version=1)
    return import_artifact(workspace, stage, name, settings, official.files, write, options)


def _import_dit(
    official: Official, name: str, checkpoint: "Checkpoint", workspace: Workspace, options: Options
) -> Outcome:
    from rae.stages.models.dit import DiTConfig
    from rae.stages.models.official import count_parameters, infer_dit, latent_size, read_stats
    from rae.stages.models.trained import DitDescription, save_dit
    from rae.stages.models.transport import auto_shift, create_transport

    if official.stats is None:
        raise MissingInput(
            "a transformer's latents are whitened, and the mean and variance that do it lie in the release's stat.pt",
            shlex.join(["rae", "import", "official", str(official.file), "--name", name, "--stats", "stat.pt"]),
        )
    channels, side = latent_size(checkpoint)
    shape = (channels, side, side)
    stats, encoder, given = read_stats(official.stats, shape), official.describe_encoder(channels, side), official.given
    where = str(official.config)
    known = DiTConfig.from_dict(dit_settings(part(given, "stage_2"), where)) if "stage_2" in given else None
    defaults: Json = {"path_type": "Linear", "prediction": "velocity", "loss_weight": None, "time_dist_type": "uniform"}
    transport = defaults | {"time_dist_shift": auto_shift(*shape)} | transport_settings(given)
    create_transport(**transport)  # refuses what does not exist
    about = DitDescription(infer_dit(checkpoint, known), transport, encoder)
    say_encoder(encoder, options)

    def write(job: Job) -> Result:
        files, content = save_dit(job.folder, about, stats, None, checkpoint.state)
        return Result(content, {"parameters": count_parameters(about.config)}, files)

    settings = {**about.to_json(), "weights": checkpoint.weights}
    stage = Stage("import official", "dit", version=1)
    return import_artifact(workspace, stage, name, settings, official.files, write, options)


def _import_backbone(official: Official, checkpoint: "Checkpoint", options: Options) -> Json:
    """Write the tensors, checked and as they are: `DinoDiscriminator.load_backbone` zeroes the keys' biases itself."""
    from rae.stages.models.official import check_backbone
    from rae.stages.models.saving import save_weights

    out = official.out
    others = (official.name, official.stats, official.encoder, official.config)
    if out is None or any(given is not None for given in others):
        raise ConfigError(
            f"{official.file} holds the backbone of the discriminator, which is no artifact but a file: say where to"
            " write it with `--out disc.safetensors`, and leave out `--name`, `--stats`, `--encoder` and `--config`"
        )
    if out.suffix != ".safetensors":
        raise ConfigError(f"`--out {out}` must end in .safetensors, which is what is written")
    recipe, partial = check_backbone(checkpoint), out.with_name(f"{out.name}.partial")
    save_weights(partial, checkpoint.state)
    digest = digest_file(partial)
    if out.exists() and digest_file(out) != digest:
        partial.unlink()
        raise StaleInput(f"{out} is there already, and is another: write to another file")
    partial.replace(out)
    options.console.say(f"wrote {out}, the backbone of discriminator {recipe}, sha256 {digest}")
    options.console.say(f"use it with: rae train-decoder CONFIG -s train_decoder.disc_weights={out}")
    return {"kind": "backbone", "recipe": recipe, "path": str(out), "sha256": digest}
