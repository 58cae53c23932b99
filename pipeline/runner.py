"""Is it done? -> run -> verify -> publish. The same four steps for every stage."""

import datetime
import shutil
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rae.pipeline import launch, stopping
from rae.pipeline.console import Console
from rae.pipeline.describing import describe
from rae.pipeline.longer_runs import sampled
from rae.pipeline.plan import STAGES, Pipeline, Stage, Task
from rae.pipeline.stopping import again
from rae.pipeline.tasks import shards_task
from rae.stages.job import Job, Observed, Publish, Result
from rae.stages.sections import ShardsSection
from rae.store.artifacts import Work, Workspace
from rae.store.errors import ConfigError, Overtaken, PartialResult, RaeError, StaleInput
from rae.store.lease import held
from rae.store.manifest import (
    Artifact,
    Json,
    Manifest,
    canonical,
    differing_fields,
    milestone_recipe,
    read_artifact,
    recipe_id,
)
from rae.store.milestones import Run, milestone
from rae.store.publish import publish_bytes

if TYPE_CHECKING:
    from rae.stages.training.ranks import Ranks

_ATTEMPTS = 5  # to finish what others are at work on too


@dataclass(frozen=True)
class Options:
    """How to run, whatever is run."""

    restart: bool = False
    device: str = "auto"
    crew: launch.Crew = field(default_factory=launch.Crew)
    console: Console = field(default_factory=Console)
    command: str = field(default_factory=again)  # what continues this run
    profile_steps: int = 0  # of a training


@dataclass(frozen=True)
class Outcome:
    """A stage that is done: its artifact, and whether it was there already."""

    artifact: Artifact
    reused: bool

    def to_json(self) -> Json:
        manifest = self.artifact.manifest
        where = str(self.artifact.folder)
        return {"kind": manifest.kind, "id": manifest.id, "content": manifest.content, "path": where} | {
            "reused": self.reused,
            "metrics": manifest.metrics,
        }


def run_stages(pipeline: Pipeline, stages: list[Stage], options: Options) -> list[Outcome]:
    """Run what is missing of `stages`, in order."""
    with launch.processes(
        options.device
    ) as processes:  # one group for all stages: torchrun's store connects ranks once
        if pipeline.checkpoint is not None:  # rank 0 decides for all: a newer one may be saved between two looks
            step = sampled(pipeline).step if processes.is_main else None
            pipeline.checkpoint = f"step={processes.broadcast(step)}"
        return [
            run_stage(one, stage, options)
            for stage in stages
            for one in (*pipeline.at_further_scales(stage), pipeline)  # its own last: a verb answers with that
        ]


def run_verb(pipeline: Pipeline, name: str, options: Options) -> Outcome:
    """Run one stage, and before it the cheap preparation that it implies."""
    stage = STAGES[name]
    if stage not in pipeline.stages:
        raise ConfigError(f"the configuration `{pipeline.config.name}` has no section `{name}`")
    order = list(STAGES)
    before = [one for one in pipeline.stages if one.implied and order.index(one.name) < order.index(name)]
    # Of the preparation, samples are drawn for their scores alone.
    before = [one for one in before if one.name == "shards" or name == "evaluate"]
    return run_stages(pipeline, [*before, stage], options)[-1]


def between(pipeline: Pipeline, first: str | None, last: str | None) -> list[Stage]:
    """The pipeline's stages from `first` to `last`, both included; verbs or section names."""
    names = [stage.name for stage in pipeline.stages]
    bounds = []
    for word, default in ((first, 0), (last, len(names) - 1)):
        name = (word or "").replace("-", "_")
        if word and name not in names:
            known = ", ".join(stage.verb for stage in pipeline.stages)
            raise ConfigError(f"`{word}` is not a stage of `{pipeline.config.name}`; its stages are {known}")
        bounds.append(names.index(name) if word else default)
    if bounds[0] > bounds[1]:
        raise ConfigError(f"`--from {first}` comes after `--to {last}`: nothing lies between them")
    return pipeline.stages[bounds[0] : bounds[1] + 1]


def convert(section: ShardsSection, out: str, options: Options) -> Outcome:
    """`rae shards SOURCE OUT`: shards in a folder of the person's choice, found again like any artifact."""
    task, folder = shards_task(section), Path(out)
    if (folder / "manifest.json").is_file():
        found = read_artifact(folder)
        if fields := "; ".join(differing_fields(task.recipe, found.manifest.recipe)):
            raise StaleInput(f"{folder} already holds other shards ({fields})", "choose another OUT folder")
        options.console.reused("shards", found)
        return Outcome(found, reused=True)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()) and not (folder / "started.json").exists():
        raise ConfigError(f"{folder} is not empty, and rae did not begin it; choose another OUT folder")
    publish_bytes(folder / "started.json", canonical({"recipe": task.recipe}))
    work = Work("shards", "shards", task.recipe, folder, folder, ())
    publish_bytes(folder / "manifest.json", _run(task, work, "cpu", options).to_json())
    made = read_artifact(folder)
    options.console.done("shards", made)
    return Outcome(made, reused=False)


def run_stage(pipeline: Pipeline, stage: Stage, options: Options) -> Outcome:
    """Find the stage's artifact or make it."""
    try:
        task = pipeline.task(stage.name)
        return make(pipeline.workspace, (task.name or pipeline.config.name) + pipeline.suffix, task, options)
    except OSError as error:
        raise stopping.explained(error, options.command) or error from error
    except PartialResult as error:
        raise type(error)(error.message, options.command) from error
    except RaeError as error:
        pipeline.name_in(error)
        raise


def make(workspace: Workspace, name: str, task: Task, options: Options) -> Outcome:
    """Find the artifact of a task's recipe, or run the task and publish what it made; `name` then points to it."""
    stage, console = task.stage, options.console
    with launch.processes(options.device) as processes:
        # Rank 0 decides for all: another run may publish between two looks.
        found = processes.broadcast(_found(workspace, name, task) if processes.is_main else None)
        if found is not None:
            console.reused(stage.verb, found)
            _say_milestones(workspace, task, found, options)
            return Outcome(found, reused=True)
        console.begins(stage.verb)
        with held(workspace.objects, _refs(task)) if processes.is_main else nullcontext():
            made = _make(workspace, name, task, options, processes)
    console.done(stage.verb, made)
    return Outcome(made, reused=False)


def _found(workspace: Workspace, name: str, task: Task) -> Artifact | None:
    """The artifact of a task's recipe, named; found again once it is, for until then it could be collected."""
    found = workspace.find(task.stage.kind, task.recipe)
    if found is None:
        return None
    workspace.name(found, name)
    return workspace.find(task.stage.kind, task.recipe)


def _refs(task: Task) -> list[str]:
    """What must not be collected while a task runs: what it makes, milestones too, and what it makes it from."""
    recipes = [task.recipe, *(milestone_recipe(task.recipe, step) for step in task.milestones)]
    makes = [f"{task.stage.kind}/{recipe_id(recipe)}" for recipe in recipes]
    return makes + [artifact.ref for artifact in task.inputs.values()]


def _make(workspace: Workspace, name: str, task: Task, options: Options, processes: "Ranks | launch.Alone") -> Artifact:
    inputs = {role: artifact.as_input() for role, artifact in task.inputs.items()}
    begin = partial(workspace.begin, task.stage.kind, name, task.recipe, inputs, options.restart)
    work = processes.broadcast(begin() if processes.is_main else None)
    assert work is not None
    publish = partial(_publish_milestone, workspace, task, work, options)
    for attempt in range(_ATTEMPTS):
        try:
            missing = processes.broadcast(_missing_milestones(workspace, task, work) if processes.is_main else None)
            with workspace.sending(work) if processes.is_main else nullcontext():
                manifest = _run(task, work, launch.device_of(options.device), options, missing or frozenset(), publish)
        except BaseException:
            if processes.is_main:
                workspace.abandon(work)
            raise
        overtaken = processes.broadcast(_publish(workspace, work, manifest) if processes.is_main else None)
        if overtaken is None:
            break
        if attempt + 1 == _ATTEMPTS:
            raise overtaken
    return read_artifact(work.folder)


def _publish(workspace: Workspace, work: Work, manifest: Manifest) -> Overtaken | None:
    """Publish what was made; what others had done of it before, if that makes it another."""
    try:
        workspace.publish(work, manifest)
    except Overtaken as overtaken:
        return overtaken
    return None


def _missing_milestones(workspace: Workspace, task: Task, work: Work) -> frozenset[int]:
    """The milestones of a training that are still to be published; its last step needs no publication of its own."""
    run = Run(work.kind, work.recipe, work.folder)
    return frozenset(step for step in task.milestones if milestone(workspace.published, run, step) is None)


def _publish_milestone(
    workspace: Workspace,
    task: Task,
    run: Work,
    options: Options,
    step: int,
    write: Callable[[Path], Result],
    alias: str | None = None,
) -> None:
    work = workspace.begin_milestone(run, step)
    started, device = datetime.datetime.now(datetime.UTC), launch.device_of(options.device)
    try:
        made = workspace.publish(
            work, describe(task, work, write(work.attempt), started, device, options.crew, options.command)
        )
    except BaseException:  # it is written again when training comes by again
        shutil.rmtree(work.attempt, ignore_errors=True)
        raise
    if alias is not None:
        workspace.name(made, f"{run.name}-{alias}")
    options.console.say(f"{task.stage.verb}: published {run.kind}/{work.name}, {made.kind}/{made.id}")


def _say_milestones(workspace: Workspace, task: Task, found: Artifact, options: Options) -> None:
    """Tell which milestones a finished training lacks: it can't publish them any more."""
    run = Run(found.kind, found.manifest.recipe, found.folder)
    if missing := [str(step) for step in sorted(task.milestones) if milestone(workspace.published, run, step) is None]:
        options.console.say(
            f"{task.stage.verb}: it published nothing at step {', '.join(missing)}, which was not asked for in time"
        )


def _run(
    task: Task,
    work: Work,
    device: str,
    options: Options,
    milestones: frozenset[int] = frozenset(),
    publish: Publish | None = None,
) -> Manifest:
    started, clock = datetime.datetime.now(datetime.UTC), time.monotonic()
    observers = work.folder.parents[2] / "runs"  # in the workspace, beside objects/KIND/ID
    with options.console.progress(task.stage.verb) as progress, stopping.requested(options.command) as stop:
        job = Job(
            folder=work.attempt,
            earlier=work.earlier,
            progress=progress,
            stopping=lambda: bool(stop),
            check_stop=stop.check,
            device=device,
            share=options.crew.share,
            spread=launch.spread(options.crew, task.unit, options.device) if task.unit else None,
            milestones=milestones,
            publish=publish,
            observed=Observed(f"{work.kind}/{work.name}", work.recipe, observers, options.profile_steps),
        )
        result = task.run(job)
    seconds = round(time.monotonic() - clock, 2)
    result = replace(result, metrics={"seconds": seconds, **result.metrics})
    return describe(task, work, result, started, device, options.crew, options.command)
