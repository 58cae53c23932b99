"""Says which rank is stuck, and where: ranks that wait for one another hang without a word."""

import faulthandler
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from rae.stages.training.ranks import Ranks


class Watchdog:
    """What is watched has begun with `step`; None while nothing is."""

    def __init__(self, rank: str, seconds: float) -> None:
        self._rank, self._seconds = rank, seconds
        self._step: int | None = None
        self._main = threading.get_ident()
        self._begun = threading.Condition()
        self._ended = False
        self._reports = 0

    def at(self, step: int | None) -> None:
        """Step `step`, counted from 1, begins; with None, something that may take any time."""
        with self._begun:
            self._step = step
            self._begun.notify()

    def end(self) -> None:
        """Watch no longer."""
        with self._begun:
            self._ended = True
            self._begun.notify()

    def watch(self) -> None:
        """Report whenever nothing has begun for so many seconds; ends with `end`."""
        with self._begun:
            while not self._ended:
                if self._begun.wait(self._seconds):
                    self._reports = 0
                elif self._step is not None:
                    self._reports += 1
                    self._report(self._step)

    def _report(self, step: int) -> None:
        frame = sys._current_frames().get(self._main)
        stack = traceback.extract_stack(frame)
        ours = [at for at in stack if "/stages/" in at.filename] or list(stack)
        where = f"{ours[-1].filename}:{ours[-1].lineno}, `{ours[-1].line}`" if ours else "no place known"
        print(
            f"\nrae: {self._rank} has been in step {step} for {self._reports * self._seconds:g} s, at {where}."
            " It goes on waiting. If other ranks wait in a communication and one does not, that one is stuck.",
            file=sys.stderr,
            flush=True,
        )
        if sys.__stderr__ is not None:
            faulthandler.dump_traceback(sys.__stderr__, all_threads=True)


@contextmanager
def watched(ranks: Ranks, seconds: float) -> Iterator[Watchdog]:
    """Within the block, a step that takes longer than `seconds` is reported on stderr, again and again."""
    watchdog = Watchdog(f"rank {ranks.rank} of {ranks.world_size}", seconds)
    thread = threading.Thread(target=watchdog.watch, name="rae-watchdog", daemon=True)
    thread.start()
    try:
        yield watchdog
    finally:
        watchdog.end()
        thread.join()
