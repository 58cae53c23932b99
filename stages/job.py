"""What a stage is handed besides its configuration and inputs, and what it hands back."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol


class Spread(Protocol):
    """Has other processes do units of a stage's work, by their numbers, in any order.

    Calls `done` with the number of each one that is done. Returns early, some undone, once `stopping` says so.
    """

    def __call__(self, numbers: Sequence[int], done: Callable[[int], None], stopping: Callable[[], bool]) -> None: ...


class Progress(Protocol):
    """Told how far a stage is; `numbers` are what a person wants to see move (loss, images per second)."""

    def __call__(self, done: int, total: int, unit: str, **numbers: float) -> None: ...


class Publish(Protocol):
    """Publishes a training's step `step` as an artifact; `write` puts the payload into the folder that it is given.

    With `alias` it is called NAME-`alias`, too, from now on.
    """

    def __call__(self, step: int, write: "Callable[[Path], Result]", alias: str | None = None) -> None: ...


def silent(done: int, total: int, unit: str, **numbers: float) -> None:
    """A `Progress` that says nothing."""


def never() -> None:
    """A `check_stop` that never stops."""


@dataclass(frozen=True)
class Beginning:
    """Where a training begins, if not anew: a model's payload for its weights, or a finished run's last checkpoint."""

    init_from: Path | None = None
    checkpoint: Path | None = None


@dataclass(frozen=True)
class Observed:
    """What those who watch a training are told: its name, like `dit/mine`, and its settings.

    What they write goes into `folder`, which belongs to no artifact. `profile_steps` steps are to be profiled.
    """

    name: str
    settings: dict[str, Any]
    folder: Path
    profile_steps: int = 0


@dataclass(frozen=True)
class Job:
    """One attempt at a stage's work.

    `folder` is this attempt's own and holds its payload. `earlier` are unfinished attempts at the same recipe, the
    newest first: a stage takes over what is valid in them. `check_stop` is called where the stage could stop without
    losing anything; it raises `Interrupted` or `PartialResult` after Ctrl-C or SIGTERM, so a trainer calls it right
    after saving. `stopping` says beforehand whether that is about to happen. `share` is (i, n): of the units of work
    that can be done apart, those whose number is i modulo n are its own. `spread` has others do them, if they are to.
    `milestones` are the steps of a training that are to be published, by `publish`, and are not yet.
    `observed` is what those who watch a training are told.
    """

    folder: Path
    earlier: tuple[Path, ...] = ()
    progress: Progress = silent
    stopping: Callable[[], bool] = lambda: False
    check_stop: Callable[[], None] = never
    device: str = "cpu"
    share: tuple[int, int] = (0, 1)
    spread: Spread | None = None
    milestones: frozenset[int] = frozenset()
    publish: Publish | None = None
    observed: Observed | None = None


@dataclass(frozen=True)
class Result:
    """What a stage made: `content` is its logical digest (see DESIGN of artifacts), `files` its payload.

    `provenance` is what else a reader of the manifest may want to know of how it came to be.
    """

    content: str
    metrics: dict[str, Any]
    files: tuple[Path, ...] = field(default=())
    provenance: dict[str, Any] = field(default_factory=dict)


# What ranks other than the first hand back: the first describes what all of them made.
NOTHING = Result("", {})
