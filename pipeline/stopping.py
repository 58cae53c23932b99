"""Ctrl-C, SIGTERM and SIGUSR1: a stage stops where nothing is lost, a second signal stops at once.

What is published is whole whenever a process ends; stopping gently only saves the work since the last checkpoint.
"""

import errno
import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from rae.pipeline.launch import is_main
from rae.store.errors import Interrupted, MissingInput, PartialResult, RaeError

_REFUSALS = {
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.EMFILE,
}

_ASKED = b"\nrae: stops as soon as nothing is lost; the next signal stops at once\n"
# SIGUSR1 is what a batch system is told to send ahead of its limit: torchrun passes SIGTERM on, which ranks would get
# twice, and kills them half a minute later.
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Stopped(BaseException):
    """A signal came where nothing listens for one. Not an `Exception`, so that no handler of failures swallows it."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def again() -> str:
    """The command that runs now: the one that continues it."""
    processes = os.environ.get("LOCAL_WORLD_SIZE", "1")
    launcher = ["rae"] if processes == "1" else ["torchrun", "--nproc-per-node", processes, "-m", "rae.pipeline.cli"]
    return shlex.join([*launcher, *sys.argv[1:]])


def as_error(number: int, command: str) -> PartialResult:
    """What a signal means to a person."""
    if number == signal.SIGINT:
        return Interrupted("interrupted; what is done is kept", command)
    return PartialResult(f"stopped by {signal.Signals(number).name}; what is done is kept", command)


class Request:
    """Which signal asks a stage to stop, if any."""

    def __init__(self, command: str) -> None:
        self.signal: int | None = None
        self._command = command

    def __bool__(self) -> bool:
        return self.signal is not None

    def check(self) -> None:
        """Raise `Interrupted` or `PartialResult` if a stop is asked for."""
        if self.signal is not None:
            raise as_error(self.signal, self._command)


@contextmanager
def raised() -> Iterator[None]:
    """Within the block, any of the signals raises `Stopped`."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped(number)

    with _handled(stop):
        yield


@contextmanager
def requested(command: str) -> Iterator[Request]:
    """Within the block, the first signal is a request; the second does what it did before the block."""
    request = Request(command)

    def ask(number: int, frame: FrameType | None) -> None:
        request.signal = number
        if is_main():
            os.write(2, _ASKED)  # not `print`, which may be at work
        restore()

    with _handled(ask) as restore:
        yield request


@contextmanager
def _handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[Callable[[], None]]:
    """All signals go to `handler` until the block ends or the function that it yields is called."""
    if threading.current_thread() is not threading.main_thread():  # of a notebook's worker, say: no signals arrive
        yield lambda: None
        return
    before = {number: signal.getsignal(number) for number in _SIGNALS}

    def restore() -> None:
        for number, earlier in before.items():
            signal.signal(number, earlier)

    for number in _SIGNALS:
        signal.signal(number, handler)
    try:
        yield restore
    finally:
        restore()


def explained(error: OSError, command: str) -> RaeError | None:
    """An operating system's error in a person's words, if a person can do something about it."""
    where = error.filename or "a file"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return PartialResult(f"no room for {where} ({error.strerror}); what is done is kept: free some", command)
    if error.errno in _REFUSALS:
        return MissingInput(f"{where} can't be read or written ({error.strerror})")
    return None
