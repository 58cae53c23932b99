"""A rank that is stuck says that it is, and where."""

import time

import pytest

from rae.stages.training.ranks import Ranks
from rae.stages.training.watchdog import watched


def a_place_to_be_stuck(seconds: float) -> None:
    time.sleep(seconds)


def test_a_step_without_an_end_names_rank_step_and_place(capfd: pytest.CaptureFixture[str]) -> None:
    with watched(Ranks(rank=3, world_size=8), 0.2) as watchdog:
        watchdog.at(17)
        a_place_to_be_stuck(0.7)
        watchdog.at(18)
    said = capfd.readouterr().err
    assert "rank 3 of 8 has been in step 17 for 0.2 s" in said
    assert "rank 3 of 8 has been in step 17 for 0.4 s" in said
    assert "`time.sleep(seconds)`" in said
    assert "in a_place_to_be_stuck" in said, "the stacks of all threads"
    assert "step 18" not in said


def test_steps_that_end_and_work_that_may_take_any_time_are_not_reported(capfd: pytest.CaptureFixture[str]) -> None:
    with watched(Ranks(), 0.5) as watchdog:
        for step in range(1, 12):
            watchdog.at(step)
            time.sleep(0.06)
        watchdog.at(None)
        time.sleep(0.8)
    assert "rae:" not in capfd.readouterr().err
