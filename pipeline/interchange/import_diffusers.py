"""`rae import diffusers`: the decoder of an autoencoder of diffusers becomes an artifact.

Of AutoencoderKL, the baseline, and of AutoencoderRAE: told apart by what their config.json says.
"""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rae.pipeline.interchange.imports import import_artifact, say_encoder
from rae.pipeline.plan import Stage
from rae.pipeline.runner import Options, Outcome
from rae.stages.job import Job, Result
from rae.stages.models.model_folder import hub_snapshot, read_json
from rae.stages.models.own_encoder import OwnEncoder
from rae.stages.models.weights import locate_encoder
from rae.store.artifacts import Workspace
from rae.store.catalog import check_name
from rae.store.errors import ConfigError, MissingInput, StaleInput
from rae.store.manifest import Json, differing_fields

if TYPE_CHECKING:
    from rae.stages.models.autoencoder_rae import AutoencoderRae

_STAGE = Stage("import diffusers", "decoder", version=1)


@dataclass(frozen=True)
class Diffusers:
    """A model of diffusers and what a person says of it: the options of `rae import diffusers`."""

    model: str  # folder or hub id
    name: str
    image_size: int | None = None
    encoder: str | None = None
    allow_download: bool = False

    def refuse(self, option: str, given: object, why: str) -> None:
        """`ConfigError` if an option was given that this model leaves without effect."""
        if given is not None:
            raise ConfigError(f"`{option}` has no part in `{self.model}`: {why}")


def import_diffusers(asked: Diffusers, workspace: Workspace, options: Options) -> Outcome:
    """Publish the decoder of an AutoencoderKL or AutoencoderRAE.

    Raises:
        ConfigError: another model, or an option that it has no use for.
        MissingInput: its files are not on this machine, or a package that reads them is not installed.
        StaleInput: the encoder inside an AutoencoderRAE is not the one that it is said to be.
        CorruptData: weights that cannot be read or are not the model's.
    """
    check_name(asked.name)
    try:
        folder = _folder(asked)
        if folder is not None and _class_name(folder) == "AutoencoderRAE":
            return _import_rae(asked, folder, workspace, options)
        return _import_kl(asked, workspace, options)
    except MissingInput as error:
        if error.next_command is None or asked.allow_download or "encode.allow_download" not in error.next_command:
            raise
        again = ["rae", "import", "diffusers", asked.model, "--name", asked.name, "--allow-download"]
        raise MissingInput(error.message, shlex.join(again)) from error


def _folder(asked: Diffusers) -> Path | None:
    """The model's folder, or the hub's cached copy; None for names of another form, which have no such model."""
    folder = Path(asked.model).expanduser()
    if folder.is_dir():
        return folder
    return hub_snapshot(asked.model, asked.allow_download) if asked.model.count("/") == 1 else None


def _class_name(folder: Path) -> object:
    path = folder / "config.json"
    return read_json(path).get("_class_name") if path.is_file() else None


# ---- AutoencoderKL ---------------------------------------------------------------------------------------------------


def _import_kl(asked: Diffusers, workspace: Workspace, options: Options) -> Outcome:
    from rae.stages.models.autoencoder_kl import KlDecoder, load_autoencoder_kl
    from rae.stages.models.encoders import describe_files
    from rae.stages.models.trained import save_kl_decoder

    asked.refuse("--encoder", asked.encoder, "an AutoencoderKL is its own encoder")
    source = locate_encoder(asked.model, allow_download=asked.allow_download)
    if isinstance(source, OwnEncoder) or source.kind != "autoencoder_kl":
        raise ConfigError(
            f"`{asked.model}` is no AutoencoderKL or AutoencoderRAE, and so has no decoder to import; one is trained"
            " for it",
            shlex.join(["rae", "train-decoder", "CONFIG", "-s", f"encode.encoder={asked.model}"]),
        )
    encoder = describe_files(source, asked.image_size).to_json()

    def write(job: Job) -> Result:
        decoder = KlDecoder(load_autoencoder_kl(source), encoder["input_size"])
        files, content = save_kl_decoder(job.folder, decoder, encoder)
        parameters = sum(parameter.numel() for parameter in decoder.parameters())
        return Result(content, {"parameters": parameters, "image_size": decoder.image_size}, files)

    files = {path.name: path for path in source.files}
    return import_artifact(workspace, _STAGE, asked.name, {"encoder": encoder}, files, write, options)


# ---- AutoencoderRAE --------------------------------------------------------------------------------------------------


def _import_rae(asked: Diffusers, folder: Path, workspace: Workspace, options: Options) -> Outcome:
    from rae.stages.models.autoencoder_rae import STRETCHED_TO, WEIGHTS_FILE, read_autoencoder_rae
    from rae.stages.models.trained import save_decoder

    asked.refuse("--image-size", asked.image_size, "an AutoencoderRAE makes images of one size")
    found = read_autoencoder_rae(folder)
    encoder = _describe_encoder(asked, found)
    config = found.config
    say_encoder(encoder, options)
    if config.grid != STRETCHED_TO:
        options.console.say(
            f"positions: those of {STRETCHED_TO} x {STRETCHED_TO} tokens stretched over {config.grid} x {config.grid},"
            " as diffusers builds them; the release's own code has others"
        )

    def write(job: Job) -> Result:
        files, content = save_decoder(job.folder, config, encoder, None, found.state, found.stats)
        parameters = sum(tensor.numel() for tensor in found.state.values())
        return Result(content, {"parameters": parameters, "image_size": config.image_size}, files)

    settings = {"config": config.to_dict(), "encoder": encoder}
    files = {name: folder / name for name in ("config.json", WEIGHTS_FILE)}
    return import_artifact(workspace, _STAGE, asked.name, settings, files, write, options)


def _describe_encoder(asked: Diffusers, found: "AutoencoderRae") -> Json:
    """The encoder inside the file: that of the name, if its weights are the same; asserted where they are not at hand.

    The digest is of the local files, which are what `encode` would use: the copy in the file is not kept.
    """
    from rae.stages.models.autoencoder_rae import same_weights
    from rae.stages.models.backbones import load_hugging_face
    from rae.stages.models.encoders import EncoderInfo, describe_files
    from rae.stages.models.official_encoder import released_name

    config = found.config
    name = asked.encoder or released_name(found.kind, config.token_dim, found.patch_size)
    if name is None:
        raise MissingInput(
            f"the encoder inside `{asked.model}` is a {found.kind}, {config.token_dim} wide, of no name that is known",
            shlex.join(["rae", "import", "diffusers", asked.model, "--name", asked.name, "--encoder", "FOLDER"]),
        )
    grid = (config.grid, config.grid)
    said = EncoderInfo(name, found.kind, config.token_dim, grid, found.input_size, config.image_mean, config.image_std)
    try:
        source = locate_encoder(name)
    except MissingInput:
        if Path(name).expanduser().is_dir():
            raise
        return said.to_json()
    if isinstance(source, OwnEncoder) or source.kind != found.kind:
        raise StaleInput(f"the encoder inside `{asked.model}` is a {found.kind}, and `{name}` is a {source.kind}")
    own = describe_files(source, found.input_size)
    keys = ("token_dim", "grid", "mean", "std")
    asked_for, there = ({key: one.to_json()[key] for key in keys} for one in (said, own))
    fields = list(differing_fields(asked_for, there, "encoder"))
    if not fields and not same_weights(found.encoder, load_hugging_face(source).state_dict()):
        fields = ["its weights differ"]
    if fields:
        raise StaleInput(
            f"the encoder inside `{asked.model}` is not `{name}` ({'; '.join(fields)}): name the one that it is with"
            " `--encoder`"
        )
    return own.to_json()
