"""Milestones, runs that go on, runs that begin with weights, and samples of runs that have not ended."""

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import rae as api
from rae.store.artifacts import Workspace
from rae.store.errors import MissingInput
from tests.conftest import TINY, Rae, Warm
from tests.pipeline.interchange.released import Release

WITH = Callable[..., Rae]


def settings(**values: object) -> list[str]:
    return [word for key, value in values.items() for word in ("-s", f"{key.replace('__', '.')}={value}")]


@pytest.fixture(scope="module")
def milestones(finished: Rae, tmp_path_factory: pytest.TempPathFactory) -> Rae:
    """The small pipeline with a transformer that published steps 3 and 4 of 8. Shared: read it, or `copy` it."""
    rae = finished.copy(tmp_path_factory.mktemp("milestones"), "shards", "latents", "decoder")
    rae.verb("train-dit", *settings(train_dit__publish_at="[3,4]")).succeeded()
    return rae


def test_milestones_change_nothing_of_the_run_and_say_whose_they_are(finished: Rae, milestones: Rae) -> None:
    whole, run = finished.artifact("dit/tiny"), milestones.artifact("dit/tiny")
    assert (run["id"], run["content"]) == (whole["id"], whole["content"])
    early = milestones.artifact("dit/tiny@step=3")
    assert early["recipe"] == {**run["recipe"], "milestone": {"run": run["id"], "step": 3}}
    assert (early["kind"], early["name"], early["metrics"]["steps"]) == ("dit", "tiny@step=3", 3)
    assert early["inputs"] == run["inputs"]
    assert early["content"] != milestones.artifact("tiny@step=4")["content"] != run["content"]
    assert milestones.artifact(f"dit/{run['id']}@step=8")["id"] == run["id"]
    assert milestones.artifact(f"{run['path']}@step=3")["id"] == early["id"]
    milestones("verify", "dit/tiny@step=3", "-w", milestones.workspace).succeeded()
    dit = api.load_dit("tiny@step=3", workspace=str(milestones.workspace), weights="model")
    assert dit.num_classes == 10


def test_a_milestone_is_what_a_shorter_run_would_have_ended_with(milestones: Rae, rae_with: WITH) -> None:
    short = rae_with("shards", "latents")
    short.verb("train-dit", *settings(train_dit__steps=3)).succeeded()
    assert short.content("dit") == milestones.artifact("dit/tiny@step=3")["content"]


def test_a_milestone_that_is_not_there_is_named_with_those_that_are(milestones: Rae, finished: Rae) -> None:
    where = ("-w", milestones.workspace)
    milestones("inspect", "dit/tiny@step=5", *where).refused(3, "nothing at step 5; there are steps 3, 4")
    finished("inspect", "dit/tiny@step=5", "-w", finished.workspace).refused(3, "train_dit.publish_at")
    milestones("inspect", "dit/other@step=3", *where).refused(3, "no artifact `dit/other@step=3`")


def test_milestones_that_no_step_reaches_are_refused(rae_with: WITH) -> None:
    rae = rae_with("shards", "latents")
    rae.verb("train-dit", *settings(train_dit__publish_at="[9]")).refused(2, "step 9", "ends with step 8")
    by_epoch = settings(train_dit__publish_at="[99]", train_dit__epochs=1, train_dit__steps="null")
    rae.verb("train-dit", *by_epoch).refused(2, "`publish_at` asks for step 99")
    assert not list(rae.workspace.glob("objects/dit/*"))


def test_a_finished_run_says_which_milestones_it_lacks(rae_with: WITH) -> None:
    rae = rae_with("shards", "latents", "dit")
    ran = rae.verb("train-dit", *settings(train_dit__publish_at="[3,8]")).succeeded()
    assert "published nothing at step 3," in ran.out


@pytest.mark.parametrize("verb", ["train-dit", "train-decoder"])
def test_a_killed_run_publishes_each_milestone_once_and_the_same(verb: str, rae_with: WITH, warm: Warm) -> None:
    section, kind = verb.replace("-", "_"), verb.removeprefix("train-")
    words = settings(
        **{
            f"{section}__{key}": value
            for key, value in (("steps", 40), ("checkpoint_every", 4), ("publish_at", [2, 21]))
        }
    )
    rae, whole = rae_with("shards", "latents"), rae_with("shards", "latents")
    whole.verb(verb, *words).succeeded()
    for published in (1, 2):
        running = warm.start(rae.words(verb, *words))
        while len(list(rae.workspace.glob(f"objects/{kind}/*/manifest.json"))) < published:
            time.sleep(0.005)
        running.signal(signal.SIGKILL)
        running.wait()
    rae.verb(verb, *words).succeeded()
    for step in (2, 21):
        again, expected = (one.artifact(f"{kind}/tiny@step={step}") for one in (rae, whole))
        assert (again["id"], again["content"]) == (expected["id"], expected["content"])
    assert rae.content(kind) == whole.content(kind)
    assert len(list(rae.workspace.glob(f"objects/{kind}/*/manifest.json"))) == 3


def test_a_passed_milestone_that_is_asked_for_late_is_refused_at_once(rae_with: WITH, warm: Warm) -> None:
    rae = rae_with("shards", "latents")
    unfinished(rae, warm)
    rae.verb("train-dit", *LONG, *settings(train_dit__publish_at="[1]")).refused(
        2, "step 1 can't be published any more"
    )


LONG = settings(train_dit__steps=60)


def unfinished(rae: Rae, warm: Warm) -> list[int]:
    """Kill a long training once it has saved two checkpoints; returns their steps."""
    saved = "objects/dit/*/attempts/*/checkpoints/step-*/checkpoint.json"
    running = warm.start(rae.words("train-dit", *LONG))
    while len(list(rae.workspace.glob(saved))) < 2:
        time.sleep(0.005)
    running.signal(signal.SIGKILL)
    assert running.wait().code == -signal.SIGKILL
    return sorted(int(path.parent.name[5:]) for path in rae.workspace.glob(saved))


def test_a_milestone_of_the_run_itself_guides_its_samples(rae_with: WITH, milestones: Rae) -> None:
    rae = rae_with("shards", "latents", "decoder")
    words = settings(sample__guide="step=3", sample__guidance_scale=1.5)
    rae.verb("run", *words, "--to", "sample").succeeded()
    guide = rae.artifact("samples/tiny")["recipe"]["inputs"]["guide"]
    assert guide == milestones.artifact("dit/tiny@step=3")["id"]
    named = settings(sample__guide="dit/tiny@step=3", sample__guidance_scale=1.5)
    assert rae.verb("sample", *named, "--json").succeeded().json["reused"]
    given = settings(sample__dit="dit/tiny", sample__guide="step=3", sample__guidance_scale=1.5)
    assert rae.verb("run", *given, "--to", "sample", "--json").succeeded().json[-1]["reused"]


def test_a_guide_that_the_finished_run_never_published_is_refused_before_anything_runs(rae_with: WITH) -> None:
    rae = rae_with("shards", "latents", "decoder", "dit")
    words = settings(sample__guide="step=3", sample__guidance_scale=1.5)
    rae.verb("run", *words).refused(3, "published nothing at step 3")
    late = settings(sample__guide="step=9", sample__guidance_scale=1.5)
    rae_with("shards").verb("run", *late).refused(2, "step 9")


@pytest.mark.parametrize("verb", ["train-dit", "train-decoder"])
def test_a_run_continued_from_half_is_the_long_run_to_the_bit(verb: str, finished: Rae, rae_with: WITH) -> None:
    section, kind = verb.replace("-", "_"), verb.removeprefix("train-")
    rae = rae_with("shards", "latents")
    rae.verb(verb, *settings(**{f"{section}__steps": 3})).succeeded()
    half = rae.artifact(f"{kind}/tiny")
    rae.verb(verb, *settings(**{f"{section}__continue_from": f"{kind}/{half['id']}"})).succeeded()
    long = rae.artifact(f"{kind}/tiny")
    assert long["content"] == finished.content(kind)
    assert rae.payload(kind) == finished.payload(kind)  # optimizer and all
    assert long["recipe"]["inputs"]["continue_from"] == half["id"] != long["id"]
    assert f"{kind}/{half['id']}" in long["inputs"]
    lines = [json.loads(line)["step"] for line in next(Path(long["path"]).rglob("metrics.jsonl")).open()]
    assert lines == [3, long["metrics"]["steps"]]


def test_a_run_is_not_continued_with_other_settings(rae_with: WITH, milestones: Rae) -> None:
    rae = rae_with("shards", "latents", "dit")
    id = rae.artifact("dit/tiny")["id"]
    rae.verb("train-dit", *settings(train_dit__continue_from=id)).refused(2, "`train_dit.steps` is 8", "has done 8")
    other = settings(train_dit__continue_from=id, train_dit__steps=9, train_dit__batch_size=4, train_dit__seed=1)
    rae.verb("train-dit", *other).refused(4, "config.train_dit.batch_size: found 8, asked 4", "seed", f"dit/{id}")
    rate = settings(train_dit__continue_from=id, train_dit__steps=9, train_dit__lr=1e-5)
    rae.verb("train-dit", *rate).succeeded()
    twice = settings(train_dit__continue_from="dit/tiny", train_dit__steps=10)
    rae.verb("train-dit", *twice).refused(2, "which will mean what `tiny` makes")
    both = settings(train_dit__continue_from=id, train_dit__init_from=id)
    rae.verb("train-dit", *both).refused(2, "either `continue_from` or `init_from`")
    early = settings(train_dit__continue_from=f"{id}@step=4")
    milestones.verb("train-dit", *early).refused(3, "is a milestone and holds weights alone", "init_from")


def test_what_continuing_needs_is_verified(rae_with: WITH) -> None:
    rae = rae_with("shards", "latents", "dit")
    found = rae.artifact("dit/tiny")
    optimizer = next(Path(found["path"]).rglob("step-00000008/optimizer.safetensors"))
    data = bytearray(optimizer.read_bytes())
    data[-1] ^= 1
    optimizer.write_bytes(data)
    rae("verify", "dit/tiny", "-w", rae.workspace).refused(5, "optimizer.safetensors")
    more = settings(train_dit__continue_from=found["id"], train_dit__steps=9)
    rae.verb("train-dit", *more).refused(5, "optimizer.safetensors", "sha256 differs")


@pytest.mark.parametrize("verb", ["train-dit", "train-decoder"])
def test_a_training_begins_with_the_averaged_weights_of_another(verb: str, finished: Rae, rae_with: WITH) -> None:
    section, kind = verb.replace("-", "_"), verb.removeprefix("train-")
    rae, id = rae_with("shards", "latents", kind), finished.artifact(f"{kind}/tiny")["id"]
    # A learning rate at which nothing moves: what comes out is what went in.
    still = {f"{section}__{key}": value for key, value in (("init_from", id), ("steps", 1), ("lr", 1e-30))}
    rae.verb(verb, *settings(**still)).succeeded()
    made = rae.artifact(f"{kind}/tiny")
    load = {"dit": api.load_dit, "decoder": api.load_decoder}[kind]
    begun = load("tiny", workspace=str(rae.workspace), weights="model").state_dict()
    for name, tensor in load("tiny", workspace=str(finished.workspace)).state_dict().items():
        assert torch.equal(begun[name], tensor), name
    assert made["recipe"]["inputs"]["init_from"] == id
    assert f"{kind}/{id}" in made["inputs"]
    deeper = {f"{section}__init_from": id, f"{section}__depth": "[2,1]" if kind == "dit" else 2}
    rae.verb(verb, *settings(**deeper)).refused(4, f"`{section}.init_from`", "depth: found")


@pytest.mark.parametrize(("which", "reached"), [("latest", -1), ("step={}", 0)])
def test_samples_of_a_run_that_has_not_ended(which: str, reached: int, rae_with: WITH, warm: Warm) -> None:
    rae = rae_with("shards", "latents", "decoder")
    saved = unfinished(rae, warm)
    before = files(rae.workspace / "objects/dit")
    step = saved[reached]
    word = which.format(step)
    made = rae.verb("sample", *LONG, "--checkpoint", word, "--json").succeeded().json
    assert files(rae.workspace / "objects/dit") == before
    found = rae.artifact(f"samples/tiny-step{step}")
    assert found["id"] == made["id"]
    assert found["recipe"]["checkpoint"].keys() == {"run", "step", "weights"}
    assert found["recipe"]["checkpoint"]["step"] == step
    assert rae.verb("sample", *LONG, "--checkpoint", word, "--json").succeeded().json["reused"]
    dit = api.load_dit("tiny", workspace=str(rae.workspace), step=step)
    short = rae_with("shards", "latents")
    short.verb("train-dit", *settings(train_dit__steps=step)).succeeded()
    for name, tensor in api.load_dit("tiny", workspace=str(short.workspace)).state_dict().items():
        assert torch.equal(dit.state_dict()[name], tensor), name


def files(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_a_step_without_a_checkpoint_is_named_with_those_that_have_one(rae_with: WITH, warm: Warm) -> None:
    rae = rae_with("shards", "latents", "decoder")
    rae.verb("sample", *LONG, "--checkpoint", "latest").refused(3, "has saved no checkpoint")
    saved = unfinished(rae, warm)
    there = ", ".join(map(str, saved))
    rae.verb("sample", *LONG, "--checkpoint", "step=1").refused(3, f"no model of step 1; there are steps {there}")
    rae.verb("sample", "--checkpoint", "step1").refused(2, "neither `step=N` nor `latest`")
    with pytest.raises(MissingInput, match=f"there are steps {there}"):
        api.load_dit("tiny", workspace=str(rae.workspace), step=1)


def test_of_a_finished_run_the_newest_is_its_end(finished: Rae, rae_with: WITH) -> None:
    rae = rae_with("shards", "latents", "decoder", "dit", "samples")
    made = rae.verb("sample", "--checkpoint", "latest", "--json").succeeded().json
    assert made["reused"]
    assert made["id"] == finished.artifact("samples/tiny")["id"]
    assert Workspace(rae.workspace).resolve("samples/tiny").id == made["id"]
    assert [path.name for path in (rae.workspace / "refs/samples").iterdir()] == ["tiny.json"]


def test_imported_weights_begin_a_training_and_do_not_continue_one(rae_with: WITH, tmp_path: Path) -> None:
    release, rae = Release(tmp_path), rae_with("shards", "latents")
    stats = ("--stats", release.stat, "-w", rae.workspace)
    rae("import", "official", release.checkpoint, "--name", "dh", *stats).succeeded()
    more = settings(train_dit__continue_from="dh")
    rae.verb("train-dit", *more).refused(3, "holds weights alone", "`train_dit.init_from` begins with its weights")
    sizes = settings(train_dit__hidden_size="[16,32]", train_dit__num_heads="[2,4]", train_dit__allow_narrow="true")
    other = settings(train_dit__init_from="dh", train_dit__num_heads="[2,2]")
    rae.verb("train-dit", *sizes, *other).refused(4, "num_heads: found [2, 4], asked [2, 2]")
    rae.verb("train-dit", *settings(train_dit__init_from="dh"), *sizes).refused(
        4, "`train_dit.init_from` does not fit", "`final_layer.linear.bias` as [768] where [112]"
    )


def test_a_list_of_scales_makes_samples_and_scores_of_each_from_the_same_noise(rae_with: WITH) -> None:
    rae = rae_with("shards", "latents", "decoder", "dit")
    scales = settings(sample__guidance_scale="[1.5,1]")
    rows = rae.verb("evaluate", *scales, "--dry-run", "--json").succeeded().json
    assert [row["stage"] for row in rows] == ["evaluate", "evaluate-guidance1"]
    assert rae.verb("evaluate", *scales, "--json").succeeded().json["kind"] == "scores"
    first, other = (rae.artifact(f"samples/{name}") for name in ("tiny", "tiny-guidance1"))
    assert [one["recipe"]["config"]["sample"]["guidance_scale"] for one in (first, other)] == [1.5, 1.0]
    assert rae.artifact("scores/tiny-guidance1")["recipe"]["inputs"]["samples"] == other["id"]
    # Each is what that scale alone makes.
    for scale, one in ((1.5, first), (1, other)):
        made = rae.verb("sample", *settings(sample__guidance_scale=scale), "--json").succeeded().json
        assert (made["reused"], made["id"]) == (True, one["id"])
    guided = settings(sample__guidance_scale="[1.5,1]", sample__guidance_interval="[0.2,0.9]")
    rae.verb("sample", *guided).succeeded()
    assert rae.artifact("samples/tiny-guidance1")["id"] == other["id"]
    rae.verb("sample", *settings(sample__guidance_scale="[1.5,1.5]")).refused(2, "has a scale twice")


def test_the_length_of_the_average_is_chosen_after_the_run(rae_with: WITH) -> None:
    rae = rae_with("shards", "latents", "decoder")
    tracked = settings(train_dit__ema_sigma_rel="[0.05,0.1]", train_dit__ema_snapshot_every=2)
    rae.verb("train-dit", *tracked).succeeded()
    kept = list(rae.workspace.glob("objects/dit/*/attempts/*/ema_snapshots/step-*.safetensors"))
    assert len(kept) == 2 * TINY["train_dit"]["steps"] // 2
    rae("verify", "dit/tiny", "-w", rae.workspace).succeeded()
    made = {}
    for sigma_rel in ("null", 0.05, 0.2):
        chosen = settings(sample__ema_sigma_rel=sigma_rel)
        made[sigma_rel] = rae.verb("sample", *tracked, *chosen, "--json").succeeded().json
    assert len({one["id"] for one in made.values()}) == len({one["content"] for one in made.values()}) == 3
    rae.verb("sample", *tracked, *settings(sample__ema_sigma_rel=0.3)).refused(2, "ema_sigma_rel")


def test_a_length_of_a_run_that_kept_no_averages_is_refused(rae_with: WITH) -> None:
    rae = rae_with("shards", "latents", "decoder", "dit")
    rae.verb("sample", *settings(sample__ema_sigma_rel=0.1)).refused(3, "keeps no snapshots")
