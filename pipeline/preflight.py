"""What is refused before the first stage, instead of by the last one hours later.

Every check is cheap: settings against each other, and whether files and artifacts that are named exist.
"""

from collections.abc import Callable, Iterator
from typing import Literal

from rae.pipeline import longer_runs
from rae.pipeline.plan import Pipeline
from rae.pipeline.tasks import evaluation_lpips, evaluation_references, extractor_files, takes_features
from rae.stages.models.weights import locate_dino, locate_lpips
from rae.stages.sections import EncodeSection, EvaluateSection, SampleSection
from rae.stages.training.sections import TrainDecoderSection, TrainDitSection
from rae.stages.training.trackers import check_installed
from rae.store.errors import ConfigError, MissingInput, RaeError, StaleInput
from rae.store.manifest import Json, differing_fields


def preflight(pipeline: Pipeline) -> None:
    """Check every stage that is still to be done; raises the first of the `problems`."""
    for problem in problems(pipeline):
        raise problem


def problems(pipeline: Pipeline) -> Iterator[RaeError]:
    """What the stages that are still to be done would raise, each once, in the order of the stages."""
    told = set()
    for name, checks in _CHECKS.items():
        if getattr(pipeline.config, name) is None or _is_done(pipeline, name):
            continue
        for check in checks:
            try:
                check(pipeline)
            except RaeError as error:
                if error.message not in told:
                    told.add(error.message)
                    pipeline.name_in(error)
                    yield error


def _is_done(pipeline: Pipeline, name: str) -> bool:
    # A finished pipeline is not checked: the geometry of a timm encoder takes torch to know, which takes seconds.
    try:
        return pipeline.find(name) is not None
    except MissingInput:
        return False


def _makes_shards(pipeline: Pipeline) -> bool:
    return any(stage.name == "shards" for stage in pipeline.stages)


def _images(pipeline: Pipeline) -> object:
    return pipeline.task("shards") if _makes_shards(pipeline) else pipeline.train


def _encoder(pipeline: Pipeline) -> object:
    return pipeline.geometry()


def _crops(pipeline: Pipeline) -> None:
    section = pipeline.section("train_decoder", TrainDecoderSection)
    if section.latents is not None:
        return
    section.check_sizes(pipeline.section("encode", EncodeSection).image_size, pipeline.geometry()[1])


def _decoder_encoder(pipeline: Pipeline) -> object:
    """The encoder that the decoder is for, unless the latents that it is fed say all that is needed of it."""
    section = pipeline.section("train_decoder", TrainDecoderSection)
    return pipeline.geometry() if section.needs_encoder or section.latents is None else None


def _decoder_latents(pipeline: Pipeline) -> None:
    section = pipeline.section("train_decoder", TrainDecoderSection)
    if section.feed != "online":
        section.check_views(_views(pipeline, "train_decoder"))


def _views(pipeline: Pipeline, reader: Literal["train_decoder", "train_dit"]) -> Literal["flips", "crops"]:
    """What the views of the latents are, or will be, that a trainer reads."""
    named = getattr(pipeline.config, reader).latents is not None
    encode = pipeline.latents(reader).manifest.config["encode"] if named else pipeline.encoding()["encode"]
    return "crops" if encode.get("crops") else "flips"


def _perceptual(pipeline: Pipeline) -> None:
    section = pipeline.section("train_decoder", TrainDecoderSection)
    if section.perceptual_loss == "lpips":
        locate_lpips(section.lpips_weights)


def _discriminator(pipeline: Pipeline) -> None:
    section = pipeline.section("train_decoder", TrainDecoderSection)
    if section.adversarial_loss == "dino":
        locate_dino(section.recipe, section.disc_weights)


def _origins_of(stage: longer_runs.Trainer) -> Callable[[Pipeline], None]:
    def check(pipeline: Pipeline) -> None:
        config = {stage: getattr(pipeline.config, stage).in_recipe()}
        longer_runs.check_continues({"config": config}, longer_runs.origins(pipeline, stage))

    return check


def _trackers_of(stage: longer_runs.Trainer) -> Callable[[Pipeline], None]:
    def check(pipeline: Pipeline) -> None:
        check_installed(getattr(pipeline.config, stage).trackers)

    return check


def _train_dit(pipeline: Pipeline) -> None:
    section = pipeline.section("train_dit", TrainDitSection)
    step = longer_runs.own_guide(pipeline)
    if step is not None and section.steps is not None and step >= section.steps:
        raise ConfigError(
            f"`sample.guide` is the milestone of step {step}, and training ends with step {section.steps}"
        )
    if section.latents is not None or pipeline.config.encode is not None:
        section.check_views(_views(pipeline, "train_dit"))
    if section.latents is None and pipeline.config.encode is not None:
        section.check_width(pipeline.geometry()[0])


def _sample(pipeline: Pipeline) -> None:
    section, training = pipeline.section("sample", SampleSection), pipeline.config.train_dit
    for ref, kind in ((section.dit, "dit"), (section.decoder, "decoder")):
        if ref is not None:
            pipeline.workspace.resolve(ref, kind)
    if section.dit is not None or training is None:
        return
    if (training.conditioning == "vectors") != (section.conditioning is not None):
        raise ConfigError(
            f"`train_dit.conditioning` is {training.conditioning}, and `sample.conditioning`"
            + (" names no file of vectors" if section.conditioning is None else " names a file of vectors")
        )
    unguided = section.guidance_scale == 1 or section.guide is not None
    if not unguided and (training.num_classes == 0 or training.class_dropout_prob == 0):
        raise ConfigError(
            f"`sample.guidance_scale` {section.guidance_scale} needs a transformer that was trained with classes, some"
            " of them dropped (see `train_dit.num_classes` and `train_dit.class_dropout_prob`), or a `sample.guide`"
        )
    if section.classes and training.num_classes is not None and max(section.classes) >= training.num_classes:
        raise ConfigError(
            f"`sample.classes` asks for class {max(section.classes)}, and `train_dit.num_classes` is"
            f" {training.num_classes}; classes count from 0"
        )


def _guide(pipeline: Pipeline) -> None:
    """What is known of a guide and of the transformer without loading them; the stage itself compares the rest."""
    section = pipeline.section("sample", SampleSection)
    if section.guide is None:
        return
    if section.dit is not None or _is_done(pipeline, "train_dit"):
        guide = longer_runs.guide(pipeline, longer_runs.sampled(pipeline).run).manifest
    elif longer_runs.own_guide(pipeline) is not None:
        return  # a milestone of the training that is still to be done
    else:
        guide = pipeline.workspace.resolve(section.guide, "dit").manifest
    if section.dit is not None:
        dit = pipeline.workspace.resolve(section.dit, "dit").manifest
        config, latents = dit.config.get("train_dit"), dit.inputs.get("latents")
    else:
        training = pipeline.config.train_dit
        config, latents = training.in_recipe() if training is not None else None, _latents(pipeline)
    asked: Json = {}
    found: Json = {}
    if config is not None and "train_dit" in guide.config:
        for key in ("path_type", "prediction"):
            asked[key], found[key] = config[key], guide.config["train_dit"][key]
    if latents is not None and "latents" in guide.inputs:
        asked["latents"], found["latents"] = latents["content"], guide.inputs["latents"]["content"]
    if fields := "; ".join(differing_fields(asked, found)):
        raise StaleInput(
            f"the guide `{section.guide}` was trained on something else than the transformer that it guides ({fields})"
        )


def _latents(pipeline: Pipeline) -> Json | None:
    try:
        return pipeline.latents().as_input() if pipeline.config.train_dit is not None else None
    except MissingInput:
        return None


def _held_out(pipeline: Pipeline) -> object:
    pipeline.require_held_out()
    return None if _makes_shards(pipeline) else pipeline.held_out


def _scored_decoder(pipeline: Pipeline) -> None:
    section = pipeline.section("evaluate", EvaluateSection)
    if section.decoder is not None:
        pipeline.workspace.resolve(section.decoder, "decoder")


def _extractor(pipeline: Pipeline) -> None:
    if takes_features(pipeline):
        extractor_files(pipeline.section("evaluate", EvaluateSection))


def _distance(pipeline: Pipeline) -> None:
    section = pipeline.section("evaluate", EvaluateSection)
    if section.perceptual_distance == "lpips":
        evaluation_lpips(section)


_CHECKS: dict[str, tuple[Callable[[Pipeline], object], ...]] = {
    "encode": (_images, _encoder),
    "train_decoder": (
        _images,
        _decoder_encoder,
        _decoder_latents,
        _crops,
        _perceptual,
        _discriminator,
        _origins_of("train_decoder"),
        _trackers_of("train_decoder"),
    ),
    "train_dit": (_train_dit, _origins_of("train_dit"), _trackers_of("train_dit")),
    "sample": (_sample, _guide),
    "evaluate": (_held_out, _scored_decoder, _extractor, evaluation_references, _distance),
}
