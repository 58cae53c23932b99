"""`rae sweep`: every variant of a configuration with every seed. What runs share is made once, found by its recipe.

A sweep has no state of its own: what is done is what the workspace holds, so the same command continues it, and several
may work at it at once.
"""

import itertools
import json
import re
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from rae.pipeline import config as configuration
from rae.pipeline import runner
from rae.pipeline.config import PipelineConfig
from rae.pipeline.plan import Pipeline, Stage
from rae.pipeline.preflight import preflight
from rae.pipeline.sweep_section import Overrides, SweepSection
from rae.stages.section import Section
from rae.store.artifacts import Workspace
from rae.store.catalog import check_name
from rae.store.errors import ConfigError, PartialResult, RaeError
from rae.store.lease import leased
from rae.store.manifest import Json, canonical, recipe_id

_LOOKS_AGAIN_AFTER_S = 5.0
_OTHERS_BEGIN_WITHIN_S = 60.0  # a task of a job array that has not begun what others wait for by then may never begin


@dataclass(frozen=True)
class Run:
    """One variant with one seed: a pipeline whose artifacts are called by both."""

    variant: str
    seed: int
    pipeline: Pipeline

    @property
    def name(self) -> str:
        return self.pipeline.config.name

    def next_stage(self) -> Stage | None:
        """The first stage that is still to be done."""
        for stage in self.pipeline.stages:
            each = (self.pipeline, *self.pipeline.at_further_scales(stage))
            if any(one.find(stage.name) is None for one in each):
                return stage
        return None


@dataclass
class Sweep:
    """A configuration with a section `sweep`, and its runs, seed by seed of each variant."""

    config: PipelineConfig
    section: SweepSection
    workspace: Workspace
    words: list[str]  # how the person named the configuration
    runs: list[Run] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.config.name + (f"-{self.section.size}" if self.section.sizes else "")

    @property
    def variants(self) -> list[str]:
        return list(dict.fromkeys(run.variant for run in self.runs))

    def of(self, variant: str) -> list[Run]:
        """The runs of a variant, in the order of the seeds."""
        return [run for run in self.runs if run.variant == variant]


def sweep_of(config: str, workspace: Workspace, overrides: Sequence[str] = ()) -> Sweep:
    """Read a sweep and every run of it; `ConfigError` for settings of any run that are wrong, or no sweep at all."""
    settings = configuration.load(config, overrides)
    if settings.sweep is None:
        raise ConfigError(f"`{settings.name}` has no section `sweep`, which says what varies", "rae config ls")
    sweep = Sweep(settings, settings.sweep, workspace, configuration.words(config, overrides))
    for label, changes in variants(settings.sweep).items():
        for seed in settings.sweep.seeds:
            sweep.runs.append(_run(sweep, config, overrides, label, changes, seed))
    names = [run.name for run in sweep.runs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"two variants of `{settings.name}` would both be called {twice[0]}: label them apart")
    for claim in settings.sweep.claims:
        for label in (claim.variant, claim.baseline):
            if label not in sweep.variants:
                close = configuration.closest(label, sweep.variants)
                raise ConfigError(f"a claim of `{settings.name}` names no variant: `{label}`{close}")
    return sweep


def variants(section: SweepSection) -> dict[str, Overrides]:
    """The overrides of every variant by its label: `variants` times `grid`."""
    found: dict[str, Overrides] = {}
    values = [[(key, value) for value in given] for key, given in section.grid.items()]
    for label, changes in (section.variants or {"": {}}).items():
        for point in itertools.product(*values):
            words = [label] * bool(label) + [f"{key.rpartition('.')[2]}={_plain(value)}" for key, value in point]
            found[",".join(words)] = {**changes, **dict(point)}
    return found


def _plain(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _run(sweep: Sweep, config: str, overrides: Sequence[str], label: str, changes: Overrides, seed: int) -> Run:
    name = re.sub(r"[^\w.-]+", "-", f"{sweep.name}-{label}-s{seed}")
    check_name(name)
    own = [*overrides, f"name={name}", *(f"{key}={json.dumps(value)}" for key, value in changes.items())]
    unseeded = configuration.load(config, own)
    keys = [key for key in sweep.section.seed_keys if getattr(unseeded, key.partition(".")[0], None) is not None]
    own += [f"{key}={seed}" for key in keys]
    settings = configuration.load(config, own) if keys else unseeded
    return Run(label, seed, Pipeline(settings, sweep.workspace, configuration.words(config, own)))


def run_sweep(sweep: Sweep, options: runner.Options, share: tuple[int, int] = (0, 1)) -> None:
    """Run what is missing of the runs of share (i, n): those whose number is i modulo n.

    What a run of another share comes to first is waited for while others are at work on it, other runs first. A run
    that fails does not stop the rest: `PartialResult` tells of all that failed. Being stopped, or a full disk, does.
    """
    index, count = share
    waiting, failed = deque(sweep.runs[index::count]), dict[str, RaeError]()
    for run in waiting:
        preflight(run.pipeline)
    waits_since = {run.name: time.monotonic() for run in waiting}
    blocked = 0
    while waiting:
        run = waiting.popleft()
        try:
            stage = run.next_stage()
            if stage is None:
                blocked = 0
                continue
            if count > 1 and _left_to_others(sweep, run, stage, share, waits_since[run.name]):
                waiting.append(run)
                blocked += 1
                if blocked >= len(waiting):
                    time.sleep(_LOOKS_AGAIN_AFTER_S)
                    blocked = 0
                continue
            options.console.say(f"{run.name}: {stage.verb}")
            runner.run_stages(run.pipeline, [stage], options)
        except PartialResult:
            raise
        except RaeError as error:
            failed[run.name] = error
            options.console.say(f"{run.name}: failed: {error.message}")
            continue
        blocked, waits_since[run.name] = 0, time.monotonic()
        waiting.appendleft(run)
    if failed:
        told = "; ".join(f"{name}: {error.message}" for name, error in failed.items())
        raise PartialResult(f"{len(failed)} of {len(sweep.runs[index::count])} runs failed ({told})", options.command)


def _left_to_others(sweep: Sweep, run: Run, stage: Stage, share: tuple[int, int], since: float) -> bool:
    """Whether a stage that runs share is another share's to make, and that one is at work or may yet begin."""
    ref = _ref(run, stage)
    first = next(number for number, other in enumerate(sweep.runs) if _ref(other, stage) == ref)
    if first % share[1] == share[0]:
        return False
    return ref in leased(sweep.workspace.objects) or time.monotonic() - since < _OTHERS_BEGIN_WITHIN_S


def _ref(run: Run, stage: Stage) -> str | None:
    """`KIND/ID` of what a stage makes; None where that depends on what is not made yet, or it has no such stage."""
    try:
        return f"{stage.kind}/{recipe_id(run.pipeline.task(stage.name).recipe)}"
    except RaeError:
        return None


@dataclass(frozen=True)
class Piece:
    """What one stage makes for all the runs that share it."""

    stage: Stage
    runs: tuple[Run, ...]

    @property
    def run(self) -> Run:
        return self.runs[0]


def pieces(runs: Iterable[Run]) -> list[Piece]:
    """The work of a sweep, each piece once, in the order of the runs.

    Told from the settings alone, since recipes hold the ids of inputs that may not be made yet.
    """
    shared: dict[tuple[str, bytes], list[Run]] = {}
    stages: dict[tuple[str, bytes], Stage] = {}
    for run in runs:
        for stage in run.pipeline.stages:
            key = stage.name, canonical(_follows_from(run.pipeline, stage.name))
            shared.setdefault(key, []).append(run)
            stages[key] = stage
    return [Piece(stages[key], tuple(found)) for key, found in shared.items()]


def _follows_from(pipeline: Pipeline, name: str) -> Json:
    """Every setting that a stage's result follows from, by itself or by way of its inputs."""
    config = pipeline.config
    own: Json = {"section": _settings(getattr(config, name))}
    if name == "shards":
        return own
    own["shards"] = _settings(config.shards)
    if name == "encode":
        return own
    encode = config.encode.model_dump(mode="json") if config.encode is not None else {}
    encoder = {
        key: encode.get(key) for key in ("encoder", "weights", "feature_index", "image_size", "encoder_input_size")
    }
    match name:
        case "train_decoder":
            online = config.train_decoder is not None and config.train_decoder.feed == "online"
            return own | {"encode": encoder if online else _settings(config.encode)}
        case "train_dit":
            return own | {"encode": _settings(config.encode)}
        case "sample":
            inputs = ["train_decoder", "train_dit"]
        case _:
            inputs = ["train_decoder", *(["sample"] if config.sample is not None else [])]
    return own | {"encoder": encoder} | {one: _follows_from(pipeline, one) for one in inputs}


def _settings(section: object) -> Json:
    return section.model_dump(mode="json") if isinstance(section, Section) else {}
