"""Is it done? -> run -> verify -> publish."""

import errno
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from rae.pipeline import config as configuration
from rae.pipeline import runner
from rae.pipeline.console import Console
from rae.pipeline.plan import STAGES, Pipeline, Stage, Task
from rae.pipeline.runner import Options
from rae.pipeline.stopping import explained
from rae.stages.job import Job, Result
from rae.store.artifacts import Workspace
from rae.store.errors import ConfigError, CorruptData, Interrupted, MissingInput, PartialResult, RaeError
from tests.conftest import Rae

OPTIONS = Options(device="cpu", console=Console(quiet=True), command="rae run mine")
Work = Callable[[Job], Result]


class Made(Pipeline):
    """A pipeline of one stage whose work is given."""

    def __init__(self, root: Path, work: Work, **config: object) -> None:
        super().__init__(configuration.load("quickstart"), Workspace(root), ["quickstart"])
        self.work, self.recipe = work, {"kind": "dit", "config": {"train_dit": config}, "inputs": {}}

    def task(self, name: str) -> Task:
        return Task(STAGES[name], self.recipe, {}, self.work)


def writes(data: bytes = b"weights", *, then: Callable[[Job], None] = lambda job: None) -> Work:
    def work(job: Job) -> Result:
        path = job.folder / "ema.safetensors"
        path.write_bytes(data)
        then(job)
        return Result("c" * 64, {"loss": 0.5}, (path,))

    return work


def run(pipeline: Pipeline, options: Options = OPTIONS, stage: Stage = STAGES["train_dit"]) -> runner.Outcome:
    return runner.run_stage(pipeline, stage, options)


def test_what_a_stage_makes_is_described_and_published(tmp_path: Path) -> None:
    outcome = run(Made(tmp_path, writes()))
    manifest = outcome.artifact.manifest
    assert not outcome.reused
    assert (manifest.kind, manifest.name, manifest.content) == ("dit", "quickstart", "c" * 64)
    assert manifest.metrics["loss"] == 0.5
    assert manifest.metrics["seconds"] >= 0
    (entry,) = manifest.files
    assert entry["path"].startswith("attempts/")
    assert entry["path"].endswith("/ema.safetensors")
    digest = hashlib.sha256(b"weights").hexdigest()
    assert (entry["bytes"], entry["sha256"]) == (7, digest)
    assert {"created", "command", "rae", "python", "platform", "device", "torch", "threads"} <= set(manifest.provenance)
    assert manifest.provenance["command"] == "rae run mine"
    assert json.loads(json.dumps(outcome.to_json()))["path"] == str(outcome.artifact.folder)


def test_what_is_done_is_not_done_again(tmp_path: Path) -> None:
    def fail(job: Job) -> Result:
        raise AssertionError("ran although it was done")

    first = run(Made(tmp_path, writes()))
    again = run(Made(tmp_path, fail))
    assert again.reused
    assert again.artifact == first.artifact
    assert not run(Made(tmp_path, writes(), lr=2.0)).reused


def test_a_name_follows_what_was_asked_for_last(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    first = run(Made(tmp_path, writes()))
    second = run(Made(tmp_path, writes(), lr=2.0))
    assert workspace.resolve("dit/quickstart") == second.artifact
    run(Made(tmp_path, writes()))
    assert workspace.resolve("dit/quickstart") == first.artifact


def test_a_file_that_is_claimed_and_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CorruptData, match="said it wrote"):
        run(Made(tmp_path, lambda job: Result("c" * 64, {}, (job.folder / "nothing",))))
    assert not list(tmp_path.glob("objects/dit/*"))


def test_the_next_attempt_sees_what_a_failed_one_left(tmp_path: Path) -> None:
    def fail(job: Job) -> None:
        raise CorruptData("a bad step")

    seen: list[tuple[Path, ...]] = []
    with pytest.raises(CorruptData, match="a bad step"):
        run(Made(tmp_path, writes(then=fail)))
    assert not list(tmp_path.glob("objects/dit/*/manifest.json"))
    run(Made(tmp_path, writes(then=lambda job: seen.append(job.earlier))))
    ((earlier,),) = seen
    assert (earlier / "ema.safetensors").read_bytes() == b"weights"


@pytest.mark.parametrize("error", [ConfigError("a label"), MissingInput("a file"), CorruptData("a byte"), ValueError()])
def test_a_failure_that_left_nothing_leaves_nothing_behind(error: Exception, tmp_path: Path) -> None:
    def fail(job: Job) -> Result:
        raise error

    with pytest.raises(type(error)):
        run(Made(tmp_path, fail))
    assert not list(tmp_path.glob("objects/dit/*"))
    assert not run(Made(tmp_path, writes(), lr=2.0)).reused  # nothing unfinished is in the way


def test_whoever_publishes_second_adopts_the_first(tmp_path: Path) -> None:
    def meanwhile(job: Job) -> None:
        run(Made(tmp_path, writes(b"theirs")))

    outcome = run(Made(tmp_path, writes(b"ours", then=meanwhile)))
    assert (outcome.artifact.payload / "ema.safetensors").read_bytes() == b"theirs"


@pytest.mark.parametrize(
    ("code", "kind", "words"),
    [
        (errno.ENOSPC, PartialResult, "no room for /x/y (No space left on device)"),
        (errno.EDQUOT, PartialResult, "no room for /x/y"),
        (errno.EFBIG, PartialResult, "no room for /x/y"),
        (errno.EACCES, MissingInput, "/x/y can't be read or written (Permission denied)"),
        (errno.EROFS, MissingInput, "/x/y can't be read or written"),
        (errno.ENOTDIR, MissingInput, "/x/y can't be read or written"),
    ],
)
def test_refusals_of_the_system_are_explained(code: int, kind: type[RaeError], words: str, tmp_path: Path) -> None:
    def fail(job: Job) -> None:
        raise OSError(code, os.strerror(code), "/x/y")

    with pytest.raises(kind) as refusal:
        run(Made(tmp_path, writes(then=fail)))
    assert words in refusal.value.message
    assert refusal.value.next_command == ("rae run mine" if kind is PartialResult else None)


def test_an_error_that_nobody_can_help_stays_what_it_is(tmp_path: Path) -> None:
    error = OSError("a decoder's own trouble")

    def fail(job: Job) -> None:
        raise error

    with pytest.raises(OSError, match="own trouble") as raised:
        run(Made(tmp_path, writes(then=fail)))
    assert raised.value is error
    assert explained(error, "") is None


@pytest.mark.parametrize("kind", [PartialResult, Interrupted])
def test_whatever_is_partial_says_how_to_go_on(kind: type[PartialResult], tmp_path: Path) -> None:
    def stop(job: Job) -> None:
        raise kind("stopped at step 3", "df -h")

    with pytest.raises(kind) as stopped:
        run(Made(tmp_path, writes(then=stop)))
    assert (stopped.value.message, stopped.value.next_command) == ("stopped at step 3", "rae run mine")


def test_between_takes_names_of_verbs_and_sections() -> None:
    pipeline = Pipeline(configuration.load("quickstart"), Workspace("none"), ["quickstart"])

    def names(first: str | None, last: str | None) -> list[str]:
        return [stage.name for stage in runner.between(pipeline, first, last)]

    assert names(None, None) == list(STAGES)
    assert names("train-decoder", "train_dit") == ["train_decoder", "train_dit"]
    assert names("evaluate", None) == ["evaluate"]
    with pytest.raises(ConfigError, match="`--from evaluate` comes after `--to encode`"):
        names("evaluate", "encode")
    with pytest.raises(ConfigError, match="`enc` is not a stage of `quickstart`; its stages are shards, encode"):
        names("enc", None)


def test_a_verb_runs_the_cheap_preparation_that_it_needs(rae: Rae) -> None:
    assert [line.split(":")[0] for line in rae.verb("encode").succeeded().out.splitlines() if "begins" in line] == [
        "shards",
        "encode",
    ]


def test_stages_can_be_run_in_two_goes(rae: Rae, finished: Rae) -> None:
    rae.verb("run", "--to", "encode", "--quiet").succeeded()
    rae.verb("run", "--from", "train-dit", "--to", "train-dit", "--quiet").succeeded()
    assert rae.content("dit") == finished.content("dit")
    assert not (rae.workspace / "objects" / "decoder").exists()
    rae.verb("run", "--from", "sample").refused(3, "next: rae train-decoder")


def test_the_next_command_of_a_stage_names_the_configuration(tmp_path: Path) -> None:
    def refuse(job: Job) -> Result:
        raise MissingInput("it is not there", "rae train-dit CONFIG -s a=b")

    with pytest.raises(MissingInput) as refusal:
        run(Made(tmp_path, refuse))
    assert refusal.value.next_command == f"rae train-dit quickstart -w {tmp_path} -s a=b"
