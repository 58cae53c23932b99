"""THE data flow: what each stage reads, what it makes, and the recipe that its result follows from.

    images or shards --shards--> shards
    shards --encode--> latents (+ exact statistics)
    shards (+ the encoder) --train-decoder--> decoder
    latents --train-dit--> dit
    dit + decoder --sample--> samples
    samples + decoder + shards --evaluate--> scores

Nothing here loads torch: whether work is done is a question of digests alone.
"""

import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

from rae.pipeline.config import PipelineConfig
from rae.stages import shards
from rae.stages.job import Job, Result
from rae.stages.models.weights import (
    PACKAGED_ARCHITECTURE,
    PACKAGED_ENCODER,
    EncoderFiles,
    digest_file,
    locate_encoder,
    locate_lpips,
)
from rae.stages.sections import (
    EncodeSection,
    EvaluateSection,
    SampleSection,
    Section,
    ShardsSection,
    TrainDecoderSection,
    TrainDitSection,
)
from rae.stages.shards import in_place, source_digest
from rae.stages.sources import Split
from rae.store.artifacts import Artifact, Workspace
from rae.store.errors import ConfigError, MissingInput, StaleInput
from rae.store.manifest import Json, canonical, differing_fields
from rae.store.shards import Source, open_source

S = TypeVar("S", bound=Section)


@dataclass(frozen=True)
class Stage:
    """A row of the data flow. `version` is bumped by hand when the same settings come to mean another result."""

    name: str
    kind: str
    version: int
    implied: bool = False  # cheap preparation: run by the verb that needs it

    @property
    def verb(self) -> str:
        return self.name.replace("_", "-")


STAGES = {
    stage.name: stage
    for stage in (
        Stage("shards", "shards", version=1, implied=True),
        Stage("encode", "latents", version=1),
        Stage("train_decoder", "decoder", version=1),
        Stage("train_dit", "dit", version=1),
        Stage("sample", "samples", version=1, implied=True),
        Stage("evaluate", "scores", version=1),
    )
}


@dataclass(frozen=True)
class Task:
    """One stage of one configuration: what would be made, from what, and how."""

    stage: Stage
    recipe: Json
    inputs: dict[str, Artifact]
    run: Callable[[Job], Result]


class Pipeline:
    """A configuration in a workspace, asked stage by stage."""

    def __init__(self, config: PipelineConfig, workspace: Workspace, words: list[str]) -> None:
        self.config = config
        self.workspace = workspace
        self.words = words  # how the person named the configuration, for the commands that messages suggest

    @property
    def stages(self) -> list[Stage]:
        """The stages that this configuration has, in order."""
        return [stage for stage in STAGES.values() if self._has(stage.name)]

    def _has(self, name: str) -> bool:
        if name == "shards":
            given = self.config.shards
            return bool(given.train and not in_place(given, "train")) or bool(given.val and not in_place(given, "val"))
        return getattr(self.config, name) is not None

    def task(self, name: str) -> Task:
        """What the stage would make; raises `MissingInput` when an input is still to be made."""
        return _TASKS[name](self)

    def find(self, name: str) -> Artifact | None:
        """The stage's artifact if it is published."""
        return self.workspace.find(STAGES[name].kind, self.task(name).recipe)

    def need(self, name: str) -> Artifact:
        """The stage's artifact, or `MissingInput` with the command that makes it."""
        stage = STAGES[name]
        try:
            found = self.find(name)
        except MissingInput as error:
            raise MissingInput(error.message, error.next_command or self.command(stage.verb)) from error
        if found is None:
            where = f"in the workspace {self.workspace.root}"
            raise MissingInput(
                f"the {stage.kind} of `{self.config.name}` are not {where} yet", self.command(stage.verb)
            )
        return found

    def command(self, verb: str) -> str:
        return shlex.join(["rae", verb, *self.words, "-w", str(self.workspace.root)])

    # ---- what several stages need ------------------------------------------------------------------------------

    def section(self, name: str, kind: type[S]) -> S:
        section = getattr(self.config, name)
        if section is None:
            raise ConfigError(f"the configuration `{self.config.name}` has no section `{name}`")
        assert isinstance(section, kind)
        return section

    @cached_property
    def train(self) -> Source:
        """The training images, from the shards that this pipeline made or from tars where they lie."""
        if not self.config.shards.train:
            raise MissingInput(
                f"the configuration `{self.config.name}` names no training images",
                self.command("run") + " -s shards.train=FOLDER",
            )
        return self._open(self.config.shards.train, "train")

    @cached_property
    def val(self) -> Source | None:
        """The held-out images, if there are any."""
        shards = self.config.shards
        if shards.val:
            return self._open(shards.val, "val")
        return self._open(str(shards.train), "val") if shards.val_fraction else None

    def _open(self, spec: str, split: Split) -> Source:
        shards = self.config.shards
        if not in_place(shards, split):
            spec = str(self.need("shards").payload / f"{split}-*.tar")
        keys: dict[str, Any] = {"image_key": shards.image_key, "label_key": shards.label_key}
        return open_source(spec, label_field=shards.label_field, classes=shards.classes, **keys)

    def reading(self) -> Json:
        """How samples are read from tars: under other keys the same tars show other images, or other labels."""
        shards = self.config.shards
        return {key: getattr(shards, key) for key in ("image_key", "label_key", "label_field")}

    @cached_property
    def encoder_files(self) -> EncoderFiles:
        encode = self.section("encode", EncodeSection)
        return locate_encoder(encode.encoder, encode.weights, encode.allow_download)

    def latents(self) -> Artifact:
        """What the transformer trains on: latents named by a REF, checked against `encode`, or this pipeline's own."""
        ref = self.section("train_dit", TrainDitSection).latents
        if ref is None:
            return self.need("encode")
        artifact = self.workspace.resolve(ref, "latents")
        if self.config.encode is not None:
            asked = {"config": self.encoding(), "weights": self.encoder_files.digests}
            found = {key: artifact.manifest.recipe.get(key) for key in asked}
            if fields := "; ".join(differing_fields(asked, found)):
                raise StaleInput(
                    f"the latents `{ref}` are not what `{self.config.name}` asks for ({fields})",
                    f"rae inspect latents/{artifact.id} -w {self.workspace.root}",
                )
        return artifact

    def decoder(self) -> Artifact:
        """The decoder of samples and reconstructions: the one that `sample` names, or this pipeline's own."""
        ref = self.config.sample.decoder if self.config.sample is not None else None
        return self.workspace.resolve(ref, "decoder") if ref else self.need("train_decoder")

    def encoding(self) -> Json:
        """The settings that latents follow from."""
        return {"encode": self.section("encode", EncodeSection).recipe()}

    def encoder(self) -> Json:
        """The settings that fix the encoder itself, whatever is stored of its output."""
        encode = self.encoding()["encode"]
        return {key: encode[key] for key in ("feature_index", "image_size", "encoder_input_size", "precision")}


def _recipe(stage: str, config: Json, inputs: dict[str, Artifact] | None = None, **digests: Any) -> Json:
    """The canonical recipe: kind and versions, settings, ids of inputs, digests of weights and source shards."""
    row = STAGES[stage]
    recipe = {
        "kind": row.kind,
        "schema": 1,
        "stage": {"name": stage, "version": row.version},
        "config": config,
        "inputs": {role: artifact.id for role, artifact in (inputs or {}).items()},
        **digests,
    }
    plain: Json = json.loads(canonical(recipe))  # as it will be read back: tuples are lists
    return plain


# ---- one function a stage: its recipe, its inputs, and the call ----------------------------------------------------


def shards_task(section: ShardsSection) -> Task:
    """Converting a source to shards needs no pipeline around it."""
    recipe = _recipe("shards", {"shards": section.recipe()}, source=source_digest(section))
    return Task(STAGES["shards"], recipe, {}, lambda job: shards.run(section, job))


def _encode(pipeline: Pipeline) -> Task:
    section = pipeline.section("encode", EncodeSection)
    source, files = pipeline.train, pipeline.encoder_files
    # The classes, since tars that name their labels leave the numbers to them.
    digests: Json = {"weights": files.digests, "source": source.digests, "classes": source.classes}
    recipe = _recipe("encode", pipeline.encoding(), reading=pipeline.reading(), **digests)

    def run(job: Job) -> Result:
        from rae.stages import encode

        return encode.run(section, source, files, job)

    return Task(STAGES["encode"], recipe, {}, run)


def _train_decoder(pipeline: Pipeline) -> Task:
    section = pipeline.section("train_decoder", TrainDecoderSection)
    encode = pipeline.section("encode", EncodeSection)
    source, files = pipeline.train, pipeline.encoder_files
    weights = dict(files.digests)
    if section.perceptual_loss == "lpips":
        backbone = locate_lpips(section.lpips_weights)
        weights[backbone.name] = digest_file(backbone)
    config = {"train_decoder": section.recipe(), "encoder": pipeline.encoder()}
    recipe = _recipe("train_decoder", config, weights=weights, source=source.digests, reading=pipeline.reading())

    def run(job: Job) -> Result:
        from rae.stages import train_decoder

        return train_decoder.run(section, encode, source, files, job)

    return Task(STAGES["train_decoder"], recipe, {}, run)


def _train_dit(pipeline: Pipeline) -> Task:
    section = pipeline.section("train_dit", TrainDitSection)
    inputs = {"latents": pipeline.latents()}
    recipe = _recipe("train_dit", {"train_dit": section.recipe()}, inputs)

    def run(job: Job) -> Result:
        from rae.stages import train_dit

        return train_dit.run(section, inputs["latents"], job)

    return Task(STAGES["train_dit"], recipe, inputs, run)


def _sample(pipeline: Pipeline) -> Task:
    section = pipeline.section("sample", SampleSection)
    dit = pipeline.workspace.resolve(section.dit, "dit") if section.dit else pipeline.need("train_dit")
    inputs = {"dit": dit, "decoder": pipeline.decoder()}
    recipe = _recipe("sample", {"sample": section.recipe()}, inputs)

    def run(job: Job) -> Result:
        from rae.stages import sample

        return sample.run(section, inputs["dit"], inputs["decoder"], job)

    return Task(STAGES["sample"], recipe, inputs, run)


def _evaluate(pipeline: Pipeline) -> Task:
    section = pipeline.section("evaluate", EvaluateSection)
    source, held_out, files = pipeline.train, pipeline.val, pipeline.encoder_files
    if held_out is None:
        raise MissingInput(
            f"`{pipeline.config.name}` holds no images out to score against",
            pipeline.command("evaluate") + " -s shards.val_fraction=0.1",
        )
    inputs = {"decoder": pipeline.decoder()}
    if pipeline.config.sample is not None:
        inputs["samples"] = pipeline.need("sample")
    config = {"evaluate": section.recipe(), "encoder": pipeline.encoder()}
    extractor = {f"extractor/{name}": digest for name, digest in _extractor_files(section).digests.items()}
    weights = {**files.digests, **extractor}
    digests: Json = {"weights": weights, "source": source.digests, "held_out": held_out.digests}
    recipe = _recipe("evaluate", config, inputs, classes=source.classes, reading=pipeline.reading(), **digests)

    def run(job: Job) -> Result:
        from rae.stages import evaluate

        return evaluate.run(section, source, held_out, files, inputs["decoder"], inputs.get("samples"), job)

    return Task(STAGES["evaluate"], recipe, inputs, run)


def _extractor_files(section: EvaluateSection) -> EncoderFiles:
    """The extractor's weights: those of a given file, or those that its package carries."""
    if section.extractor == PACKAGED_ENCODER and section.extractor_weights is not None:
        return locate_encoder(f"timm:{PACKAGED_ARCHITECTURE}", section.extractor_weights)
    return locate_encoder(section.extractor)


_TASKS: dict[str, Callable[[Pipeline], Task]] = {
    "shards": lambda pipeline: shards_task(pipeline.config.shards),
    "encode": _encode,
    "train_decoder": _train_decoder,
    "train_dit": _train_dit,
    "sample": _sample,
    "evaluate": _evaluate,
}
