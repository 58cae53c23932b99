"""An artifact is self-contained: the folder of the latents alone, on a machine that has nothing of what made them."""

import shutil
from pathlib import Path

from tests.conftest import Rae


def test_latents_alone_are_inspected_verified_and_trained_on(finished: Rae, tmp_path: Path) -> None:
    there = Path(finished.artifact("latents/tiny")["path"])
    alone = Rae(
        tmp_path / "alone", {"train_dit": finished.sections["train_dit"] | {"latents": f"latents/{there.name}"}}
    )
    shutil.copytree(there, alone.workspace / "objects" / "latents" / there.name)
    ref = f"latents/{there.name}"
    shown = alone("inspect", ref, "-w", alone.workspace).succeeded().out
    assert "not in this workspace" in shown
    assert "encoder of its tokens:" in shown
    alone("inspect", ref, "-w", alone.workspace, "--card").succeeded()
    alone("verify", ref, "-w", alone.workspace).succeeded()
    alone("status", "-w", alone.workspace).succeeded()
    alone.verb("train-dit").succeeded()
    assert alone.payload("dit") == finished.payload("dit")  # the same transformer, to the bit
    alone("verify", "dit/tiny", "-w", alone.workspace).succeeded()


def test_a_path_to_the_latents_does_as_well(finished: Rae, tmp_path: Path) -> None:
    there = Path(finished.artifact("latents/tiny")["path"])
    shutil.copytree(there, tmp_path / "usb-stick")
    section = finished.sections["train_dit"] | {"latents": str(tmp_path / "usb-stick"), "steps": 1}
    alone = Rae(tmp_path / "alone", {"train_dit": section})
    alone("verify", tmp_path / "usb-stick", "-w", alone.workspace).succeeded()
    alone.verb("train-dit").succeeded()
