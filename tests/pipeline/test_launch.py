"""Who does the work: shares of a job array, and what is refused before anything starts."""

from collections.abc import Callable

import pytest

from rae.pipeline import launch
from rae.store.errors import ConfigError
from tests.conftest import Rae


def test_shares_in_any_order_make_what_one_process_makes(finished: Rae, rae_with: Callable[..., Rae]) -> None:
    rae = rae_with("shards")
    for share, missing in ((2, 9), (0, 4)):
        ended = rae.verb("encode", "--parts", f"{share}/3", "--json").succeeded()
        assert ended.json == {"kind": "latents", "parts": 13, "missing_parts": missing}
        assert f"{missing} of 13 parts are still missing" in ended.err
        assert not list(rae.workspace.glob("objects/latents/*/manifest.json"))
    last = rae.verb("encode", "--parts", "1/3", "--json").succeeded().json
    assert last["content"] == finished.content("latents")
    assert rae.payload("latents") == finished.payload("latents")


def test_a_run_without_a_share_finishes_what_shares_left(finished: Rae, rae_with: Callable[..., Rae]) -> None:
    rae = rae_with("shards")
    rae.verb("encode", "--parts", "1/3").succeeded()
    done = {path: path.stat().st_mtime_ns for path in rae.workspace.glob("objects/latents/*/parts/*")}
    assert done
    rae.verb("encode").succeeded()
    assert {path: path.stat().st_mtime_ns for path in done} == done
    assert rae.payload("latents") == finished.payload("latents")


@pytest.mark.parametrize("share", ["3/3", "1", "a/b", "-1/3", "0/0"])
def test_what_is_no_share_is_refused_with_the_ones_that_are(share: str, rae: Rae) -> None:
    rae.verb("encode", "--parts", share).refused(2, "0/8", "7/8")


def test_local_processes_and_a_scheduler_exclude_each_other(rae: Rae, monkeypatch: pytest.MonkeyPatch) -> None:
    rae.verb("encode", "--processes", 2, "--scheduler", "tcp://127.0.0.1:1").refused(2, "--processes", "--scheduler")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="torchrun"):
        launch.Crew(processes=2)
