"""`rae verify`: exit code 5 and the list of what is bad; `--repair` restores what was published."""

from pathlib import Path

import pytest


@pytest.fixture
def latents(rae_with):
    """The small pipeline with its latents, and the folder that they lie in."""
    rae = rae_with("shards", "latents")
    return rae, Path(rae.artifact("latents/tiny")["path"])


def flip(path: Path, byte: int) -> None:
    data = bytearray(path.read_bytes())
    data[byte] ^= 4
    path.write_bytes(data)


def verify(rae, *words: object):
    return rae("verify", "latents/tiny", "-w", rae.workspace, *words)


def test_a_whole_artifact_is_said_to_be_whole(finished) -> None:
    for kind in ("latents", "decoder", "dit"):
        for mode in ("--quick", "--sampled", "--full"):
            ran = finished("verify", f"{kind}/tiny", "-w", finished.workspace, mode).succeeded()
            assert f"is whole ({mode[2:]})" in ran.out


def test_damage_is_listed_and_repaired_to_the_bit(latents) -> None:
    rae, folder = latents
    before = rae.payload("latents")
    shard = folder / "latents/c/0/0/0/0/0"
    whole = shard.read_bytes()
    flip(shard, 5)
    verify(rae, "--quick").succeeded()
    flip(folder / "stats.npz", 200)
    ran = verify(rae, "--json")
    assert ran.code == 5
    assert {Path(one["file"]) for one in ran.json["problems"]} == {shard, folder / "stats.npz"}
    assert [one["slot"] for one in ran.json["problems"] if one["file"] == str(shard)] == [0]
    assert "--repair --config CONFIG" in ran.err
    ran = verify(rae, "--repair")
    assert ran.code == 2
    assert "name the configuration" in ran.err
    assert f"-w {rae.workspace} --repair --config CONFIG" in ran.err
    flip(folder / "encoder.json", 5)
    ran = verify(rae, "--repair", "--config", rae.config).succeeded()
    assert f"repaired: {shard}" in ran.out
    assert shard.read_bytes() == whole
    assert rae.payload("latents") == before
    verify(rae).succeeded()


def test_another_configuration_repairs_nothing(latents) -> None:
    rae, folder = latents
    flip(folder / "latents/c/0/0/0/0/0", 5)
    ran = verify(rae, "--repair", "--config", rae.config, "-s", "encode.dtype=float32")
    assert ran.code == 4
    assert "config.encode.dtype" in ran.err


def test_a_damaged_manifest_is_named(latents) -> None:
    rae, folder = latents
    flip(folder / "manifest.json", 40)
    ran = verify(rae)
    assert ran.code == 5
    assert "manifest.json" in ran.err


def test_damaged_models_are_named_and_can_not_be_repaired(rae_with) -> None:
    rae = rae_with("shards", "latents", "dit")
    folder = Path(rae.artifact("dit/tiny")["path"])
    path = next(folder.rglob("*.safetensors"))
    flip(path, path.stat().st_size // 2)
    ran = rae("verify", "dit/tiny", "-w", rae.workspace)
    assert ran.code == 5
    assert str(path) in ran.out
    assert rae("verify", "dit/tiny", "-w", rae.workspace, "--repair").code == 2


def test_options_that_do_not_go_together_are_refused(latents) -> None:
    rae, _ = latents
    assert verify(rae, "--quick", "--full").code == 2
    assert verify(rae, "--config", rae.config).code == 2
