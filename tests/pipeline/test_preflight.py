"""What the last stage would refuse is refused before the first."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from rae.pipeline.config import load
from rae.pipeline.plan import Pipeline
from rae.pipeline.preflight import preflight
from rae.stages.training import trackers
from rae.store.artifacts import Workspace
from rae.store.errors import ConfigError, MissingInput, StaleInput
from tests.conftest import Rae


@pytest.fixture
def refused(tmp_path: Path) -> Any:
    """Runs the preflight of the quickstart with changes, on an empty workspace: nothing is made."""

    def run(*overrides: str) -> None:
        preflight(Pipeline(load("quickstart", list(overrides)), Workspace(tmp_path / "w"), ["quickstart"]))
        assert not (tmp_path / "w").exists()

    return run


def test_a_tracker_that_is_not_installed_is_missed_before_anything_is_encoded(
    refused: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(MissingInput, match="has wandb, which is not installed"):
        refused("train_dit.trackers=[wandb]")


def test_the_quickstart_passes(refused: Any) -> None:
    refused()


@pytest.mark.parametrize(
    ("override", "error", "words"),
    [
        ("train_dit.hidden_size=[128, 64]", ConfigError, "Theorem 1"),
        ("train_decoder.perceptual_loss=lpips", MissingInput, "vgg16-397923af.pth"),
        ("train_decoder.adversarial_loss=dino", MissingInput, "dino_vit_small_patch8_224.pth"),
        ("encode.image_size=10", ConfigError, "not a multiple of the encoder's 4x4 grid"),
        ("train_decoder.resize_size=4", ConfigError, "less than `encode.image_size` 8"),
        ("sample.dit=elsewhere", MissingInput, "no dit `elsewhere`"),
        ("sample.decoder=elsewhere", MissingInput, "no decoder `elsewhere`"),
        ("sample={guide: elsewhere, guidance_scale: 1.5}", MissingInput, "no dit `elsewhere`"),
        ("train_dit.latents=elsewhere", MissingInput, "no latents `elsewhere`"),
        ("shards.val_fraction=0", MissingInput, "holds no images out"),
        ("evaluate.extractor_weights=nowhere.pth", MissingInput, "nowhere.pth"),
        ("evaluate.perceptual_distance=lpips", MissingInput, "evaluate.lpips_weights"),
    ],
)
def test_what_cannot_end_does_not_begin(
    refused: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, override: str, error: type[Exception], words: str
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    with pytest.raises(error, match=words):
        refused(override)


def test_guidance_and_classes_must_fit_the_training(refused: Any) -> None:
    with pytest.raises(ConfigError, match="guidance_scale"):
        refused("sample.guidance_scale=2", "train_dit.class_dropout_prob=0")
    with pytest.raises(ConfigError, match="guidance_scale"):
        refused("sample.guidance_scale=2", "train_dit.num_classes=0")
    with pytest.raises(ConfigError, match="asks for class 10"):
        refused("sample.classes=[10]", "train_dit.num_classes=10")


def test_a_guide_must_have_been_trained_on_the_same(finished: Rae) -> None:
    """`finished` knows a transformer of its own latents."""
    guide = ("sample.guide=dit/tiny", "sample.guidance_scale=1.5")

    def check(*overrides: str) -> None:
        given = [*guide, *overrides]
        preflight(Pipeline(load(str(finished.config), given), Workspace(finished.workspace), ["tiny.yaml"]))

    check()
    check("train_dit.class_dropout_prob=0", "sample.seed=1")  # a guide needs no prediction without labels
    with pytest.raises(StaleInput, match=r"the guide `dit/tiny` .*prediction: found \"velocity\", asked \"data\""):
        check("train_dit.prediction=data")
    with pytest.raises(StaleInput, match="path_type"):
        check("train_dit.path_type=GVP")


def test_a_stage_that_is_left_out_is_not_checked(tmp_path: Path) -> None:
    config = {"name": "only", "shards": {"train": "digits"}, "encode": {"encoder": "efficientnet-lite0"}}
    (tmp_path / "only.yaml").write_text(yaml.safe_dump(config))
    preflight(Pipeline(load(str(tmp_path / "only.yaml")), Workspace(tmp_path / "w"), ["only.yaml"]))
