"""`rae plan` of a sweep: what its runs share, what remains, and how long it will take from measured times alone."""

from collections.abc import Callable
from dataclasses import dataclass

from rae.pipeline.console import Console, duration
from rae.pipeline.plan import STAGES, Pipeline
from rae.pipeline.status import plan_row
from rae.pipeline.sweep import Piece, Sweep, pieces
from rae.stages.training.section import TrainingSection
from rae.store.errors import RaeError
from rae.store.manifest import Artifact, Json
from rae.store.order import steps_per_epoch

# What the pace of a stage follows from: work of the same settings takes the same time for each unit of it.
_PACED_BY: dict[str, tuple[str, ...]] = {
    "shards": ("train",),
    "encode": ("feature_index", "image_size", "encoder_input_size", "precision", "crops", "horizontal_flip"),
    "train_decoder": (
        *("hidden_size", "depth", "num_heads", "intermediate_size", "feed", "precision", "batch_size"),
        *("perceptual_loss", "adversarial_loss"),
    ),
    "train_dit": ("model", "hidden_size", "depth", "num_heads", "mlp_ratio", "precision", "batch_size"),
    "sample": ("sampler", "num_steps", "guidance_scale", "batch_size", "precision"),
    "evaluate": (
        *("extractor", "extractor_input_size", "classifier", "baselines", "reconstructions", "latent_noise"),
        *("perceptual_distance", "reconstruction_distance"),
    ),
}


@dataclass(frozen=True)
class Row:
    """A piece of a sweep's work: whether it is done, and the seconds it will take where something like it was timed."""

    piece: Piece
    state: str
    seconds: float | None
    measured: str | None

    def to_json(self) -> Json:
        runs = [run.name for run in self.piece.runs]
        return {"stage": self.piece.stage.verb, "state": self.state, "runs": runs, "seconds": self.seconds} | {
            "measured": self.measured
        }


def rows(sweep: Sweep) -> list[Row]:
    """Every piece of work once, in the order of the runs."""
    made = {kind: list(sweep.workspace.artifacts(kind)) for kind in {stage.kind for stage in STAGES.values()}}
    found = []
    for piece in pieces(sweep.runs):
        pipeline, name = piece.run.pipeline, piece.stage.name
        state = plan_row(pipeline, name)["state"]
        if state == "wait":  # for a stage of its own run, which comes first
            state = "run"
        seconds, measured = (None, None) if state == "done" else _expected(pipeline, name, made)
        found.append(Row(piece, state, seconds, measured))
    return found


def show(sweep: Sweep, console: Console) -> None:
    """What is shared, what remains and how long it takes, in sentences; with `--json` every piece of work."""
    found = rows(sweep)
    if console.as_json:
        console.print_json([row.to_json() for row in found])
        return
    lines = []
    for stage in dict.fromkeys(row.piece.stage for row in found):
        own = [row for row in found if row.piece.stage is stage]
        asked = sum(len(row.piece.runs) for row in own)
        left = [row for row in own if row.state != "done"]
        lines.append([stage.verb, str(asked), str(len(own)), str(len(own) - len(left)), _time(left)])
    title = f"plan of the sweep `{sweep.name}`: {len(sweep.variants)} variants, {len(sweep.section.seeds)} seed(s)"
    console.table(title, ["stage", "runs that need it", "to be made", "done", "time that remains"], lines)
    left = [row for row in found if row.state != "done"]
    refused = [row for row in left if row.state == "refused"]
    for row in refused:
        console.say(f"refused: {row.piece.run.name}: {plan_row(row.piece.run.pipeline, row.piece.stage.name)['why']}")
    if not left:
        console.say("everything is done")
        return
    known = [row.seconds for row in left if row.seconds is not None]
    unknown = sorted({row.piece.stage.verb for row in left if row.seconds is None})
    told = f"{len(left)} of {len(found)} pieces of work remain"
    if known:
        told += (
            f": about {duration(sum(known))}, as {', '.join(sorted({row.measured for row in left if row.measured}))}"
        )
    if unknown:
        told += f"; nothing here says how long {', '.join(unknown)} take(s): the first run of each will"
    console.say(told)


def _time(left: list[Row]) -> str:
    known = [row.seconds for row in left if row.seconds is not None]
    if not left:
        return ""
    if not known:
        return "not measured"
    return duration(sum(known)) + ("" if len(known) == len(left) else f" and {len(left) - len(known)} not measured")


def _expected(pipeline: Pipeline, name: str, made: dict[str, list[Artifact]]) -> tuple[float | None, str | None]:
    """The seconds a stage takes at the pace of the newest artifact that was made with the same settings."""
    section = getattr(pipeline.config, name).model_dump(mode="json")
    alike = [
        one
        for one in made[STAGES[name].kind]
        if (settings := one.manifest.config.get(name)) is not None
        and all(settings.get(key) == section.get(key) for key in _PACED_BY[name] if key in settings)
        and one.manifest.metrics.get("seconds") is not None
    ]
    if not alike:
        return None, None
    latest = max(alike, key=lambda one: str(one.manifest.provenance.get("created")))
    metrics, work = latest.manifest.metrics, _WORK[name]
    try:
        units = work(pipeline)
    except RaeError:  # how many images there are is not known before the shards are
        return None, None
    done = metrics.get(_UNIT.get(name, ""), units)
    seconds = units * metrics["seconds"] / done if done else metrics["seconds"]
    return seconds, f"{latest.kind}/{latest.id} took"


def _steps(pipeline: Pipeline, name: str) -> float:
    section = getattr(pipeline.config, name)
    assert isinstance(section, TrainingSection)
    if section.steps is not None:
        return section.steps
    return (section.epochs or 0) * steps_per_epoch(len(pipeline.train), section.batch_size)


# How much of it there is, in units of the metric that counts it in the artifact.
_UNIT = {"encode": "rows", "train_decoder": "steps", "train_dit": "steps", "sample": "images"}
_WORK: dict[str, Callable[[Pipeline], float]] = {
    "shards": lambda pipeline: 1,
    "encode": lambda pipeline: len(pipeline.train),
    "train_decoder": lambda pipeline: _steps(pipeline, "train_decoder"),
    "train_dit": lambda pipeline: _steps(pipeline, "train_dit"),
    "sample": lambda pipeline: pipeline.config.sample.num_images if pipeline.config.sample else 0,
    "evaluate": lambda pipeline: 1,
}
