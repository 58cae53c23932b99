"""`rae evaluate CONFIG --images`: images that were made elsewhere, scored as samples are."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rae.pipeline import launch, runner
from rae.pipeline.plan import Pipeline, Stage, Task
from rae.pipeline.runner import Options, Outcome
from rae.pipeline.tasks import extractor_files, named_references
from rae.stages.job import Job, Result
from rae.stages.models.weights import digest_file
from rae.stages.sections import EvaluateSection
from rae.store.errors import ConfigError, MissingInput, RaeError
from rae.store.manifest import Json
from rae.store.shards import open_source
from rae.store.source import Source

_STAGE = Stage("evaluate --images", "scores", version=1)
_LABEL = re.compile(r"\d+_(\d+)")  # INDEX_CLASS, as `rae export png` names its files
_OF_RECONSTRUCTIONS = {
    "reconstructions",
    "batch_size",
    "latent_noise",
    "perceptual_distance",
    "reconstruction_distance",
}


def score_images(pipeline: Pipeline, images: str, name: str | None, options: Options) -> Outcome:
    """Score a folder, tars or an .npz with `arr_0` by `evaluate`; `scores/NAME`, by default CONFIG-images, are these.

    Real images are those of the configuration; without any, a reference is needed. Raises what finding the images, the
    reference or the extractor raises.
    """
    return make(pipeline, name or f"{pipeline.config.name}-images", lambda: _task(pipeline, images), options, True)


def say_plan(pipeline: Pipeline, images: str, name: str | None, options: Options) -> None:
    """Tell whether images would be scored; raises as `score_images` does, also for shards that are not there."""
    say(pipeline, name or f"{pipeline.config.name}-images", _task(pipeline, images), options)


def make(pipeline: Pipeline, name: str, task: Callable[[], Task], options: Options, needs_shards: bool) -> Outcome:
    """Make what a task of given images makes, and before it the shards; it is called `name`."""
    shards = [stage for stage in pipeline.stages if stage.name == "shards" and needs_shards]
    try:
        with launch.processes(options.device):  # one group for both, as for all stages of a run
            runner.run_stages(pipeline, shards, options)
            return runner.make(pipeline.workspace, name, task(), options)
    except RaeError as error:
        pipeline.name_in(error)
        raise


def say(pipeline: Pipeline, name: str, task: Task, options: Options) -> None:
    """Tell whether a task is done."""
    found = pipeline.workspace.find(task.stage.kind, task.recipe)
    state = f"already done, {found.ref}" if found is not None else "would be made"
    options.console.say(f"{task.stage.kind}/{name}: {state}")


def open_images(
    pipeline: Pipeline, images: str, classes: Sequence[str] | None = None
) -> tuple[Source | None, list[str]]:
    """The source of a folder or of tars, None for an .npz, and what a recipe holds of either: its digests.

    Raises MissingInput for what is not there, and as `open_source` does.
    """
    path, shards = Path(images), pipeline.config.shards
    if path.suffix == ".npz":
        if not path.is_file():
            raise MissingInput(f"there is no file {path}")
        return None, [digest_file(path)]
    keys: dict[str, Any] = {"image_key": shards.image_key, "label_key": shards.label_key}
    source = open_source(images, label_field=shards.label_field, classes=classes, **keys)
    return source, source.digests


def image_size(pipeline: Pipeline) -> int:
    """The side of the configuration's images; ConfigError without one."""
    if pipeline.config.encode is None:
        raise ConfigError(
            f"`{pipeline.config.name}` does not say how large images are, and scores are taken at one size",
            pipeline.command("evaluate") + " -s encode.image_size=256",
        )
    return pipeline.config.encode.image_size


def _task(pipeline: Pipeline, images: str) -> Task:
    section, size = pipeline.section("evaluate", EvaluateSection), image_size(pipeline)
    train = pipeline.train if pipeline.config.shards.train else None
    if section.reference is None or pipeline.config.shards.val or pipeline.config.shards.val_fraction:
        held_out: Source | None = pipeline.held_out
    else:
        held_out = None
    given, digests = open_images(pipeline, images, _classes(pipeline, train))
    inputs = named_references(pipeline, "reference")
    settings = {key: value for key, value in section.in_recipe().items() if key not in _OF_RECONSTRUCTIONS}
    real: Json = {
        "train": train.digests if train is not None else None,
        "held_out": held_out.digests if held_out is not None else None,
        "classes": train.classes if train is not None else None,
        "reading": pipeline.reading(),
    }
    config: Json = {"evaluate": settings, "encode": {"image_size": size}}
    recipe = _STAGE.recipe(config, inputs, weights=extractor_files(section).digests, images=digests, **real)

    def run(job: Job) -> Result:
        from rae.stages import evaluate
        from rae.stages.scoring.image_sets import ImageSet, SourceImages
        from rae.stages.scoring.npz_images import NpzImages

        made: ImageSet = NpzImages(Path(images)) if given is None else SourceImages(given, labels=_named_labels(given))
        return evaluate.score_images(section, made, train, held_out, size, inputs, job)

    return Task(_STAGE, recipe, inputs | pipeline.shards, run)


def _classes(pipeline: Pipeline, train: Source | None) -> Sequence[str] | None:
    """What the numbers of labels mean to the training images, so that class folders are numbered alike."""
    if train is None:
        return pipeline.config.shards.classes
    return train.classes or ([str(label) for label in range(train.num_classes)] or None)


def _named_labels(source: Source) -> np.ndarray | None:
    """Labels [N] that the names of unlabelled files hold, if all do."""
    if (source.labels >= 0).any():
        return None
    found = [_LABEL.fullmatch(source.keys[row].rpartition("/")[2]) for row in range(len(source))]
    return np.array([int(one[1]) for one in found if one]) if all(found) else None
