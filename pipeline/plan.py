"""THE data flow: what each stage makes of what. `tasks.py` says how, stage by stage.

    images or shards --shards--> shards
    shards --encode--> latents (+ exact statistics)
    shards (+ the encoder, or latents) --train-decoder--> decoder
    latents --train-dit--> dit
    dit + decoder (+ a guide) --sample--> samples
    samples + decoder + shards --evaluate--> scores

Nothing here loads torch: whether work is done is a question of digests alone.
"""

import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeVar

from rae.pipeline.config import PipelineConfig
from rae.stages.job import Job, Result
from rae.stages.models.geometry import encoder_geometry, input_size_for
from rae.stages.models.own_encoder import OwnEncoder
from rae.stages.models.weights import EncoderSource, locate_encoder
from rae.stages.section import Section
from rae.stages.sections import EncodeSection
from rae.stages.shards import in_place
from rae.stages.sources import Split
from rae.store.artifacts import Workspace
from rae.store.errors import ConfigError, MissingInput, RaeError, StaleInput
from rae.store.manifest import Artifact, Json, canonical, differing_fields
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

    def recipe(self, config: Json, inputs: dict[str, Artifact] | None = None, **digests: Any) -> Json:
        """The canonical recipe: kind and versions, settings, ids of inputs, digests of weights and source shards."""
        recipe = {
            "kind": self.kind,
            "schema": 1,
            "stage": {"name": self.name, "version": self.version},
            "config": config,
            "inputs": {role: artifact.id for role, artifact in (inputs or {}).items()},
            **digests,
        }
        plain: Json = json.loads(canonical(recipe))  # as it will be read back: tuples are lists
        return plain


STAGES = {
    stage.name: stage
    for stage in (
        Stage("shards", "shards", version=1, implied=True),
        Stage("encode", "latents", version=2),
        Stage("train_decoder", "decoder", version=3),
        Stage("train_dit", "dit", version=3),
        Stage("sample", "samples", version=3, implied=True),
        Stage("evaluate", "scores", version=5),
    )
}


@dataclass(frozen=True)
class Task:
    """One stage of one configuration: what would be made, from what, and how.

    `unit(device, number)`, of a stage whose work can be spread over processes, does a unit of it; it can be pickled.
    `milestones` are steps of a training to be published while it goes on. `name` is what the artifact is to be called
    where that is not the configuration's. `dry_run(device)`, of a training, tries it out and writes nothing.
    """

    stage: Stage
    recipe: Json
    inputs: dict[str, Artifact]
    run: Callable[[Job], Result]
    unit: Callable[[str, int], None] | None = None
    milestones: frozenset[int] = frozenset()
    name: str | None = None
    dry_run: Callable[[str], Json] | None = None


class Pipeline:
    """A configuration in a workspace, asked stage by stage."""

    def __init__(
        self,
        config: PipelineConfig,
        workspace: Workspace,
        words: list[str],
        encoder: OwnEncoder | None = None,
        checkpoint: str | None = None,
        suffix: str = "",
    ) -> None:
        self.config = config
        self.workspace = workspace
        self.words = words  # how the person named the configuration, for the commands that messages suggest
        self.checkpoint = checkpoint  # `step=N` or `latest`: samples of a transformer that may still be training
        self.suffix = suffix  # to the names of what it makes: one configuration at several scales of guidance
        self._encoder = encoder  # a module in place of what `encode.encoder` names

    @property
    def stages(self) -> list[Stage]:
        """The stages that this configuration has, in order."""
        return [stage for stage in STAGES.values() if self._has(stage.name)]

    def _has(self, name: str) -> bool:
        if name == "shards":
            given = self.config.shards
            return bool(given.train and not in_place(given, "train")) or bool(given.val and not in_place(given, "val"))
        return getattr(self.config, name) is not None

    def at_further_scales(self, stage: Stage) -> list["Pipeline"]:
        """This pipeline at each of `sample.further_scales`, for the stages that guidance means something to."""
        sample = self.config.sample
        if sample is None or stage.name not in ("sample", "evaluate"):
            return []
        return [
            Pipeline(
                self.config.model_copy(update={"sample": sample.at_scale(scale)}),
                self.workspace,
                self.words,
                self._encoder,
                self.checkpoint,
                f"-guidance{scale:g}",
            )
            for scale in sample.further_scales
        ]

    def task(self, name: str) -> Task:
        """What the stage would make; raises `MissingInput` when an input is still to be made."""
        from rae.pipeline.tasks import TASKS  # each of them is a function of a pipeline

        return TASKS[name](self)

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
            where = f"in the workspace {self.workspace.place}"
            raise MissingInput(f"`{self.config.name}` has no {stage.kind} {where} yet", self.command(stage.verb))
        return found

    def name_in(self, error: RaeError) -> None:
        """Put what the person calls CONFIG into an error's next command, as it can be pasted: stages do not know it."""
        words = (error.next_command or "").split(" ")
        if words[:1] == ["rae"] and words[2:3] == ["CONFIG"]:
            error.next_command = " ".join([self.command(words[1]), *words[3:]])

    def command(self, verb: str) -> str:
        if self._encoder is not None:
            return f"rae.run({self.words[0]!r}, encoder=...) in Python, with the encoder `{self._encoder.name}`"
        return shlex.join(["rae", verb, *self.words, "-w", self.workspace.place])

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
    def held_out(self) -> Source:
        """The images to score against: `shards.val`, or those that `val_fraction` kept from training."""
        self.require_held_out()
        return self._open(self.config.shards.val or str(self.config.shards.train), "val")

    def _open(self, spec: str, split: Split) -> Source:
        shards = self.config.shards
        if not in_place(shards, split):
            spec = str(self.need("shards").payload / f"{split}-*.tar")
        keys: dict[str, Any] = {"image_key": shards.image_key, "label_key": shards.label_key}
        return open_source(spec, label_field=shards.label_field, classes=shards.classes, **keys)

    @property
    def shards(self) -> dict[str, Artifact]:
        """The shards that this pipeline made, if it had to: lineage, since recipes hold the digests of their tars."""
        return {"shards": self.need("shards")} if self._has("shards") else {}

    def require_held_out(self) -> None:
        """Raise `MissingInput` unless the configuration holds images out to score against."""
        if not self.config.shards.val and not self.config.shards.val_fraction:
            raise MissingInput(
                f"`{self.config.name}` holds no images out to score against: name some with `shards.val`, or set"
                " `shards.val_fraction` before anything is encoded",
                self.command("run") + " -s shards.val_fraction=0.1",
            )

    def reading(self) -> Json:
        """How samples are read from tars: under other keys the same tars show other images, or other labels."""
        shards = self.config.shards
        return {key: getattr(shards, key) for key in ("image_key", "label_key", "label_field")}

    @cached_property
    def encoder_source(self) -> EncoderSource:
        """The encoder that `encode` names, or the one handed over in its place."""
        if self._encoder is not None:
            return self._encoder
        encode = self.section("encode", EncodeSection)
        return locate_encoder(encode.encoder, encode.weights, encode.allow_download)

    def geometry(self) -> tuple[int, tuple[int, int]]:
        """Token width and grid (rows, columns) of the encoder that is asked for; no weights are loaded for it."""
        encode = self.section("encode", EncodeSection)
        input_size = input_size_for(self.encoder_source, encode.image_size, encode.encoder_input_size)
        return encoder_geometry(self.encoder_source, input_size, encode.feature_index)

    def latents(self, reader: Literal["train_decoder", "train_dit"] = "train_dit") -> Artifact:
        """What a trainer reads: latents named by a REF, checked against `encode`, or this pipeline's own.

        The transformer's must be the very ones that `encode` describes, the decoder's of the same encoder and size.
        """
        section = getattr(self.config, reader)
        if section.latents is None:
            return self.need("encode")
        ref = section.latents
        artifact = self.workspace.resolve(ref, "latents")
        if self.config.encode is not None:
            settings = self.encoding()["encode"] if reader == "train_dit" else self.encoder()
            recipe = artifact.manifest.recipe
            stored = recipe["config"]["encode"]
            asked = {"encode": settings, "weights": self.encoder_source.digests}
            found = {
                "encode": {key: stored.get(key) for key in settings} if reader == "train_decoder" else stored,
                "weights": recipe.get("weights"),
            }
            if fields := "; ".join(differing_fields(asked, found)):
                raise StaleInput(
                    f"the latents `{ref}` are not what `{self.config.name}` asks for ({fields})",
                    f"rae inspect latents/{artifact.id} -w {self.workspace.place}",
                )
        return artifact

    def decoder(self) -> Artifact:
        """The decoder of samples and reconstructions: the one that `sample` names, or this pipeline's own."""
        ref = self.config.sample.decoder if self.config.sample is not None else None
        return self.workspace.resolve(ref, "decoder") if ref else self.need("train_decoder")

    def encoding(self) -> Json:
        """The settings that latents follow from."""
        return {"encode": self.section("encode", EncodeSection).in_recipe()}

    def encoder(self) -> Json:
        """The settings that fix the encoder itself, whatever is stored of its output."""
        encode = self.encoding()["encode"]
        return {key: encode[key] for key in ("feature_index", "image_size", "encoder_input_size")}
