"""The Python API, as `rae.NAME`. Heavy imports wait for the call that needs them."""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from rae.store.artifacts import Artifact, Workspace
from rae.store.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from rae.stages.models.trained import Autoencoder, Decoder, Dit, Weights
    from rae.stages.training.dataset import LatentDataset
    from rae.store.latents import LatentStore


def _workspace(workspace: str | None) -> Workspace:
    return Workspace(workspace or os.environ.get("RAE_WORKSPACE", "rae-workspace"))


def open_latents(ref: str, workspace: str | None = None, raw: bool = False) -> "LatentStore":
    """Open latents by name, id or path.

    `latents[17]` is {"latent": (C, H, W), "label": int, "key": str}: whitened, (z - mean) / sqrt(var + 1e-5), float32;
    with `raw` as the encoder gave it, in the stored dtype.

    Raises `MissingInput` if there are none, `CorruptData` if they can't be read.
    """
    from rae.store.latents import LatentStore

    return LatentStore(_workspace(workspace).resolve(ref, "latents").payload, raw=raw)


def torch_dataset(latents: "LatentStore", seed: int = 0) -> "LatentDataset":
    """A map-style dataset for `torch.utils.data.DataLoader` over open latents; call `set_epoch` before each epoch."""
    from rae.stages.training.dataset import LatentDataset

    return LatentDataset(latents, seed)


def encode(
    images: "Tensor | np.ndarray",
    encoder: "str | nn.Module",
    weights: str | None = None,
    input_size: int | None = None,
    feature_index: int | None = None,
) -> "Tensor":
    """Raw tokens [N, C, H, W] of images: float [N, 3, S, S] in [0, 1], or uint8 [N, S, S, 3].

    `encoder` is a name as in the configuration's `encode.encoder`, or a module that maps images in [0, 1] to tokens.
    """
    import torch

    from rae.stages.models.encoders import load_encoder
    from rae.stages.models.pixels import to_unit
    from rae.stages.models.weights import locate_encoder

    batch = to_unit(images, "cpu") if isinstance(images, np.ndarray) else images
    if isinstance(encoder, str):
        size = input_size or int(batch.shape[-1])
        encoder = load_encoder(locate_encoder(encoder, weights), size, feature_index)
    with torch.inference_mode():
        tokens: torch.Tensor = encoder(batch)
    return tokens


def load_decoder(ref: str, workspace: str | None = None, weights: "Weights" = "ema", device: str = "cpu") -> "Decoder":
    """A trained decoder: `decoder(tokens)` gives images [B, 3, S, S] in [0, 1] for raw tokens [B, C, H, W]."""
    from rae.stages.models.trained import Decoder

    return Decoder.load(_workspace(workspace).resolve(ref, "decoder").payload, weights, device)


def load_dit(ref: str, workspace: str | None = None, weights: "Weights" = "ema", device: str = "cpu") -> "Dit":
    """A trained transformer: `dit(x, t, y)` is the velocity at whitened latents x [B, C, H, W], times t, labels y."""
    from rae.stages.models.trained import Dit

    return Dit.load(_workspace(workspace).resolve(ref, "dit").payload, weights, device)


def load_autoencoder(
    ref: str,
    workspace: str | None = None,
    encoder: str | None = None,
    encoder_weights: str | None = None,
    device: str = "cpu",
) -> "Autoencoder":
    """A trained decoder with its frozen encoder: `encode`, `decode`, `noising`.

    `encoder` says where the encoder lies if it is not found by the name it had in training; a `timm:NAME` encoder needs
    the file `encoder_weights`, as in the configuration's `encode.weights`.
    """
    from rae.stages.models.encoders import describe, load_encoder
    from rae.stages.models.trained import Autoencoder, check_compatible
    from rae.stages.models.weights import locate_encoder

    decoder = load_decoder(ref, workspace, device=device)
    known = decoder.encoder
    files = locate_encoder(encoder or known["name"], encoder_weights)
    frozen = load_encoder(files, known["input_size"], known["feature_index"], device)
    check_compatible(describe(frozen), known, "this encoder")
    return Autoencoder(frozen, decoder)


def sample(
    dit: "Dit",
    decoder: "Decoder",
    labels: Sequence[int],
    seed: int = 0,
    num_steps: int = 50,
    guidance_scale: float = 1.0,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    batch_size: int = 64,
) -> np.ndarray:
    """Images uint8 [N, S, S, 3], one per label. Image i depends on (seed, i, label) alone.

    The label `dit.num_classes` asks for an image of no class. Raises `StaleInput` if the decoder reads other tokens
    than the transformer makes, `ConfigError` for a label that it does not know.
    """
    from rae.stages.models.trained import check_compatible
    from rae.stages.sample import draw_all
    from rae.stages.sections import SampleSection

    check_compatible(dit.about.encoder, decoder.encoder)
    for label in labels:
        if not 0 <= label <= dit.num_classes:
            known = f"0 to {dit.num_classes - 1}" if dit.num_classes else "none (its label is 0)"
            raise ConfigError(f"there is no class {label}: of classes the transformer knows {known}")
    section = SampleSection(
        num_images=len(labels),
        seed=seed,
        num_steps=num_steps,
        guidance_scale=guidance_scale,
        guidance_interval=guidance_interval,
        batch_size=batch_size,
    )
    return draw_all(dit, decoder, np.asarray(labels, np.int64), section)


def run(config: str, workspace: str | None = None, overrides: Sequence[str] = (), **options: Any) -> list[Artifact]:
    """`rae run`: make what is missing of a configuration; returns its artifacts in the order of the stages."""
    from rae.pipeline import config as configuration
    from rae.pipeline import runner
    from rae.pipeline.plan import Pipeline
    from rae.pipeline.preflight import preflight

    where = _workspace(workspace)
    pipeline = Pipeline(configuration.load(config, overrides), where, configuration.words(config, overrides))
    preflight(pipeline)
    chosen = runner.Options(command=pipeline.command("run"), **options)
    outcomes = runner.run_stages(pipeline, pipeline.stages, chosen)
    return [outcome.artifact for outcome in outcomes]
