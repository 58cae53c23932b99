"""One function a stage: the recipe that its result follows from, its inputs, and the call.

Nothing here loads torch before a task is run: whether work is done is a question of digests alone.
"""

import json
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rae.pipeline import longer_runs
from rae.pipeline.config import PipelineConfig
from rae.pipeline.plan import STAGES, Pipeline, Task
from rae.stages import shards
from rae.stages.job import Beginning, Job, Result
from rae.stages.models.weights import digest_file, locate_dino, locate_lpips
from rae.stages.scoring.extractor_files import ExtractorFiles, locate_extractor
from rae.stages.scoring.reference_files import check_reference
from rae.stages.sections import EncodeSection, EvaluateSection, SampleSection, ShardsSection
from rae.stages.training.sections import TrainDecoderSection, TrainDitSection
from rae.store.artifacts import Workspace
from rae.store.errors import ConfigError, StaleInput
from rae.store.manifest import Artifact, Json, canonical, differing_fields, recipe_id

if TYPE_CHECKING:
    from rae.stages.encode import Encoding
    from rae.stages.train_decoder import Given


def _recipe(stage: str, config: Json, inputs: dict[str, Artifact] | None = None, **digests: Any) -> Json:
    return STAGES[stage].recipe(config, inputs, **digests)


def shards_task(section: ShardsSection) -> Task:
    """Converting a source to shards needs no pipeline around it."""
    recipe = _recipe("shards", {"shards": section.in_recipe()}, source=shards.source_digest(section))
    return Task(STAGES["shards"], recipe, {}, lambda job: shards.run(section, job))


def _encode(pipeline: Pipeline) -> Task:
    section = pipeline.section("encode", EncodeSection)
    source, encoder_source = pipeline.train, pipeline.encoder_source
    # The classes, since tars that name their labels leave the numbers to them.
    digests: Json = {"weights": encoder_source.digests, "source": source.digests, "classes": source.classes}
    if section.conditioning is not None:
        digests["conditioning"] = digest_file(section.conditioning)
    recipe = _recipe("encode", pipeline.encoding(), reading=pipeline.reading(), **digests)

    def run(job: Job) -> Result:
        from rae.stages import encode
        from rae.store.latents_takeover import EarlierParts

        return encode.run(
            section, source, encoder_source, job, EarlierParts(_encoded_alike(pipeline.workspace, recipe))
        )

    workspace = pipeline.workspace
    place = str(workspace.root.absolute()) if workspace.is_local else workspace.place  # workers stand elsewhere
    unit = partial(encode_part, pipeline.config.model_dump_json(), place, canonical(recipe).decode())
    return Task(STAGES["encode"], recipe, pipeline.shards, run, unit)


def _encoded_alike(workspace: Workspace, recipe: Json) -> list[Artifact]:
    """Latents of the same settings, of whatever source shards and classes, the newest first."""

    def settings(recipe: Json) -> Json:
        return {key: value for key, value in recipe.items() if key not in ("source", "classes", "conditioning")}

    # Parts are taken over by a link or a copy, which takes a folder that they lie in.
    here = [one for one in workspace.artifacts("latents") if one.mirror is None]
    found = [one for one in here if settings(one.manifest.recipe) == settings(recipe)]
    return sorted(found, key=lambda one: str(one.manifest.provenance.get("created")), reverse=True)


def encode_part(config: str, workspace: str, recipe: str, device: str, number: int) -> None:
    """Encode one part of latents that another process has begun; `config` and `recipe` are JSON.

    Finds images and encoder for itself. Raises `StaleInput` unless what it finds makes this recipe.
    """
    folder, encoding = _found_here(config, workspace, recipe, device)
    encoding.write([number], Job(folder))


@cache
def _found_here(config: str, workspace: str, recipe: str, device: str) -> tuple[Path, "Encoding"]:
    """The latents' folder, and the images and the encoder as this process finds them: once for all parts."""
    from rae.stages.encode import Encoding

    pipeline = Pipeline(PipelineConfig.model_validate_json(config), Workspace(workspace), [])
    asked = json.loads(recipe)
    if fields := "; ".join(differing_fields(asked, pipeline.task("encode").recipe)):
        raise StaleInput(f"what is found there would make other latents ({fields})")
    section = pipeline.section("encode", EncodeSection)
    encoding = Encoding(section, pipeline.train, pipeline.encoder_source, device)
    return pipeline.workspace.folder("latents", recipe_id(asked)), encoding


def _train_decoder(pipeline: Pipeline) -> Task:
    section = pipeline.section("train_decoder", TrainDecoderSection)
    config: Json = {"train_decoder": section.in_recipe()}
    weights: Json = {}
    if section.needs_encoder:
        weights |= pipeline.encoder_source.digests
        config["encoder"] = pipeline.encoder()
    if section.feed == "online":
        inputs, read = {}, {"source": pipeline.train.digests, "reading": pipeline.reading()}
    else:  # what the latents were made of stands in their own recipe
        inputs, read = {"latents": pipeline.latents("train_decoder")}, {}
    if section.perceptual_loss == "lpips":
        backbone = locate_lpips(section.lpips_weights)
        weights[backbone.name] = digest_file(backbone)
    if section.adversarial_loss == "dino":
        weights[f"dino/{section.recipe}"] = digest_file(locate_dino(section.recipe, section.disc_weights))
    begins = longer_runs.origins(pipeline, "train_decoder")
    recipe = _recipe("train_decoder", config, inputs | begins, weights=weights, **read)
    longer_runs.check_continues(recipe, begins)

    def given() -> "tuple[Given, Beginning]":
        from rae.stages import train_decoder

        encode = pipeline.section("encode", EncodeSection) if section.needs_encoder else None
        encoder_source = pipeline.encoder_source if section.needs_encoder else None
        from_what = train_decoder.Given(encode, encoder_source, pipeline.train, inputs.get("latents"))
        return from_what, longer_runs.beginning_of(begins)

    def run(job: Job) -> Result:
        from rae.stages import train_decoder

        return train_decoder.run(section, *given(), job)

    def dry_run(device: str) -> Json:
        from rae.stages import train_decoder

        return train_decoder.prepare(section, *given(), device).dry_run()

    lineage, steps = pipeline.shards | inputs | begins, longer_runs.milestones(pipeline, "train_decoder")
    return Task(STAGES["train_decoder"], recipe, lineage, run, milestones=steps, dry_run=dry_run)


def _train_dit(pipeline: Pipeline) -> Task:
    section = pipeline.section("train_dit", TrainDitSection)
    begins = longer_runs.origins(pipeline, "train_dit")
    inputs = {"latents": pipeline.latents(), **begins}
    recipe = _recipe("train_dit", {"train_dit": section.in_recipe()}, inputs)
    longer_runs.check_continues(recipe, begins)

    def run(job: Job) -> Result:
        from rae.pipeline.online import online_evaluation
        from rae.stages import train_dit

        evaluation = online_evaluation(pipeline)
        return train_dit.run(section, inputs["latents"], longer_runs.beginning_of(begins), job, evaluation)

    def dry_run(device: str) -> Json:
        from rae.stages import train_dit

        return train_dit.prepare(section, inputs["latents"], longer_runs.beginning_of(begins), device).dry_run()

    steps = longer_runs.milestones(pipeline, "train_dit")
    return Task(STAGES["train_dit"], recipe, inputs, run, milestones=steps, dry_run=dry_run)


def _sample(pipeline: Pipeline) -> Task:
    section = pipeline.section("sample", SampleSection)
    dit = longer_runs.sampled(pipeline)
    decoder = pipeline.decoder()
    guide = longer_runs.guide(pipeline, dit.run) if section.guide is not None else None
    chosen = {"dit": dit.artifact, "decoder": decoder, "guide": guide}
    inputs = {role: artifact for role, artifact in chosen.items() if artifact is not None}
    unpublished = {} if dit.artifact is not None else {"checkpoint": dit.in_recipe()}
    asked = {"conditioning": digest_file(section.conditioning)} if section.conditioning is not None else {}
    recipe = _recipe("sample", {"sample": section.in_recipe()}, inputs, **unpublished, **asked)

    def run(job: Job) -> Result:
        from rae.stages import sample

        return sample.run(section, dit.folder, decoder.payload, guide.payload if guide is not None else None, job)

    name = f"{pipeline.config.name}-step{dit.step}" if pipeline.checkpoint and not dit.is_end else None
    return Task(STAGES["sample"], recipe, inputs, run, name=name)


def _evaluate(pipeline: Pipeline) -> Task:
    section = pipeline.section("evaluate", EvaluateSection)
    pipeline.require_held_out()
    source, held_out, encoder_source = pipeline.train, pipeline.held_out, pipeline.encoder_source
    named = pipeline.workspace.resolve(section.decoder, "decoder") if section.decoder is not None else None
    inputs, weights = {"decoder": named or pipeline.decoder()}, dict(encoder_source.digests)
    if pipeline.config.sample is not None:
        inputs["samples"] = pipeline.need("sample")
    if takes_features(pipeline):
        weights |= {f"extractor/{name}": digest for name, digest in extractor_files(section).digests.items()}
    inputs |= evaluation_references(pipeline)
    if section.perceptual_distance == "lpips":
        backbone = evaluation_lpips(section)
        weights[backbone.name] = digest_file(backbone)
    config = {"evaluate": section.in_recipe(), "encoder": pipeline.encoder()}
    digests: Json = {"weights": weights, "source": source.digests, "held_out": held_out.digests}
    recipe = _recipe("evaluate", config, inputs, classes=source.classes, reading=pipeline.reading(), **digests)

    def run(job: Job) -> Result:
        from rae.stages import evaluate

        return evaluate.run(section, source, held_out, encoder_source, inputs, job)

    return Task(STAGES["evaluate"], recipe, inputs | pipeline.shards, run)


def evaluation_lpips(section: EvaluateSection) -> Path:
    """VGG-16's weights, for scores that ask for LPIPS."""
    return locate_lpips(section.lpips_weights, "evaluate.perceptual_distance")


def takes_features(pipeline: Pipeline) -> bool:
    """Whether anything is scored by an extractor."""
    section = pipeline.section("evaluate", EvaluateSection)
    return pipeline.config.sample is not None or section.reconstruction_distance


def evaluation_references(pipeline: Pipeline) -> dict[str, Artifact]:
    """The references that `evaluate` names, by their keys; `StaleInput` for another than the section asks for.

    Of which images one for reconstructions must be is left to the stage, which warns. `ConfigError` for a reference of
    samples where none are drawn.
    """
    section = pipeline.section("evaluate", EvaluateSection)
    if section.reference is not None and pipeline.config.sample is None:
        raise ConfigError(
            f"`evaluate.reference` is what samples are scored against, and `{pipeline.config.name}` draws none: for"
            " reconstructions it is `evaluate.reconstruction_reference`"
        )
    return named_references(pipeline, "reference", "reconstruction_reference")


def named_references(
    pipeline: Pipeline, *keys: Literal["reference", "reconstruction_reference"]
) -> dict[str, Artifact]:
    """Those references that `evaluate` names under `keys`; raises as `evaluation_references` does."""
    section = pipeline.section("evaluate", EvaluateSection)
    named = {key: ref for key in keys if (ref := getattr(section, key)) is not None}
    if not named:
        return {}
    extractor: Json = {"name": section.extractor, "digest": extractor_files(section).digest}
    if section.extractor_input_size is not None:
        extractor["input_size"] = section.extractor_input_size
    size = pipeline.config.encode.image_size if pipeline.config.encode is not None else None
    found: dict[str, Artifact] = {}
    for key, ref in named.items():
        found[key] = pipeline.workspace.resolve(ref, "reference")
        check_reference(found[key], extractor, section.reference_split if key == "reference" else None, size)
    return found


def extractor_files(section: EvaluateSection) -> ExtractorFiles:
    """The extractor's weights: those of a given file or folder, or those that a package or a cache holds."""
    return locate_extractor(section.extractor, section.extractor_weights, section.extractor_sha256)


TASKS: dict[str, Callable[[Pipeline], Task]] = {
    "shards": lambda pipeline: shards_task(pipeline.config.shards),
    "encode": _encode,
    "train_decoder": _train_decoder,
    "train_dit": _train_dit,
    "sample": _sample,
    "evaluate": _evaluate,
}
