"""Which check a fixture is held against: by its metadata's `kind`, else by its name."""

from collections.abc import Callable
from pathlib import Path

from parity.autoencoder import check_decoder, check_encoder
from parity.center_crop import check_center_crop
from parity.decoder_training import check_decoder_training
from parity.discriminator import check_discriminator
from parity.dit import check_dit
from parity.dit_training import check_dit_training
from parity.fixture import metadata
from parity.state_dicts import check_state_dicts
from parity.transport import check_transport

CHECKS: dict[str, Callable[[Path], None]] = {
    "DiTwDDTHead": check_dit,
    "ditdh": check_dit,
    "LightningDiT": check_dit,
    "dit_training": check_dit_training,
    "decoder": check_decoder,
    "decoder_training": check_decoder_training,
    "encoder": check_encoder,
    "discriminator": check_discriminator,
    "transport": check_transport,
    "center_crop": check_center_crop,
    "official_state_dicts": check_state_dicts,
}


def kind_of(path: Path) -> str:
    """The key of a fixture's check in `CHECKS`; `AssertionError` if none claims it."""
    assert path.is_file() or (path / "parity.safetensors").is_file(), f"no fixture in {path}"
    if path.is_dir():
        assert (path / "config.json").is_file(), f"no check claims {path}: it has no config.json"
        return "encoder"
    stated = metadata(path).get("kind") if path.suffix == ".safetensors" else None
    if stated in CHECKS:
        return stated
    named = [kind for kind in CHECKS if path.stem.lower().startswith(kind.lower())]
    assert named, f"no check claims {path}: neither by its kind, {stated}, nor by its name"
    return max(named, key=len)


def check(path: Path) -> None:
    """Raise `AssertionError` unless our numbers are the fixture's."""
    CHECKS[kind_of(path)](path)
