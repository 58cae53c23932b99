"""Trainings that are killed or asked to stop at any moment: the resumed one ends with the same bits.

A decoder with every loss at work, and a transformer, whose checkpoints lie in the middle of its epochs. Three strikes
of each kind by default, 20 with RAE_FAULTS=all.
"""

import json
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from rae.stages.training.metrics_log import read
from tests.conftest import Rae, Warm

STRIKES = 20 if os.environ.get("RAE_FAULTS") == "all" else 3


@dataclass(frozen=True)
class Case:
    """A training: its verb, what it needs and makes, and settings that make it last."""

    verb: str
    needs: tuple[str, ...]
    makes: str
    settings: tuple[str, ...]

    @property
    def options(self) -> list[str]:
        section = self.verb.replace("-", "_")
        return [word for setting in self.settings for word in ("-s", f"{section}.{setting}")]

    def log(self, rae: Rae) -> list[dict[str, Any]]:
        """The numbers of a finished training, without what a clock says."""
        (path,) = rae.workspace.glob(f"objects/{self.makes}/*/manifest.json")
        files = [entry["path"] for entry in json.loads(path.read_bytes())["files"]]
        lines = read(path.parent / next(file for file in files if file.endswith("metrics.jsonl")))
        return [{key: line[key] for key in line.keys() - {"images_per_s", "data_wait"}} for line in lines]


EVERY_LOSS = Case(
    "train-decoder",
    ("shards",),
    "decoder",
    (
        *("perceptual_loss=encoder", "perceptual_start_step=1", "adversarial_loss=encoder", "ks=3"),
        *("disc_start_step=2", "gan_start_step=4", "steps=12", "checkpoint_every=3", "log_every=4", "batch_size=4"),
    ),
)
# An epoch is 12 steps.
TRANSFORMER = Case(
    "train-dit", ("shards", "latents"), "dit", ("steps=60", "checkpoint_every=5", "log_every=7", "clip_grad=1")
)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=lambda number: number.name)
@pytest.mark.parametrize("case", [EVERY_LOSS, TRANSFORMER], ids=lambda case: case.verb)
def test_a_training_struck_at_any_moment_ends_with_the_same_bits(
    case: Case, number: signal.Signals, rae_with: Callable[..., Rae], warm: Warm
) -> None:
    whole = rae_with(*case.needs)
    began = time.monotonic()
    warm.start(whole.words(case.verb, *case.options)).wait().succeeded()
    seconds, expected = time.monotonic() - began, whole.payload(case.makes)
    chance, struck, continued = random.Random(f"{number.name} {case.verb}"), 0, 0
    for strike in range(STRIKES):
        rae = rae_with(*case.needs)
        moment = (strike + chance.random()) / STRIKES * seconds
        running = warm.start(rae.words(case.verb, *case.options))
        time.sleep(moment)
        running.signal(number)
        stopped = running.wait()
        if stopped.code:
            struck += 1
            if number == signal.SIGTERM and stopped.out + stopped.err:  # rae had begun
                stopped.refused(6, f"next: rae {case.verb}")
            else:
                assert stopped.code == -number
        resumed = warm.start(rae.words(case.verb, *case.options)).wait().succeeded()
        continued += "continued from step" in resumed.err
        assert rae.payload(case.makes) == expected, f"{number.name} after {moment:.3f} of {seconds:.3f} s"
        assert case.log(rae) == case.log(whole)
    assert struck
    assert continued
    if case is EVERY_LOSS:
        assert all(case.log(whole)[-1][part] for part in ("perceptual", "gen_loss", "d_weight", "disc_loss"))
        assert any(path.endswith("disc_optimizer.safetensors") for path in expected)
