"""Where an extractor's weights lie, and the digest that its scores carry. Light: imports no torch.

Nothing is downloaded. A file that is missing is named, with its digest and every place where it was looked for.
"""

import difflib
from dataclasses import dataclass
from pathlib import Path

from rae.stages.models.weights import (
    PACKAGED_ARCHITECTURE,
    PACKAGED_ENCODER,
    EncoderFiles,
    digest_file,
    hub_checkpoints,
    locate_encoder,
    locate_timm,
)
from rae.store.errors import ConfigError, CorruptData, MissingInput

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
"""torch-fidelity's conversion of the Inception network that FID is defined with; the name ends in its sha256."""

DINOV2_HUB_ID = "facebook/dinov2-large"
"""The ViT-L/14 without registers that both published protocols of FD-DINOv2 take."""

DINOV2_PROTOCOLS = ("dinov2-dgm-eval", "dinov2-edm2")
NAMES = (PACKAGED_ENCODER, "inception", *DINOV2_PROTOCOLS, "torchscript")


@dataclass(frozen=True)
class ExtractorFiles:
    """An extractor by name, and the files that its features follow from.

    `digests` maps each file's name to its sha256; `digest` is one sha256 for all of them. `encoder` is set for those
    that load as an encoder does.
    """

    name: str
    files: tuple[Path, ...]
    digests: dict[str, str]
    digest: str
    encoder: EncoderFiles | None = None


def locate_extractor(name: str, weights: str | None = None, sha256: str | None = None) -> ExtractorFiles:
    """Finds an extractor's weights and checks their digest.

    Args:
        name: `efficientnet-lite0` (carried by a package), `inception`, `dinov2-dgm-eval`, `dinov2-edm2`, `timm:NAME`,
            or `torchscript`.
        weights: the weight file; of DINOv2 the Hugging Face folder, or a hub id in its cache.
        sha256: what the digest must be, or begin with; of `inception` by default that of the true weights.

    Raises:
        ConfigError: an unknown name, or one that needs `weights`.
        MissingInput: the weights are not on this machine.
        CorruptData: they have another digest.
    """
    if name == "inception":
        found = _inception(weights)
        sha256 = sha256 or INCEPTION_FILE.removesuffix(".pth").rpartition("-")[2]
    elif name in DINOV2_PROTOCOLS:
        found = _dinov2(name, weights or DINOV2_HUB_ID)
    elif name == "torchscript":
        found = _torchscript(weights)
    elif name == PACKAGED_ENCODER or name.startswith("timm:"):
        known = f"timm:{PACKAGED_ARCHITECTURE}" if name == PACKAGED_ENCODER and weights else name
        files = locate_timm(known, weights)
        digest = digest_file(files.folder_or_file)
        found = ExtractorFiles(name, files.files, files.digests, digest, files)
    else:
        close = difflib.get_close_matches(name, NAMES, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(NAMES)}, timm:NAME."
        raise ConfigError(f"There is no extractor {name!r}; {hint}")
    if sha256 is not None and not found.digest.startswith(sha256.lower()):
        raise CorruptData(
            f"the weights of the extractor `{name}` at {found.files[0]} have sha256 {found.digest}, and {sha256}"
            f"{'' if len(sha256) == 64 else '...'} is expected: fetch them again, or state their own digest with"
            " `evaluate.extractor_sha256`"
        )
    return found


def _inception(weights: str | None) -> ExtractorFiles:
    path = Path(weights).expanduser() if weights else hub_checkpoints() / INCEPTION_FILE
    if not path.is_file():
        raise MissingInput(
            f"the extractor `inception` needs torch-fidelity's {INCEPTION_FILE} (sha256 6726825d...), and {path} is not"
            " there: put the file there, or name it with `evaluate.extractor_weights`",
            "rae evaluate CONFIG -s evaluate.extractor_weights=FILE",
        )
    return _single("inception", path)


def _torchscript(weights: str | None) -> ExtractorFiles:
    if weights is None:
        raise ConfigError("the extractor `torchscript` needs `evaluate.extractor_weights`: the TorchScript file")
    path = Path(weights).expanduser()
    if not path.is_file():
        raise MissingInput(f"the TorchScript file of the extractor is not at {path}")
    return _single("torchscript", path)


def _dinov2(name: str, folder_or_hub_id: str) -> ExtractorFiles:
    files = locate_encoder(folder_or_hub_id)
    if not isinstance(files, EncoderFiles) or files.kind != "dinov2":
        raise ConfigError(f"the extractor `{name}` takes a DINOv2 of Hugging Face, and `{files.name}` is another model")
    return ExtractorFiles(name, files.files, files.digests, files.digest, files)


def _single(name: str, path: Path) -> ExtractorFiles:
    digest = digest_file(path)
    return ExtractorFiles(name, (path,), {name: digest}, digest)
