"""Measuring side by side: every case once a round, in turn, so that a machine's moods meet all of them alike."""

import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path


def interleaved(
    cases: Mapping[str, Callable[[], object]],
    rounds: int = 5,
    prepare: Mapping[str, Callable[[], object]] | None = None,
) -> dict[str, float]:
    """Median seconds of each case over `rounds`, after one round that does not count.

    What `prepare` has under a case's name runs before it each time, and is not timed.
    """
    taken: dict[str, list[float]] = {name: [] for name in cases}
    for count in range(rounds + 1):
        for name, case in cases.items():
            if prepare is not None:
                prepare[name]()
            began = time.perf_counter()
            case()
            if count:
                taken[name].append(time.perf_counter() - began)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def drop_cache(paths: Iterable[Path]) -> None:
    """Ask the system to forget the pages of these files, which nobody may have mapped. Linux alone."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def table(title: str, header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table under its title."""
    lines = [list(header), ["---"] * len(list(header)), *([str(cell) for cell in row] for row in rows)]
    return "\n".join([f"\n**{title}**\n", *("| " + " | ".join(line) + " |" for line in lines)])
