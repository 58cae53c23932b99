"""What a person sees: a progress bar on a terminal, timed lines elsewhere, JSON for a program."""

import json
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rae.stages.job import Progress, silent
from rae.store.manifest import Artifact

_SECONDS_BETWEEN_LINES = 10.0
# The metrics that a line about an artifact shows, in this order, where it has them.
_HEADLINES = (
    "rows",
    "val_rows",
    "images",
    "invalid_rows",
    "steps",
    "loss",
    "psnr_db",
    "reconstruction_psnr_db",
    "class_agreement",
    "transfer_accuracy",
    "precision",
    "recall",
    "frechet_distance",
)


class Console:
    """Says what happens; with `as_json` it speaks on stderr, so that stdout holds JSON alone."""

    def __init__(self, quiet: bool = False, as_json: bool = False) -> None:
        self.quiet = quiet
        self.as_json = as_json
        self._stream = sys.stderr if as_json else sys.stdout

    def say(self, text: str) -> None:
        if not self.quiet:
            print(text, file=self._stream, flush=True)

    def print_json(self, value: Any) -> None:
        print(json.dumps(value, allow_nan=False), flush=True)

    def begins(self, verb: str) -> None:
        self.say(f"{verb}: begins")

    def reused(self, verb: str, artifact: Artifact) -> None:
        self.say(f"{verb}: already done, {artifact.kind}/{artifact.id}")

    def done(self, verb: str, artifact: Artifact) -> None:
        metrics = artifact.manifest.metrics
        parts = [f"{key} {number(metrics[key])}" for key in _HEADLINES if key in metrics]
        seconds = duration(metrics["seconds"])
        self.say(f"{verb}: done in {seconds}, {artifact.kind}/{artifact.id}" + "".join(f"  {part}" for part in parts))

    @contextmanager
    def progress(self, verb: str) -> Iterator[Progress]:
        """A `Progress` for one stage's run."""
        if self.quiet:
            yield silent
        elif self._stream.isatty():
            with _bar(verb, self._stream) as progress:
                yield progress
        else:
            yield _Lines(verb, self.say)

    def table(self, title: str, columns: list[str], rows: list[list[str]]) -> None:
        """A table; plain columns where there is no terminal, so that it can be piped."""
        from rich.console import Console as RichConsole
        from rich.table import Table

        table = Table(title=title, title_justify="left", box=None, pad_edge=False)
        for column in columns:
            table.add_column(column, overflow="fold")
        for row in rows:
            table.add_row(*row)
        RichConsole(file=self._stream, width=None if self._stream.isatty() else 160, markup=False).print(table)


class _Lines:
    """A line every ten seconds, for logs."""

    def __init__(self, verb: str, say: Any) -> None:
        self._verb, self._say = verb, say
        self._began = self._last = time.monotonic()
        self._first: int | None = None

    def __call__(self, done: int, total: int, unit: str, **numbers: float) -> None:
        if self._first is None:
            self._first = done
        now = time.monotonic()
        if now - self._last < _SECONDS_BETWEEN_LINES:
            return
        self._last = now
        rate = (done - self._first) / (now - self._began)
        left = f", {duration((total - done) / rate)} left" if rate > 0 else ""
        shown = "".join(f"  {key} {number(value)}" for key, value in numbers.items())
        self._say(f"{self._verb}: {done}/{total} {unit}{shown}{left}")


@contextmanager
def _bar(verb: str, stream: Any) -> Iterator[Progress]:
    from rich.console import Console as RichConsole
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[unit]}"))
    more = (TimeRemainingColumn(), TextColumn("{task.fields[numbers]}"))
    with RichProgress(*columns, *more, console=RichConsole(file=stream)) as bars:
        task = bars.add_task(verb, total=None, unit="", numbers="")

        def progress(done: int, total: int, unit: str, **numbers: float) -> None:
            shown = "  ".join(f"{key} {number(value)}" for key, value in numbers.items())
            bars.update(task, completed=done, total=total, unit=unit, numbers=shown)

        yield progress


def number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else f"{value}"


def duration(seconds: float) -> str:
    """`8 s`, `3 min 20 s`, `5 h 12 min`, `9 d 4 h`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    for unit, size, below, small in (("min", 60, "s", 1), ("h", 3600, "min", 60), ("d", 86400, "h", 3600)):
        if whole < size * {"min": 60, "h": 24, "d": 10**9}[unit]:
            return f"{whole // size} {unit} {whole % size // small} {below}"
    raise AssertionError("unreachable: a day's branch has no upper bound")


def size(count: int) -> str:
    """Bytes as a person reads them, in powers of ten as disks are sold."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"


def log_to(stream_name: str, quiet: bool) -> None:
    """Send `rae`'s own log records, warnings and worse when quiet, to a standard stream."""
    handler = logging.StreamHandler(getattr(sys, stream_name))
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    logger = logging.getLogger("rae")
    logger.handlers[:] = [handler]
    logger.setLevel(logging.ERROR if quiet else logging.INFO)
