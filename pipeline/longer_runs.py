"""Longer runs: what a training begins with, which milestones it publishes, and models read before it has ended.

Nothing here loads torch before a checkpoint is looked into.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rae.pipeline.plan import Pipeline
from rae.stages.job import Beginning
from rae.stages.models.model_folder import read_json
from rae.stages.sections import SampleSection
from rae.stages.training.section import TrainingSection
from rae.stages.training.sections import TrainDecoderSection, TrainDitSection
from rae.store.artifacts import Workspace
from rae.store.errors import ConfigError, MissingInput, StaleInput
from rae.store.manifest import Artifact, Json, differing_fields, recipe_id
from rae.store.milestones import Run, milestone, milestone_steps, no_milestone

Trainer = Literal["train_decoder", "train_dit"]

_SECTIONS: dict[Trainer, type[TrainingSection]] = {"train_decoder": TrainDecoderSection, "train_dit": TrainDitSection}
# What a continued run may have otherwise than the run that it continues: its length, and the learning rate from there.
_LENGTH = ("steps", "epochs")
_RATE = ("lr", "final_lr", "schedule", "warmup_steps", "warmup_epochs", "decay_start_epoch", "decay_end_epoch")
_STEP = re.compile(r"step=([0-9]{1,15})")


def origins(pipeline: Pipeline, stage: Trainer) -> dict[str, Artifact]:
    """The artifact that a training continues or begins with, by its role among the inputs.

    Raises `MissingInput` for one that is not there or lacks what it takes to go on, `ConfigError` for one that this
    configuration would rename or not lengthen, `StaleInput` for weights of another size.
    """
    section = pipeline.section(stage, _SECTIONS[stage])
    if section.init_from is not None:
        model = _resolve(pipeline, stage, "init_from", section.init_from)
        _check_sizes(stage, section, model)
        return {"init_from": model}
    if section.continue_from is None:
        return {}
    run = _resolve(pipeline, stage, "continue_from", section.continue_from)
    last_checkpoint(run)
    done = run.manifest.metrics
    for key in _LENGTH:
        length = getattr(section, key)
        if length is not None and length <= done[key]:
            raise ConfigError(
                f"`{stage}.{key}` is {length}, and {run.kind}/{run.id}, which it continues, has done {done[key]:g}:"
                " say how long the whole training is to be"
            )
    return {"continue_from": run}


def _resolve(pipeline: Pipeline, stage: Trainer, key: str, ref: str) -> Artifact:
    kind, name = stage.removeprefix("train_"), pipeline.config.name
    if ref.partition("@step=")[0] in (name, f"{kind}/{name}"):
        raise ConfigError(
            f"`{stage}.{key}` is `{ref}`, which will mean what `{name}` makes: name the artifact by its id, or call"
            " this configuration otherwise"
        )
    return pipeline.workspace.resolve(ref, kind)


def _check_sizes(stage: Trainer, section: TrainingSection, model: Artifact) -> None:
    """Refuse weights of other sizes before anything runs; some, such as the number of heads, no tensor's shape shows.

    What follows from the tokens is left to the shapes.
    """
    found = read_json(model.payload / f"{model.kind}.json").get("config", {})
    asked = section.model_dump(mode="json")
    keys = (asked.keys() & found.keys()) - {"num_classes", "class_dropout_prob"}
    asked, found = ({key: one[key] for key in keys} for one in (asked, found))
    if fields := "; ".join(differing_fields(asked, found)):
        raise StaleInput(f"`{stage}.init_from` names a model of other sizes ({fields})")


def last_checkpoint(run: Artifact) -> Path:
    """The folder of a finished run's last checkpoint; `MissingInput` for what was published without one."""
    if run.checkpoint is not None:
        return run.checkpoint
    what = "a milestone" if "milestone" in run.manifest.recipe else "no training run's end"
    raise MissingInput(
        f"{run.kind}/{run.id} is {what} and holds weights alone, without the optimizer's state: it can't be continued,"
        f" but `train_{run.kind}.init_from` begins with its weights"
    )


def check_continues(recipe: Json, beginnings: dict[str, Artifact]) -> None:
    """Refuse to continue a run whose recipe differs in more than its length and learning rate, naming the fields.

    `recipe` may be a part of one: what it lacks is not compared.
    """
    if (run := beginnings.get("continue_from")) is None:
        return
    asked, found = (_lasting(one) for one in (recipe, run.manifest.recipe))
    if fields := "; ".join(differing_fields(asked, {key: found.get(key) for key in asked})):
        raise StaleInput(f"{run.kind}/{run.id} can't be continued with other settings ({fields})")


def _lasting(recipe: Json) -> Json:
    """What of a recipe must stay as it is while a run is continued."""
    lasting = {key: value for key, value in recipe.items() if key not in ("config", "inputs")}
    if "config" in recipe:
        lasting["config"] = {
            name: {
                key: value for key, value in settings.items() if name not in _SECTIONS or key not in (*_LENGTH, *_RATE)
            }
            for name, settings in recipe["config"].items()
        }
    if "inputs" in recipe:
        roles = ("continue_from", "init_from")
        lasting["inputs"] = {role: id for role, id in recipe["inputs"].items() if role not in roles}
    return lasting


def beginning_of(beginnings: dict[str, Artifact]) -> Beginning:
    """Where the artifacts of `origins` lie, for the stage."""
    init_from, run = beginnings.get("init_from"), beginnings.get("continue_from")
    return Beginning(init_from.payload if init_from else None, last_checkpoint(run) if run else None)


def milestones(pipeline: Pipeline, stage: Trainer) -> frozenset[int]:
    """The steps to publish: those that are asked for, and the one that is to guide this transformer's samples."""
    asked = frozenset(pipeline.section(stage, _SECTIONS[stage]).publish_at)
    guide = own_guide(pipeline) if stage == "train_dit" else None
    return asked if guide is None else asked | {guide}


def own_guide(pipeline: Pipeline) -> int | None:
    """The step of the milestone of this configuration's own transformer that guides its samples, if one does."""
    sample, name = pipeline.config.sample, re.escape(pipeline.config.name)
    if sample is None or sample.guide is None or sample.dit is not None:
        return None
    found = re.fullmatch(rf"(?:(?:dit/)?{name}@)?{_STEP.pattern}", sample.guide)
    return int(found[1]) if found else None


def guide(pipeline: Pipeline, run: Run) -> Artifact:
    """The transformer that guides the one that `run` trains: another, or a milestone of the run."""
    ref = pipeline.section("sample", SampleSection).guide
    assert ref is not None
    own = own_guide(pipeline)
    if own is None and (relative := _STEP.fullmatch(ref)):
        own = int(relative[1])
    if own is None:
        return pipeline.workspace.resolve(ref, "dit")
    found = milestone(pipeline.workspace.published, run, own)
    if found is None:
        raise no_milestone(pipeline.workspace.artifacts(run.kind), run, own)
    return found


@dataclass(frozen=True)
class Snapshot:
    """A model as a run has it at a step: in `folder`, published as `artifact` or else in a checkpoint.

    `sha256` is that of the weights.
    """

    run: Run
    step: int
    folder: Path
    artifact: Artifact | None = None
    sha256: str = ""

    @property
    def is_end(self) -> bool:
        """Whether it is what the whole run made."""
        return self.artifact is not None and "milestone" not in self.artifact.manifest.recipe

    def in_recipe(self) -> Json:
        """What stands in place of an input's id where nothing is published."""
        return {"run": self.run.id, "step": self.step, "weights": self.sha256}


def parse_step(which: str) -> int | None:
    """The number of `step=N`, None for `latest`."""
    if which == "latest":
        return None
    found = _STEP.fullmatch(which)
    if found is None:
        raise ConfigError(f"`--checkpoint {which}` is neither `step=N` nor `latest`")
    return int(found[1])


def snapshot(workspace: Workspace, runs: list[Run], step: int | None, weights: str) -> Snapshot:
    """The model of the first of `runs` that has one at a step, or the newest one, whether the run is done or not.

    Reads checkpoints of unfinished work and leaves them as they are. Raises `MissingInput` with the steps there are.
    """
    from rae.stages.training.checkpoints import find_model, steps

    for run in runs:
        artifact = (
            milestone(workspace.published, run, step) if step is not None else workspace.find(run.kind, run.recipe)
        )
        if artifact is not None:
            return _published(artifact)
        if found := find_model(_attempts(run), weights, step):
            folder, reached, sha256 = found
            return Snapshot(run, reached, folder, sha256=sha256)
    run = runs[0]
    there = sorted({*milestone_steps(workspace.artifacts(run.kind), run), *steps(_attempts(run))})
    raise MissingInput(
        f"{run.kind}/{run.id} has no model"
        + (f" of step {step}" if step is not None else " yet")
        + (f"; there are steps {', '.join(map(str, there))}" if there else ": it has saved no checkpoint"),
        f"rae status -w {workspace.place}",
    )


def _published(dit: Artifact) -> Snapshot:
    step = dit.manifest.metrics.get("steps", 0)  # an imported one does not say
    return Snapshot(Run(dit.kind, dit.manifest.recipe, dit.folder), step, dit.payload, dit)


def _attempts(run: Run) -> list[Path]:
    return sorted(run.folder.glob("attempts/*"))


def sampled(pipeline: Pipeline) -> Snapshot:
    """The transformer to draw samples from: the one that `sample.dit` names, or that this configuration trains.

    With `--checkpoint`, as its run has it at a step, be it done or not.
    """
    section, workspace = pipeline.section("sample", SampleSection), pipeline.workspace
    if pipeline.checkpoint is None:
        dit = workspace.resolve(section.dit, "dit") if section.dit is not None else pipeline.need("train_dit")
        return _published(dit)
    step = parse_step(pipeline.checkpoint)
    if section.dit is not None:
        return snapshot_of(workspace, section.dit, "dit", step, section.weights)
    recipe = pipeline.task("train_dit").recipe
    run = Run("dit", recipe, workspace.folder("dit", recipe_id(recipe)))
    return snapshot(workspace, [run], step, section.weights)


def snapshot_of(workspace: Workspace, ref: str, kind: str, step: int | None, weights: str) -> Snapshot:
    """The `snapshot` of the run that a REF means; `MissingInput` if there is none, done or not."""
    runs = workspace.runs(ref, kind)
    if not runs:
        raise MissingInput(
            f"no {kind} `{ref}`, done or not, in the workspace {workspace.place}", f"rae status -w {workspace.place}"
        )
    return snapshot(workspace, runs, step, weights)
