"""One small pipeline that tests share: real digits through every stage, in seconds."""

import errno
import hashlib
import io
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import yaml

from loopback import S3, WebServer

TINY: dict[str, dict[str, Any]] = {
    "shards": {"train": "digits", "limit": 120, "val_fraction": 0.2, "samples_per_shard": 24},
    "encode": {
        "encoder": "efficientnet-lite0",
        "feature_index": 3,
        "image_size": 32,
        "encoder_input_size": 64,
        "horizontal_flip": False,
        "batch_size": 8,
        "rows_per_part": 8,
    },
    "train_decoder": {
        "steps": 6,
        "batch_size": 8,
        "hidden_size": 32,
        "depth": 1,
        "num_heads": 2,
        "intermediate_size": 64,
        "perceptual_loss": "none",
        "adversarial_loss": "none",
        "checkpoint_every": 2,
    },
    "train_dit": {
        "steps": 8,
        "batch_size": 8,
        "hidden_size": [32, 112],
        "depth": [1, 1],
        "num_heads": [2, 2],
        "checkpoint_every": 2,
    },
    "sample": {"num_images": 20, "num_steps": 4, "batch_size": 8},
    "evaluate": {
        "extractor": "efficientnet-lite0",
        "extractor_input_size": 32,
        "classifier": "pixels",
        "transfer_images": 20,
        "reconstructions": 8,
    },
}
_TIMED = ("metrics.jsonl", "checkpoint.json")
VERBS = ("encode", "train-decoder", "train-dit", "evaluate")


@dataclass(frozen=True)
class Ran:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """All of stdout as one JSON value."""
        return json.loads(self.out)

    def succeeded(self) -> "Ran":
        assert self.code == 0, f"exit code {self.code}\n{self.out}\n{self.err}"
        return self

    def refused(self, code: int, *words: str) -> "Ran":
        """Exit code and words of a refusal, which is never a traceback."""
        assert (self.code, "Traceback" in self.err) == (code, False), f"exit code {self.code}\n{self.out}\n{self.err}"
        for word in words:
            assert word in self.err, f"`{word}` is not in: {self.err}"
        return self


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute as processes of their own do here: with more threads, sums differ in their last bits."""
    import torch
    from threadpoolctl import threadpool_limits

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            yield
    finally:
        torch.set_num_threads(threads)


class Rae:
    """`rae` commands about the configuration file `config` in the workspace `workspace`, run in this process."""

    def __init__(self, folder: Path, sections: dict[str, Any] = TINY) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.sections = folder, sections
        self.workspace, self.config = folder / "workspace", folder / "tiny.yaml"
        self.config.write_text(yaml.safe_dump({"name": "tiny", **sections}))

    def __call__(self, *words: object) -> Ran:
        """Run `rae WORDS...`."""
        from rae.pipeline.cli import main

        out, err = io.StringIO(), io.StringIO()
        try:
            with (
                one_thread(),
                mock.patch.dict(os.environ, {"XDG_CACHE_HOME": str(self.folder / "cache")}),
                mock.patch("sys.argv", ["rae", *map(str, words)]),
                redirect_stdout(out),
                redirect_stderr(err),
            ):
                main()
            code = 0
        except SystemExit as done:
            code = int(done.code or 0)
        return Ran(code, out.getvalue(), err.getvalue())

    def verb(self, verb: str, *words: object) -> Ran:
        """Run `rae VERB CONFIG -w WORKSPACE WORDS...`."""
        return self(*self.words(verb, *words))

    def words(self, verb: str, *words: object) -> list[str]:
        return [verb, str(self.config), "-w", str(self.workspace), *map(str, words)]

    def artifact(self, ref: str) -> Any:
        """What `rae inspect REF --json` says."""
        return self("inspect", ref, "-w", self.workspace, "--json").succeeded().json

    def content(self, kind: str) -> str:
        content: str = self.artifact(f"{kind}/tiny")["content"]
        return content

    def payload(self, kind: str) -> dict[str, str]:
        """The sha256 of every file of the artifact named by the configuration, as found on the disk.

        Holds them against the manifest first. Without metrics.jsonl and checkpoint.json, which time what happened.
        """
        id = json.loads((self.workspace / "refs" / kind / "tiny.json").read_text())["id"]
        folder = self.workspace / "objects" / kind / id
        found = {}
        for entry in json.loads((folder / "manifest.json").read_text())["files"]:
            data = (folder / entry["path"]).read_bytes()
            digest = hashlib.sha256(data).hexdigest()
            assert (len(data), digest) == (entry["bytes"], entry["sha256"]), (
                f"{entry['path']} is not what was published"
            )
            found[re.sub(r"^attempts/\w+/", "", entry["path"])] = digest
        return {path: digest for path, digest in found.items() if Path(path).name not in _TIMED}

    def copy(self, folder: Path, *kinds: str) -> "Rae":
        """The same configuration in a workspace of its own that holds these kinds of artifacts already."""
        other = Rae(folder, self.sections)
        for part in ("objects", "refs"):
            for kind in kinds:
                shutil.copytree(self.workspace / part / kind, other.workspace / part / kind)
        return other


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Rae:
    """The small pipeline, run to its end. Shared by all tests: read it, or `copy` it."""
    rae = Rae(tmp_path_factory.mktemp("finished"))
    rae.verb("run").succeeded()
    return rae


@pytest.fixture
def rae(tmp_path: Path) -> Rae:
    """The small pipeline in an empty workspace."""
    return Rae(tmp_path / "rae")


@pytest.fixture
def rae_with(finished: Rae, tmp_path: Path) -> Callable[..., Rae]:
    """`rae_with("shards", "latents")`: the small pipeline in a workspace that holds these kinds already."""
    numbers = itertools.count()
    return lambda *kinds: finished.copy(tmp_path / f"rae-{next(numbers)}", *kinds)


class FullDisk:
    """Lets `room` flushes to the disk succeed, then has none left. `flushes` counts them all."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.room: int | None = None
        self.flushes = 0
        self._fsync = os.fsync
        monkeypatch.setattr(os, "fsync", self._flush)

    def _flush(self, handle: int) -> None:
        self.flushes += 1
        if self.room is not None and self.flushes > self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._fsync(handle)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> FullDisk:
    """The disk as this process sees it: set `room` to let it fill up, as a file system may tell when it flushes."""
    return FullDisk(monkeypatch)


class Running:
    """A `rae` command in a process of its own."""

    def __init__(self, server: "Warm", pid: int, files: tuple[Path, Path]) -> None:
        self.pid, self._server, self._files = pid, server, files

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def err(self) -> str:
        """Its stderr so far."""
        return self._files[1].read_text()

    def wait(self) -> Ran:
        code = self._server.ask(wait=self.pid)["code"]
        return Ran(code, *(path.read_text() for path in self._files))


class Warm:
    """Starts `rae` commands in processes that have torch loaded already; see warm.py."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._count = folder, 0
        script = Path(__file__).with_name("warm.py")
        # One thread: kernels sum in another order with more, and a machine under test has better uses for them.
        environment = os.environ | {"OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(folder / "cache")}
        self._process = subprocess.Popen(
            [sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"

    def ask(self, **request: object) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def start(self, words: list[str]) -> Running:
        self._count += 1
        files = self._folder / f"{self._count}.out", self._folder / f"{self._count}.err"
        for path in files:
            path.touch()  # a process may be killed before it opens them
        return Running(self, self.ask(words=words, output=str(files[0]), errors=str(files[1]))["pid"], files)

    def close(self) -> None:
        self._process.communicate(timeout=60)


@pytest.fixture(scope="session")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warm]:
    """Starts commands in processes of their own, to be signalled and killed: `warm.start(rae.words("encode"))`."""
    server = Warm(tmp_path_factory.mktemp("warm"))
    yield server
    server.close()


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3]:
    server = S3()
    yield server
    server.close()


@pytest.fixture
def s3(s3_server: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> S3:
    """An S3 server on loopback, with its credentials in the environment and an empty cache of this test's own."""
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    s3_server.cache = tmp_path / "cache"
    monkeypatch.setenv("RAE_CACHE", str(s3_server.cache))
    return s3_server


@pytest.fixture
def web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WebServer]:
    """A web server on loopback for the files of an empty folder, and an empty cache of this test's own."""
    monkeypatch.setenv("RAE_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "web"
    folder.mkdir()
    server = WebServer(folder)
    yield server
    server.close()
