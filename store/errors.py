"""Every way in which `rae` can refuse, with the exit code a shell sees.

A message is one sentence for a person: what is wrong and where. `next_command` is what to type next.
"""


class RaeError(Exception):
    """A failure that a person can act on; shown without a traceback."""

    exit_code = 1

    def __init__(self, message: str, next_command: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.next_command = next_command


class ConfigError(RaeError):
    """Usage or configuration is wrong (exit code 2)."""

    exit_code = 2


class MissingInput(RaeError):
    """A file, a shard or an artifact that the command needs is not there (exit code 3)."""

    exit_code = 3


class StaleInput(RaeError):
    """An input exists but was made by something else than what is asked for (exit code 4)."""

    exit_code = 4


class CorruptData(RaeError):
    """Stored data does not match its digest, or cannot be read (exit code 5)."""

    exit_code = 5


class PartialResult(RaeError):
    """The work stopped before its end and can be continued (exit code 6)."""

    exit_code = 6


class Overtaken(PartialResult):
    """Others had made some of the work, otherwise, and were first: theirs is taken, and the rest is to be done anew."""


class OthersAtWork(RaeError):
    """This process has done its share, and others have not: no failure, but nothing is published yet (exit code 0)."""

    exit_code = 0

    def __init__(self, remaining: int, total: int, next_command: str | None = None) -> None:
        super().__init__(f"this share is done; {remaining} of {total} parts are still missing", next_command)
        self.remaining, self.total = remaining, total


class Interrupted(PartialResult):
    """Ctrl-C: stopped by the person at the keyboard; can be continued (exit code 130)."""

    exit_code = 130
