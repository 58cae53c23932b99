"""What is refused before the first stage, instead of by the last one hours later.

Every check is cheap: settings against each other, and whether files and artifacts that are named exist.
"""

from collections.abc import Callable

from rae.pipeline.plan import Pipeline
from rae.pipeline.tasks import extractor_files
from rae.stages.models.weights import locate_lpips
from rae.stages.sections import EncodeSection, EvaluateSection, SampleSection, TrainDecoderSection, TrainDitSection
from rae.store.errors import ConfigError, MissingInput


def preflight(pipeline: Pipeline) -> None:
    """Check every stage that is still to be done; raises what the stage itself would raise."""
    for name, check in _CHECKS.items():
        if getattr(pipeline.config, name) is not None and not _is_done(pipeline, name):
            check(pipeline)


def _is_done(pipeline: Pipeline, name: str) -> bool:
    # A finished pipeline is not checked: the geometry of a timm encoder takes torch to know, which takes seconds.
    try:
        return pipeline.find(name) is not None
    except MissingInput:
        return False


def _train_decoder(pipeline: Pipeline) -> None:
    section = pipeline.section("train_decoder", TrainDecoderSection)
    section.check_sizes(pipeline.section("encode", EncodeSection).image_size, pipeline.geometry()[1])
    if section.perceptual_loss == "lpips":
        locate_lpips(section.lpips_weights)


def _train_dit(pipeline: Pipeline) -> None:
    section = pipeline.section("train_dit", TrainDitSection)
    if section.latents is not None:
        pipeline.workspace.resolve(section.latents, "latents")
    elif pipeline.config.encode is not None:
        section.check_width(pipeline.geometry()[0])


def _sample(pipeline: Pipeline) -> None:
    section, training = pipeline.section("sample", SampleSection), pipeline.config.train_dit
    for ref, kind in ((section.dit, "dit"), (section.decoder, "decoder")):
        if ref is not None:
            pipeline.workspace.resolve(ref, kind)
    if section.dit is not None or training is None:
        return
    if section.guidance_scale != 1 and (training.num_classes == 0 or training.class_dropout_prob == 0):
        raise ConfigError(
            f"`sample.guidance_scale` {section.guidance_scale} needs a transformer that was trained with classes, some"
            " of them dropped: see `train_dit.num_classes` and `train_dit.class_dropout_prob`"
        )
    if section.classes and training.num_classes is not None and max(section.classes) >= training.num_classes:
        raise ConfigError(
            f"`sample.classes` asks for class {max(section.classes)}, and `train_dit.num_classes` is"
            f" {training.num_classes}; classes count from 0"
        )


def _evaluate(pipeline: Pipeline) -> None:
    pipeline.require_held_out()
    extractor_files(pipeline.section("evaluate", EvaluateSection))


_CHECKS: dict[str, Callable[[Pipeline], None]] = {
    "train_decoder": _train_decoder,
    "train_dit": _train_dit,
    "sample": _sample,
    "evaluate": _evaluate,
}
