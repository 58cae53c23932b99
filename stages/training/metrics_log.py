"""The numbers of a training, one JSON object a line, and the running means that they are made of."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from rae.stages.training.trackers import Trackers
from rae.store.errors import CorruptData
from rae.store.publish import replace_bytes


class MetricsLog:
    """`FOLDER/metrics.jsonl`. Every line has a `step`; what is not finite is written as null, since JSON has no NaN.

    `trackers` are told the same numbers.
    """

    def __init__(
        self, folder: Path, step: int = 0, earlier: Path | None = None, trackers: Trackers | None = None
    ) -> None:
        """Begin at `step`, with the lines up to there that the attempt `earlier` (default: this one) has left."""
        self.trackers = trackers or Trackers({})
        self.path = folder / "metrics.jsonl"
        left = (earlier or folder) / self.path.name
        lines = [line for line in read(left) if line["step"] <= step] if left.exists() else []
        folder.mkdir(parents=True, exist_ok=True)
        replace_bytes(self.path, "".join(map(_line, lines)).encode())

    def log(self, *, step: int, **numbers: float | str) -> None:
        """Append a line, of numbers or words; another process sees it at once, and a kill does not lose it."""
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(_line({"step": step, **numbers}))
        self.trackers.numbers(step, {name: value for name, value in numbers.items() if not isinstance(value, str)})


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a log, oldest first, without a last one cut short by a crash; `CorruptData` otherwise."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
    try:
        values = [json.loads(line) for line in lines]
    except ValueError as error:
        raise CorruptData(f"{path} is not a log of JSON lines ({error})") from error
    if not all(isinstance(value, dict) and isinstance(value.get("step"), int) for value in values):
        raise CorruptData(f"{path} has a line without a step")
    return values


def _line(values: Mapping[str, float | str | None]) -> str:
    plain = {key: value if isinstance(value, str) else _finite(value) for key, value in values.items()}
    return json.dumps(plain, allow_nan=False) + "\n"


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


@dataclass
class Span:
    """So many steps, what they took, and how much of that was waiting for data."""

    steps: int = 0
    seconds: float = 0.0
    data_wait_seconds: float = 0.0

    def add(self, seconds: float, data_wait_seconds: float) -> None:
        """Count one step."""
        self.steps += 1
        self.seconds += seconds
        self.data_wait_seconds += data_wait_seconds

    @property
    def data_wait(self) -> float:
        """The share of the time that was spent waiting for data."""
        return self.data_wait_seconds / self.seconds if self.seconds else 0.0

    def per_second(self, per_step: int) -> float:
        """Rate of something that happens `per_step` times a step."""
        return self.steps * per_step / self.seconds if self.seconds else 0.0


@dataclass
class Meter:
    """What a run has cost so far, and its numbers since the last line of the log. Travels in checkpoints.

    Sums of tensors stay on their device until somebody asks for a mean: a step does not wait for its own numbers.
    `learnt` steps are in the sums; `skipped` are all those, counted from 1, that came to nothing.
    """

    run: Span = field(default_factory=Span)
    window: Span = field(default_factory=Span)
    sums: dict[str, float | Tensor] = field(default_factory=dict)
    learnt: int = 0
    latest: dict[str, float] = field(default_factory=dict)
    skipped: list[int] = field(default_factory=list)

    def add(self, numbers: Mapping[str, float | Tensor], seconds: float, data_wait_seconds: float) -> None:
        """Count one step; one that came to nothing has no numbers."""
        self.run.add(seconds, data_wait_seconds)
        self.window.add(seconds, data_wait_seconds)
        self.learnt += bool(numbers)
        for name, number in numbers.items():
            self.sums[name] = self.sums.get(name, 0.0) + number

    def close_window(self) -> None:
        """Turn the sums into means, kept as `latest` where there are any, and begin anew."""
        if self.learnt:
            self.latest = {name: float(total) / self.learnt for name, total in self.sums.items()}
        self.window, self.sums, self.learnt = Span(), {}, 0

    def to_json(self) -> dict[str, Any]:
        """For a checkpoint's state; what is not finite is null."""
        values = asdict(self)
        for part in ("sums", "latest"):
            values[part] = {name: _finite(float(value)) for name, value in values[part].items()}
        return values

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """What `to_json` gave."""
        numbers = {
            part: {name: math.nan if value is None else value for name, value in values[part].items()}
            for part in ("sums", "latest")
        }
        run, window = Span(**values["run"]), Span(**values["window"])
        learnt, skipped = values.get("learnt", window.steps), values.get("skipped", [])
        return cls(run, window, numbers["sums"], learnt, numbers["latest"], skipped)
