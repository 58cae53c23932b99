"""The encoders that the official release (`bytetriper/RAE`) trained its models on."""

from rae.stages.models.encoders import EncoderInfo, describe_files
from rae.stages.models.geometry import vision_config
from rae.stages.models.model_folder import EncoderKind
from rae.stages.models.own_encoder import OwnEncoder, Triple
from rae.stages.models.weights import EncoderSource, locate_encoder
from rae.store.errors import ConfigError, MissingInput, StaleInput
from rae.store.manifest import Json

OFFICIAL_KINDS = ("dinov2", "mae", "siglip")
_IMAGENET: tuple[Triple, Triple] = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_HALF: tuple[Triple, Triple] = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
# The encoders of the released models as their own files describe them, for machines that do not have these files:
# kind, token width, patch size, then mean and std.
RELEASED_ENCODERS: dict[str, tuple[EncoderKind, int, int, tuple[Triple, Triple]]] = {
    "facebook/dinov2-with-registers-base": ("dinov2", 768, 14, _IMAGENET),
    "facebook/vit-mae-base": ("mae", 768, 16, _IMAGENET),
    "google/siglip2-base-patch16-256": ("siglip", 768, 16, _HALF),
}


def released_name(kind: EncoderKind, token_dim: int, patch_size: int) -> str | None:
    """The hub id of the released models' encoder of this family and these sizes; None if it is another."""
    asked = (kind, token_dim, patch_size)
    return next((name for name, known in RELEASED_ENCODERS.items() if known[:3] == asked), None)


def describe_encoder(encoder: str, token_dim: int, grid: int) -> Json:
    """The description of the encoder that makes `token_dim` x `grid` x `grid` tokens, as `encoders.describe` gives it.

    With its files on this machine it is complete. Without, one of the released encoders is described as known, and its
    `digest` is None: asserted, not verified.

    Args:
        encoder: a Hugging Face hub id or folder.

    Raises:
        ConfigError: no Hugging Face encoder.
        MissingInput: it is not on this machine, and none that the release uses.
        StaleInput: its tokens are of another width.
    """
    try:
        info = _info(locate_encoder(encoder), grid)
    except MissingInput:
        if encoder not in RELEASED_ENCODERS:
            raise
        kind, width, patch_size, (mean, std) = RELEASED_ENCODERS[encoder]
        info = EncoderInfo(encoder, kind, width, (grid, grid), patch_size * grid, mean, std, None, None)
    if info.token_dim != token_dim:
        raise StaleInput(
            f"the tokens of `{encoder}` are {info.token_dim} wide, and the model takes {token_dim}: name the encoder"
            " that it was trained on with `--encoder`"
        )
    return info.to_json()


def _info(source: EncoderSource, grid: int) -> EncoderInfo:
    if isinstance(source, OwnEncoder) or source.kind not in OFFICIAL_KINDS:
        raise ConfigError(f"`{source.name}` is no encoder of the release: give a DINOv2, MAE or SigLIP of Hugging Face")
    return describe_files(source, vision_config(source)["patch_size"] * grid)
