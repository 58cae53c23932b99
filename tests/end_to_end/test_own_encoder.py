"""Your own encoder takes the place of a pretrained one, by the command line as an installed package and by a module."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

import rae as api
from rae.store.errors import ConfigError, StaleInput
from rae.store.latents import LatentStore
from tests.conftest import TINY, Rae, one_thread

SECTIONS: dict[str, Any] = {
    "shards": TINY["shards"],
    "encode": {"encoder": "patches", "image_size": 32, "horizontal_flip": False, "batch_size": 8, "rows_per_part": 8},
    "train_decoder": TINY["train_decoder"] | {"steps": 4, "perceptual_loss": "encoder"},
    "evaluate": TINY["evaluate"],
}
PACKAGE = """
import torch
from torch import nn

class Patches(nn.Module):
    version = "{version}"
    mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 12, 8, stride=8)
        weight = torch.arange(self.conv.weight.numel()).float() + {shift}
        self.conv.weight.data = weight.sin().reshape(self.conv.weight.shape)
        self.conv.bias.data.zero_()

    def forward(self, images):
        return self.conv(images)
"""


class Package:
    """A package `patches_package` on the path, as pip would have installed it; it offers the encoder `patches`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        metadata = folder / "patches_package-1.0.dist-info"
        metadata.mkdir(parents=True)
        (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: patches-package\nVersion: 1.0\n")
        (metadata / "entry_points.txt").write_text("[rae.encoders]\npatches = patches_package:Patches\n")
        self.write()

    def write(self, version: str = "1", shift: int = 0) -> None:
        (self.folder / "patches_package.py").write_text(PACKAGE.format(version=version, shift=shift))
        sys.modules.pop("patches_package", None)

    def module(self) -> nn.Module:
        import patches_package  # type: ignore[import-not-found]

        module: nn.Module = patches_package.Patches()
        return module


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Package:
    made = Package(tmp_path / "site")
    monkeypatch.syspath_prepend(made.folder)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # which would outlive a change within the same second
    return made


@pytest.fixture
def own(tmp_path: Path) -> Rae:
    return Rae(tmp_path / "own", SECTIONS)


def test_an_installed_encoder_goes_from_images_to_scores(own: Rae, package: Package) -> None:
    for verb in ("encode", "train-decoder", "evaluate"):
        own.verb(verb).succeeded()
    shown = own.artifact("latents/tiny")
    assert shown["metrics"]["shape"] == [12, 4, 4]
    described = shown["encoder"]
    assert (described["name"], described["kind"], described["version"]) == ("patches", "own", "1")
    assert (described["token_dim"], described["grid"], described["input_size"]) == (12, [4, 4], 32)
    assert described["std"] == [1.0, 1.0, 1.0]
    assert own.artifact("decoder/tiny")["encoder"] == described
    text = own("inspect", "latents/tiny", "-w", own.workspace).succeeded().out
    for line in ("token_dim: 12", "grid: [4, 4]", "version: 1", f"digest: {described['digest']}"):
        assert line in text
    assert own.artifact("scores/tiny")["metrics"]["reconstruction_psnr_db"] > 0
    store = LatentStore(own.workspace / "objects" / "latents" / shown["id"], raw=True)
    autoencoder = api.load_autoencoder("tiny", workspace=str(own.workspace))
    assert autoencoder.decode(torch.from_numpy(store.rows(range(2), 0)).float()).shape == (2, 3, 32, 32)
    assert own.verb("encode", "--json").succeeded().json["reused"] is True

    package.write(version="2")
    other = own.verb("encode", "--json", "--restart").succeeded().json
    assert (other["reused"], other["content"]) == (False, shown["content"])  # said to be another, and computes the same
    package.write(shift=1)
    assert own.verb("encode", "--json").succeeded().json["content"] != shown["content"]
    own.verb("evaluate").refused(3, "rae train-decoder")  # that decoder is the other weights'
    with pytest.raises(StaleInput, match=r"this encoder makes \(encoder\.digest"):
        api.load_autoencoder("tiny", workspace=str(own.workspace))


def test_a_module_takes_the_encoders_place_in_a_run(own: Rae, package: Package) -> None:
    module, workspace = package.module().train(), str(own.workspace)
    overrides = ["encode.encoder=no/encoder", "evaluate=null"]
    with one_thread():
        made = api.run(str(own.config), workspace, overrides, encoder=module, device="cpu")
        again = api.run(str(own.config), workspace, overrides, encoder=module, device="cpu")
        assert [artifact.id for artifact in again] == [artifact.id for artifact in made]
        assert made[1].manifest.recipe["weights"]["class"] == "patches_package.Patches"
        assert made[1].manifest.recipe["weights"]["version"] == "1"
        assert "encoder=..." in made[1].manifest.provenance["command"]
        images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        autoencoder = api.load_autoencoder("decoder/tiny", workspace, encoder=module)
        assert torch.equal(autoencoder.encode(images), api.encode(images, module))
        assert autoencoder.decode(autoencoder.encode(images)).shape == images.shape
        assert module.training

        newer = api.run(
            str(own.config), workspace, [*overrides, "train_decoder=null"], encoder=module, version="2", device="cpu"
        )
        assert newer[0].id == made[0].id  # the same shards
        assert newer[1].id != made[1].id
        with torch.no_grad():
            module.conv.bias.add_(1)
        with pytest.raises(StaleInput, match=r"encoder\.digest"):
            api.load_autoencoder("decoder/tiny", workspace, encoder=module)


def test_the_readmes_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    [example] = [block for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "class Own" in block]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAE_WORKSPACE", str(tmp_path / "workspace"))
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"name": "mine", **SECTIONS}))
    names: dict[str, Any] = {"rae": api, "torch": torch, "images": torch.rand(2, 3, 32, 32)}
    with one_thread():
        exec(example, names)
    assert names["tokens"].shape == (2, 64, 4, 4)
    assert [artifact.kind for artifact in names["artifacts"]] == ["shards", "latents", "decoder", "scores"]
    assert torch.equal(names["autoencoder"].encode(names["images"]), names["tokens"])


def test_a_module_that_declares_no_version_makes_nothing(own: Rae) -> None:
    with pytest.raises(ConfigError, match="AvgPool2d` declares no version"):
        api.run(str(own.config), str(own.workspace), encoder=nn.AvgPool2d(8))
    assert not own.workspace.exists()
    with pytest.raises(ConfigError, match=r"Sequential` returns \[2, 12, 4\] for images"):
        api.run(
            str(own.config),
            str(own.workspace),
            encoder=nn.Sequential(nn.AvgPool2d(8), nn.Flatten(1, 2)),
            version="1",
        )
