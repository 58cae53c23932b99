"""`rae import diffusers`: the decoder of diffusers' AutoencoderKL, the baseline, becomes an artifact."""

import shlex

from rae.pipeline.imports import import_artifact
from rae.pipeline.plan import Stage
from rae.pipeline.runner import Options, Outcome
from rae.stages.job import Job, Result
from rae.stages.models.own_encoder import OwnEncoder
from rae.stages.models.weights import locate_encoder
from rae.store.artifacts import Workspace, check_name
from rae.store.errors import ConfigError, MissingInput


def import_diffusers(
    model: str, name: str, image_size: int | None, allow_download: bool, workspace: Workspace, options: Options
) -> Outcome:
    """Publish the decoder of an AutoencoderKL under `name`.

    Args:
        model: its folder or hub id, as `encode.encoder` names it.
        image_size: side in pixels of the images it is to make; by default the model's `sample_size`.
        allow_download: whether the hub may be asked for what its cache lacks.

    Raises:
        ConfigError: another model, or a size that its stride does not divide.
        MissingInput: its files are not on this machine, or diffusers is not installed.
        CorruptData: weights that cannot be read or are not the model's.
    """
    from rae.stages.models.autoencoder_kl import KlDecoder, load_autoencoder_kl
    from rae.stages.models.encoders import describe_files
    from rae.stages.models.trained import save_kl_decoder

    check_name(name)
    try:
        source = locate_encoder(model, allow_download=allow_download)
    except MissingInput as error:
        if error.next_command is None or allow_download:
            raise
        again = ["rae", "import", "diffusers", model, "--name", name, "--allow-download"]
        raise MissingInput(error.message, shlex.join(again)) from error
    if isinstance(source, OwnEncoder) or source.kind != "autoencoder_kl":
        raise ConfigError(
            f"`{model}` is no AutoencoderKL, and so has no decoder to import; one is trained for it",
            shlex.join(["rae", "train-decoder", "CONFIG", "-s", f"encode.encoder={model}"]),
        )
    encoder = describe_files(source, image_size).to_json()

    def write(job: Job) -> Result:
        decoder = KlDecoder(load_autoencoder_kl(source), encoder["input_size"])
        files, content = save_kl_decoder(job.folder, decoder, encoder)
        parameters = sum(parameter.numel() for parameter in decoder.parameters())
        return Result(content, {"parameters": parameters, "image_size": decoder.image_size}, files)

    stage, files = Stage("import diffusers", "decoder", version=1), {path.name: path for path in source.files}
    return import_artifact(workspace, stage, name, {"encoder": encoder}, files, write, options)
