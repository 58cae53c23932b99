"""`--dry-run` of the trainers: two steps with every loss, what they take, and a workspace that stays as it is."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import TINY, Rae

# The losses would begin long after the training's end.
EVERY_LOSS = ("perceptual_loss=encoder", "perceptual_start_epoch=50", "adversarial_loss=encoder", "ks=3")


def words(*settings: str, verb: str = "train_decoder") -> list[str]:
    return [word for setting in settings for word in ("-s", f"{verb}.{setting}")]


def files_of(rae: Rae) -> dict[Path, tuple[int, int]]:
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in rae.workspace.rglob("*")}


def tried(rae: Rae, verb: str, *options: str) -> dict[str, Any]:
    """What `--dry-run --json` says, once it is certain that nothing was written."""
    before = files_of(rae)
    (row,) = rae.verb(verb, *options, "--dry-run", "--json").succeeded().json
    assert files_of(rae) == before
    assert (row["stage"], row["state"]) == (verb, "run")
    taken: dict[str, Any] = row["dry_run"]
    return taken


def test_a_decoders_has_every_loss_whenever_it_would_begin(rae_with: Callable[..., Rae]) -> None:
    taken = tried(rae_with("shards"), "train-decoder", *words(*EVERY_LOSS))
    numbers = taken["numbers"]
    assert all(numbers[part] != 0 for part in ("l1", "perceptual", "gen_loss", "d_weight", "disc_loss"))
    assert numbers["loss"] == pytest.approx(
        numbers["l1"] + numbers["perceptual"] + 0.75 * numbers["d_weight"] * numbers["gen_loss"], rel=1e-4
    )


def test_what_it_counts_is_what_a_training_saves(rae_with: Callable[..., Rae]) -> None:
    rae = rae_with("shards")
    settings = words(*EVERY_LOSS, "disc_start_step=1", "gan_start_step=2")
    taken = tried(rae, "train-decoder", *settings)
    rae.verb("train-decoder", *settings).succeeded()
    assert taken["parameters"]["trained"] == rae.artifact("decoder/tiny")["metrics"]["parameters"]
    (folder,) = rae.workspace.glob("objects/decoder/*/attempts/*/checkpoints/step-00000006")
    groups = {path.stem: load_file(path) for path in folder.glob("*.safetensors")}
    saved = sum(tensor.nbytes for group in groups.values() for tensor in group.values())
    heads = {name: tensor for name, tensor in groups["heads"].items() if not name.endswith(("_u", "_v"))}
    assert taken["checkpoint_bytes"] == saved
    assert taken["parameters"]["discriminator"] == sum(tensor.numel() for tensor in heads.values())
    assert taken["steps"] == 6


def test_the_encoder_counts_once_however_many_losses_are_on_it(rae_with: Callable[..., Rae]) -> None:
    rae = rae_with("shards")
    alone = tried(rae, "train-decoder")["parameters"]
    assert alone["discriminator"] == 0
    assert tried(rae, "train-decoder", *words(*EVERY_LOSS))["parameters"]["frozen"] == alone["frozen"] > 100_000


def test_a_transformers_says_what_it_takes(rae_with: Callable[..., Rae]) -> None:
    rae = rae_with("shards", "latents")
    taken = tried(rae, "train-dit")
    assert taken["parameters"]["trained"] > 100_000
    assert taken["steps"] == TINY["train_dit"]["steps"]
    assert 10e6 < taken["peak_memory_bytes"] < taken["memory_bytes"]
    assert taken["seconds_per_step"] > 0
    assert taken["seconds"] == pytest.approx(
        taken["steps"] * max(taken["seconds_per_step"], taken["seconds_per_batch"] / 2)
    )
    waiting = tried(rae, "train-dit", *words("workers=0", verb="train_dit"))
    assert waiting["seconds"] == pytest.approx(
        waiting["steps"] * (waiting["seconds_per_step"] + waiting["seconds_per_batch"])
    )


def test_people_read_a_table(rae_with: Callable[..., Rae]) -> None:
    said = rae_with("shards").verb("train-decoder", *words(*EVERY_LOSS), "--dry-run").succeeded().out
    for line in ("parameters, trained", "parameters, discriminator", "parameters, frozen", "peak memory", "disc_loss"):
        assert line in said
    assert "0 threads" not in said
    assert "the whole run" in said


def test_what_is_missing_is_named_with_the_command_that_makes_it(rae: Rae, rae_with: Callable[..., Rae]) -> None:
    rae.verb("train-decoder", "--dry-run").refused(3, "no shards", f"next: rae shards {rae.config}")
    encoded = rae_with("shards")
    encoded.verb("train-dit", "--dry-run").refused(3, "no latents", f"next: rae encode {encoded.config}")
    encoded.verb("train-decoder", *words("adversarial_loss=dino", "disc_weights=nowhere.pth"), "--dry-run").refused(3)


def test_a_finished_training_is_not_tried_out(finished: Rae) -> None:
    (row,) = finished.verb("train-dit", "--dry-run", "--json").succeeded().json
    assert row["state"] == "done"
    assert "dry_run" not in row


def test_a_memory_that_does_not_suffice_is_said_in_a_sentence(
    rae_with: Callable[..., Rae], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("rae.stages.training.learner.descend", full)
    rae = rae_with("shards", "latents")
    rae.verb("train-dit", "--dry-run").refused(2, "`batch_size` 8", "does not fit the memory of cpu", "grad_checkpoint")


def test_two_ranks_try_out_together_and_one_speaks(rae_with: Callable[..., Rae]) -> None:
    rae = rae_with("shards", "latents")
    before = files_of(rae)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "rae.pipeline.cli", *rae.words("train-decoder", *words(*EVERY_LOSS), "--dry-run")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(rae.folder / "cache")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("the whole run") == 1
    assert "2 process(es)" in done.stdout
    assert files_of(rae) == before
