"""`rae gc` says what would go and removes it when it is told to; `rae rm` refuses what others were made from."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Rae

With = Callable[..., Rae]


def folders(rae: Rae, kind: str) -> set[str]:
    return {path.name for path in (rae.workspace / "objects" / kind).iterdir()}


def test_nothing_is_removed_unless_it_is_asked_for(rae_with: With) -> None:
    rae = rae_with("shards", "latents", "dit")
    assert "holds nothing that nobody needs" in rae("gc", "-w", rae.workspace, "--grace", "0").succeeded().out
    ref = rae.workspace / "refs" / "dit" / "tiny.json"
    ref.unlink()
    assert "holds nothing" in rae("gc", "-w", rae.workspace).succeeded().out  # of today
    before = folders(rae, "dit")
    ran = rae("gc", "-w", rae.workspace, "--grace", "0").succeeded()
    assert f"dit/{next(iter(before))}" in ran.out
    assert f"rae gc -w {rae.workspace} --delete" in ran.out
    assert folders(rae, "dit") == before
    (row,) = rae("gc", "-w", rae.workspace, "--grace", "0", "--delete", "--json").succeeded().json
    assert (row["artifact"], row["removed"]) == (f"dit/{next(iter(before))}", True)
    assert row["bytes"] > 10_000
    assert folders(rae, "dit") == set()
    assert rae.artifact("latents/tiny")["name"] == "tiny"
    rae.verb("train-dit").succeeded()  # is made again


def test_attempts_of_killed_runs_are_counted_and_go(rae_with: With) -> None:
    rae = rae_with("shards", "latents", "dit")
    folder = Path(rae.artifact("dit/tiny")["path"])
    killed = folder / "attempts" / "0badc0de"
    (killed / "checkpoints").mkdir(parents=True)
    (killed / "checkpoints" / "half").write_bytes(b"x" * 5000)
    ran = rae("gc", "-w", rae.workspace, "--grace", "0", "--delete").succeeded()
    assert f"removed objects/dit/{folder.name}/attempts/0badc0de  5 kB  an attempt at dit/tiny" in ran.out
    assert not killed.exists()
    rae("verify", "dit/tiny", "-w", rae.workspace).succeeded()


@pytest.mark.parametrize("grace", ["", "1", "a day", "-1h", "1h30", "inf"])
def test_a_grace_period_that_is_no_time_is_refused(grace: str, rae: Rae) -> None:
    rae("gc", "-w", rae.workspace, f"--grace={grace}").refused(2, "30s, 90min, 24h or 7d")


def test_rm_names_what_was_made_from_it(rae_with: With) -> None:
    rae = rae_with("shards", "latents", "dit")
    rae("rm", "latents/tiny", "-w", rae.workspace).refused(2, "dit/tiny is made from it", "next: rae rm dit/tiny")
    rae("rm", "nothing", "-w", rae.workspace).refused(3, "no artifact `nothing`")
    assert "would remove dit/" in rae("rm", "dit/tiny", "-w", rae.workspace, "--dry-run").succeeded().out
    assert len(folders(rae, "dit")) == 1
    (gone,) = rae("rm", "dit/tiny", "-w", rae.workspace, "--json").succeeded().json
    assert gone["ref"].startswith("dit/")
    assert folders(rae, "dit") == set()
    rae("rm", "latents/tiny", "-w", rae.workspace).succeeded()
    assert "shards" in rae("status", "-w", rae.workspace).succeeded().out


def test_what_is_damaged_keeps_everything_until_it_is_removed(rae_with: With) -> None:
    rae = rae_with("shards", "latents", "dit")
    damaged = rae.artifact("dit/tiny")
    (Path(damaged["path"]) / "manifest.json").write_bytes(b"{}")
    (rae.workspace / "refs" / "latents" / "tiny.json").unlink()
    ref, latents = f"dit/{damaged['id']}", folders(rae, "latents")
    for words in (["gc", "--grace", "0", "--delete"], ["rm", f"latents/{next(iter(latents))}"]):
        ran = rae(*words, "-w", rae.workspace).refused(5, "manifest.json is not a manifest", "nothing else is removed")
        assert f"next: rae rm {ref} -w {rae.workspace}" in ran.err
    assert folders(rae, "latents") == latents
    assert f"would remove {ref}, which is damaged" in rae("rm", ref, "-w", rae.workspace, "--dry-run").succeeded().out
    (gone,) = rae("rm", ref, "-w", rae.workspace, "--json").succeeded().json
    assert (gone["ref"], gone["removed"], folders(rae, "dit")) == (ref, True, set())
    rae("gc", "-w", rae.workspace, "--grace", "0", "--delete").succeeded()
    assert folders(rae, "latents") == set()
