"""`rae export diffusers`: a decoder and the encoder that it reads, as diffusers' AutoencoderRAE.

    config.json                             sizes, and the latents' statistics
    diffusion_pytorch_model.safetensors     encoder, decoder, statistics

`AutoencoderRAE.from_pretrained(OUT)` loads the folder under the transformers that wrote it: the encoder's tensors have
the names of that version.
"""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from rae.pipeline.console import Console
from rae.pipeline.interchange.exports import exported
from rae.stages.models.own_encoder import OwnEncoder
from rae.stages.models.weights import EncoderFiles, locate_encoder
from rae.store.artifacts import Workspace
from rae.store.errors import ConfigError, MissingInput
from rae.store.manifest import Artifact, Json

if TYPE_CHECKING:
    from torch import Tensor

    from rae.stages.models.trained import Decoder


def export_diffusers(
    ref: str, out: Path, encoder: str | None, stats: str | None, workspace: Workspace, console: Console
) -> Json:
    """Write the model into the folder `out`; returns what `--json` prints.

    Args:
        ref: a decoder.
        out: where it goes.
        encoder: hub id or folder of the encoder that the decoder reads; by default what the decoder calls it.
        stats: latents or a dit whose statistics go in; by default the decoder's own, if it has any.

    Raises:
        ConfigError: another artifact, or a model that AutoencoderRAE has no place for.
        MissingInput: the encoder is not on this machine, or diffusers is not installed.
        StaleInput: another encoder or other latents than the decoder's, or other files of these names are in `out`.
    """
    from rae.stages.models.autoencoder_rae import build_autoencoder_rae
    from rae.stages.models.compatible import check_compatible
    from rae.stages.models.decoder import ViTDecoder
    from rae.stages.models.encoders import describe, load_encoder
    from rae.stages.models.trained import Decoder

    artifact = workspace.resolve(ref)
    if artifact.kind != "decoder":
        raise ConfigError(f"`{ref}` is of kind {artifact.kind}; an AutoencoderRAE is made of a decoder")
    decoder = Decoder.load(artifact.payload)
    _check_kind(decoder, artifact)
    assert isinstance(decoder.model, ViTDecoder)  # what else reads the tokens of these encoders
    again = shlex.join(["rae", "export", "diffusers", ref, str(out), "--encoder", "FOLDER"])
    loaded = load_encoder(_locate(decoder, encoder, again), decoder.encoder["input_size"])
    check_compatible(describe(loaded), decoder.encoder, f"the encoder `{loaded.info.name}` here")
    found = _read_stats(workspace.resolve(stats) if stats else artifact, decoder)
    model = build_autoencoder_rae(decoder.model, loaded, found)
    with exported(out, console) as partial:
        model.save_pretrained(partial, safe_serialization=True)
        names = sorted(path.name for path in partial.iterdir())
    if found is None:
        console.say(
            f"decoder/{artifact.id} has no latent statistics beside it: latents are raw there, unless --stats names"
            " latents or a dit to take them from"
        )
    return {"kind": artifact.kind, "id": artifact.id, "files": [str(out / name) for name in names]}


def _check_kind(decoder: "Decoder", artifact: Artifact) -> None:
    from rae.stages.models.official_encoder import OFFICIAL_KINDS

    kind = decoder.encoder["kind"]
    if kind not in OFFICIAL_KINDS:
        raise ConfigError(
            f"decoder/{artifact.id} reads the tokens of `{decoder.encoder['name']}`, a {kind}, and AutoencoderRAE has"
            " DINOv2 with registers, MAE and SigLIP"
        )


def _locate(decoder: "Decoder", encoder: str | None, again: str) -> EncoderFiles:
    """The encoder's files: the exported one holds its weights, which the decoder does not have."""
    name = encoder or decoder.encoder["name"]
    try:
        source = locate_encoder(name)
    except (MissingInput, ConfigError) as error:
        if encoder is not None and isinstance(error, ConfigError):
            raise
        raise MissingInput(
            f"the exported file holds the encoder, too, and `{name}` is not to be found here ({error.message})", again
        ) from error
    if isinstance(source, OwnEncoder) or source.kind != decoder.encoder["kind"]:
        raise ConfigError(f"the decoder reads the tokens of a {decoder.encoder['kind']}; `{name}` is a {source.kind}")
    return source


def _read_stats(artifact: Artifact, decoder: "Decoder") -> "tuple[Tensor, Tensor] | None":
    """(mean, var) [C, H, W] of the decoder's tokens: of latents, of a dit, or beside the decoder if it has them."""
    import torch

    from rae.stages.models.compatible import check_compatible
    from rae.stages.models.trained import Dit, read_encoder, read_latent_stats
    from rae.store.latents import LatentStore

    if artifact.kind == "decoder":
        token_dim, grid = decoder.encoder["token_dim"], decoder.encoder["grid"][0]
        there = (artifact.payload / "latent_stats.safetensors").exists()
        return read_latent_stats(artifact.payload, token_dim, grid) if there else None
    if artifact.kind == "dit":
        dit = Dit.load(artifact.payload)
        check_compatible(dit.about.encoder, decoder.encoder)
        return dit.mean, dit.var
    if artifact.kind == "latents":
        check_compatible(read_encoder(artifact.payload), decoder.encoder, "the encoder of these latents")
        stats = LatentStore(artifact.payload).stats
        return torch.from_numpy(stats.mean).float(), torch.from_numpy(stats.variance).float()
    raise ConfigError(f"`--stats` names latents or a dit, and {artifact.kind}/{artifact.id} has no latent statistics")
