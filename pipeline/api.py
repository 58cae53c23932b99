"""The Python API, as `rae.NAME`. Heavy imports wait for the call that needs them."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from rae.store.artifacts import Workspace
from rae.store.errors import ConfigError
from rae.store.manifest import Artifact

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
    version: str | None = None,
) -> "Tensor":
    """Raw tokens [N, C, H, W] of images: float [N, 3, S, S] in [0, 1], or uint8 [N, S, S, 3].

    Args:
        images: a batch.
        encoder: a name as in the configuration's `encode.encoder`, or a module that maps images in [0, 1] to tokens
            [N, C, H, W]; it is run where it lies, in eval mode, and left as it was.
        weights: the file of a `timm:NAME` encoder.
        input_size: side in pixels that images are resized to; by default that of the pipeline for images of this size
            (224 for 256 px and DINOv2), of a module its attribute, else theirs.
        feature_index: the feature map of a timm encoder.
        version: what the module's code is known by, where it has no attribute `version`.

    Raises:
        ConfigError: images of another kind, a module without a version, or one that returns no tokens.
        MissingInput: an encoder whose files are not on this machine.
    """
    import torch

    from rae.stages.models.encoders import Encoder, load_encoder, resized
    from rae.stages.models.geometry import input_size_for
    from rae.stages.models.own_encoder import own_encoder
    from rae.stages.models.pixels import as_unit
    from rae.stages.models.weights import locate_encoder

    batch = as_unit(images)
    if isinstance(encoder, str):
        source = locate_encoder(encoder, weights)
        encoder = load_encoder(source, input_size_for(source, int(batch.shape[-1]), input_size), feature_index)
    with torch.inference_mode():
        if isinstance(encoder, Encoder):
            tokens: torch.Tensor = encoder(batch.to(encoder.device))
            return tokens
        own = own_encoder(encoder, version)
        return own.tokens(resized(batch, input_size or own.input_size or int(batch.shape[-1]))).float()


def load_decoder(
    ref: str,
    workspace: str | None = None,
    weights: "Weights" = "ema",
    device: str = "cpu",
    step: 'int | Literal["latest"] | None' = None,
) -> "Decoder":
    """A trained decoder: `decoder(tokens)` gives images [B, 3, S, S] in [0, 1] for raw tokens [B, C, H, W].

    `ref` is a name, id or path; `weights` the averaged ones or those of the last step. With `step`, the model as its
    training has it there, from a milestone or a checkpoint, be the training done or not; "latest" is the newest. Raises
    `MissingInput` if there is none, `CorruptData` if it can't be read.
    """
    from rae.stages.models.trained import Decoder

    return Decoder.load(_payload(ref, "decoder", workspace, weights, step), weights, device)


def _payload(
    ref: str, kind: str, workspace: str | None, weights: "Weights", step: 'int | Literal["latest"] | None'
) -> Path:
    from rae.pipeline.longer_runs import snapshot_of

    place = _workspace(workspace)
    if step is None:
        return place.resolve(ref, kind).payload
    return snapshot_of(place, ref, kind, None if step == "latest" else step, weights).folder


def load_dit(
    ref: str,
    workspace: str | None = None,
    weights: "Weights" = "ema",
    device: str = "cpu",
    step: 'int | Literal["latest"] | None' = None,
) -> "Dit":
    """A trained transformer: `dit(x, t, y)` is the velocity at whitened latents x [B, C, H, W], the shape of x.

    Times t [B] are in [0, 1], 1 being noise; labels y int64 [B], `dit.num_classes` being none. Trained with another
    `prediction` than velocity, it gives that. Arguments and errors as of `load_decoder`.
    """
    from rae.stages.models.trained import Dit

    return Dit.load(_payload(ref, "dit", workspace, weights, step), weights, device)


def load_autoencoder(
    ref: str,
    workspace: str | None = None,
    encoder: "str | nn.Module | None" = None,
    encoder_weights: str | None = None,
    device: str = "cpu",
    version: str | None = None,
) -> "Autoencoder":
    """A trained decoder with its frozen encoder: `encode`, `decode`, `noising`.

    `encoder` is the module that it was trained with, of this `version`; or it says where the encoder lies if it is not
    found by the name it had in training. A `timm:NAME` encoder needs the file `encoder_weights`, as in the
    configuration's `encode.weights`. Raises `StaleInput` if it is another encoder than the decoder's.
    """
    from rae.stages.models.compatible import check_compatible
    from rae.stages.models.encoders import describe, load_encoder
    from rae.stages.models.own_encoder import own_encoder
    from rae.stages.models.trained import Autoencoder
    from rae.stages.models.weights import locate_encoder

    decoder = load_decoder(ref, workspace, device=device)
    known = decoder.encoder
    if encoder is None or isinstance(encoder, str):
        source = locate_encoder(encoder or known["name"], encoder_weights)
    else:
        source = own_encoder(encoder, version)
    frozen = load_encoder(source, known["input_size"], known["feature_index"], device)
    check_compatible(describe(frozen), known, "this encoder")
    return Autoencoder(frozen, decoder)


def sample(
    dit: "Dit",
    decoder: "Decoder",
    labels: "Sequence[int] | np.ndarray",
    seed: int = 0,
    sampler: str = "euler",
    num_steps: int = 50,
    guidance_scale: float = 1.0,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    guide: "Dit | None" = None,
    batch_size: int = 64,
    **options: Any,
) -> np.ndarray:
    """Images uint8 [N, S, S, 3], one per label. Image i depends on (seed, i, label) alone.

    The label `dit.num_classes` asks for an image of no class, if labels were dropped in training. A transformer that
    takes vectors is given those, [N, D]; NaN asks for nothing. `guide` is a weaker
    transformer to be guided by, instead of `dit` without labels. `options` are those of the sampler and the precision,
    as in the configuration's section `sample`: `atol`, `rtol`, `diffusion_form`, `diffusion_norm`, `last_step`,
    `last_step_size`, `precision`.

    Raises `StaleInput` if the decoder reads other tokens than the transformer makes, or the guide predicts something
    else; `ConfigError` for a label that the transformer does not know, or options that do not fit.
    """
    from rae.pipeline.config import validated
    from rae.stages.models.compatible import check_compatible, check_guide
    from rae.stages.sample import draw_all
    from rae.stages.sections import SampleSection

    check_compatible(dit.about.encoder, decoder.encoder)
    if guide is not None:
        check_guide(dit, guide)
    rows, dim = dit.num_classes + dit.config.has_null_label, dit.config.conditioning_dim
    asked = np.asarray(labels, np.float32 if dim else np.int64)
    if dim and asked.shape[1:] != (dim,):
        raise ConfigError(f"the transformer takes vectors of {dim} numbers in place of labels, got {asked.shape}")
    for label in labels if not dim else ():
        if not 0 <= label < rows:
            known = f"0 to {dit.num_classes - 1}" if dit.num_classes else "none (its label is 0)"
            raise ConfigError(f"there is no class {label}: of classes the transformer knows {known}")
    settings = {
        "num_images": len(labels),
        "seed": seed,
        "sampler": sampler,
        "num_steps": num_steps,
        "guidance_scale": guidance_scale,
        "guidance_interval": guidance_interval,
        "batch_size": batch_size,
    }
    section = validated(SampleSection, settings | options, "rae.sample")
    return draw_all(dit, decoder, asked, section, guide)


def run(
    config: str,
    workspace: str | None = None,
    overrides: Sequence[str] = (),
    encoder: "nn.Module | None" = None,
    version: str | None = None,
    **options: Any,
) -> list[Artifact]:
    """`rae run`: make what is missing of a configuration; returns its artifacts in the order of the stages.

    `encoder` stands in for the configuration's `encode.encoder`: a module that maps images [B, 3, S, S] in [0, 1] to
    tokens [B, C, H, W]. Its weights' digest and its declared `version` (the argument, else its attribute) stand in what
    is made with it, so that another version or other weights make other artifacts. It is left as it was.

    Raises what the command would say, as a `RaeError`: before the first stage where that can be known.
    """
    from rae.pipeline import config as configuration
    from rae.pipeline import runner
    from rae.pipeline.plan import Pipeline
    from rae.pipeline.preflight import preflight
    from rae.stages.models.own_encoder import own_encoder

    where, settings = _workspace(workspace), configuration.load(config, overrides)
    own = own_encoder(encoder, version) if encoder is not None else None
    pipeline = Pipeline(settings, where, configuration.words(config, overrides), own)
    preflight(pipeline)
    chosen = runner.Options(command=pipeline.command("run"), **options)
    outcomes = runner.run_stages(pipeline, pipeline.stages, chosen)
    return [outcome.artifact for outcome in outcomes]
