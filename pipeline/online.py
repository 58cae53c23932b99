"""Scores of a transformer in training: `rae sample` and `rae evaluate` themselves, on weights not yet published."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from rae.pipeline import longer_runs
from rae.pipeline.plan import Pipeline
from rae.pipeline.tasks import evaluation_references
from rae.stages.job import Job
from rae.stages.sections import EvaluateSection, SampleSection
from rae.stages.training.sections import TrainDitSection
from rae.store.errors import ConfigError
from rae.store.manifest import Artifact, Manifest
from rae.store.samples import read_batches

if TYPE_CHECKING:
    from rae.stages.training.online import Evaluation


def online_evaluation(pipeline: Pipeline) -> "Evaluation | None":
    """What `train_dit.evaluate_every` asks for, by the sections `sample` and `evaluate`; None if nothing.

    Raises `MissingInput` for a decoder that is not there yet, `ConfigError` without these sections, or if the run's own
    milestone is to guide its samples.
    """
    from rae.stages.training.online import Evaluation

    section = pipeline.section("train_dit", TrainDitSection)
    if section.evaluate_every is None:
        return None
    drawing, scoring = pipeline.section("sample", SampleSection), pipeline.section("evaluate", EvaluateSection)
    pipeline.require_held_out()
    if longer_runs.own_guide(pipeline) is not None:
        raise ConfigError(
            "`train_dit.evaluate_every` can't have samples guided by a milestone of the training itself, which may be"
            " still to come: name another transformer in `sample.guide`, or set `train_dit.evaluate_every=null`"
        )
    decoder, source, held_out = pipeline.decoder(), pipeline.train, pipeline.held_out
    guide = pipeline.workspace.resolve(drawing.guide, "dit") if drawing.guide is not None else None
    given = {"decoder": decoder, **evaluation_references(pipeline)}
    # The decoder's own scores do not change while the transformer trains.
    given.pop("reconstruction_reference", None)
    without: dict[str, object] = {"latent_noise": (), "perceptual_distance": "none", "reconstruction_distance": False}
    scoring = scoring.model_copy(update={"reconstructions": 1, **without})

    def score(dit: Path, weights: Literal["ema", "model"], job: Job) -> Mapping[str, float]:
        from rae.stages import evaluate, sample
        from rae.stages.training.ranks import Ranks

        drawn, scored = (replace(job, folder=job.folder / name) for name in ("samples", "scores"))
        for one in (drawn, scored):
            one.folder.mkdir(parents=True, exist_ok=True)
        settings = drawing.model_copy(update={"weights": weights, "ema_sigma_rel": None})
        payload = guide.payload if guide is not None else None
        made = Ranks.from_environment().broadcast(sample.run(settings, dit, decoder.payload, payload, drawn))
        inputs = {"guide": guide.as_input()} if guide is not None else {}
        manifest = Manifest(
            "samples", "online", {}, made.content, inputs, {"sample": settings.in_recipe()}, [], made.metrics
        )
        samples = Artifact(drawn.folder, manifest)
        result = evaluate.run(scoring, source, held_out, pipeline.encoder_source, {**given, "samples": samples}, scored)
        return {name: value for name, value in result.metrics.items() if not name.startswith("reconstruction_")}

    def images(folder: Path) -> NDArray[np.uint8]:
        return next(read_batches(folder / "samples")).images[:16]

    return Evaluation(section.evaluate_every, score, section.keep_best is not None, images)
