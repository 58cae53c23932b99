"""Runs `rae` commands in processes of their own, without each of them waiting for torch to load.

`python tests/warm.py` imports what the stages need, then forks a process for each command that it reads on stdin as a
line of JSON, and answers with a line of JSON. It computes nothing itself, so every process starts alike.
"""

import json
import os
import signal
import sys


def main() -> None:
    # What the commands would import.
    import sklearn.svm  # noqa: F401
    import timm  # noqa: F401
    import torchmetrics  # noqa: F401

    from rae.pipeline import report  # noqa: F401
    from rae.stages import encode, evaluate, sample, train_decoder, train_dit  # noqa: F401

    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            _, status = os.waitpid(request["wait"], 0)
            answer = {"code": os.waitstatus_to_exitcode(status)}
        else:
            answer = {"pid": start(**request)}
        print(json.dumps(answer), flush=True)


def start(words: list[str], output: str, errors: str) -> int:
    """Fork a process that is `rae WORDS...`, with stdout and stderr in files."""
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for stream, path in ((1, output), (2, errors)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), stream)
        os.close(0)
        sys.argv = ["rae", *words]
        code = run()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def run() -> int:
    """The exit code of the `rae` command in `sys.argv`, as the interpreter would give it."""
    import traceback

    from rae.pipeline.cli import main as rae

    try:
        rae()
    except SystemExit as done:
        return done.code if isinstance(done.code, int) else int(done.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    main()
