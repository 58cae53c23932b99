"""Exported models are what the release loads, and come back to the bit."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoConfig

from rae.pipeline.interchange.export_official import check_encoder, check_transport, official_config
from rae.pipeline.interchange.official_yaml import dit_settings, transport_settings
from rae.stages.models.dit import DiTConfig
from rae.stages.models.official import Checkpoint, infer_decoder, infer_dit
from rae.stages.models.trained import DitDescription
from rae.store.errors import ConfigError
from rae.store.manifest import Artifact, Manifest
from tests.pipeline.interchange.released import DECODER, DIT, Release

RELEASED = json.loads((Path(__file__).parents[2] / "parity/official_state_dicts.json").read_text())
ARTIFACT = Artifact(Path(), Manifest("dit", "x", {}, "", {}, {}, [], {}))
DINOV2 = {"name": "facebook/dinov2-with-registers-base", "kind": "dinov2", "input_size": 224}


def described(prediction: str = "velocity", path_type: str = "Linear", **changes: Any) -> DitDescription:
    transport = {"path_type": path_type, "prediction": prediction, "loss_weight": None}
    transport |= {"time_dist_type": "logit-normal", "time_dist_shift": 6.928203230275509}
    return DitDescription(DiTConfig.from_dict({**DIT.to_dict(), **changes}), transport, DINOV2)


@pytest.fixture(autouse=True)
def _no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture
def release(tmp_path: Path, rae: Any) -> Release:
    """The release's files, and their models imported as `vit` and `dh`."""
    (tmp_path / "release").mkdir()
    made = Release(tmp_path / "release")
    words = ("--stats", made.stat, "-w", rae.workspace)
    rae("import", "official", made.model, "--name", "vit", "--config", made.config, *words).succeeded()
    rae("import", "official", made.checkpoint, "--name", "dh", *words).succeeded()
    return made


def test_exported_models_come_back_to_the_bit(rae: Any, release: Release, tmp_path: Path) -> None:
    out = tmp_path / "out"
    exported = rae("export", "official", "decoder/vit", out, "-w", rae.workspace, "--json").succeeded().json
    assert [Path(path).name for path in exported["files"]] == ["model.pt", "config.json", "stat.pt"]
    rae("export", "official", "dit/dh", out, "-w", rae.workspace).succeeded()  # into the same folder
    assert sorted(path.name for path in out.iterdir()) == sorted(
        ["model.pt", "config.json", "stat.pt", "stage2_model.pt", "config.yaml"]
    )
    for name, model in (("model.pt", release.decoder), ("stage2_model.pt", release.dit)):
        written = torch.load(out / name, weights_only=True)
        assert written.keys() == model.state_dict().keys()
        assert all(torch.equal(tensor, written[key]) for key, tensor in model.state_dict().items())
    stats = torch.load(out / "stat.pt", weights_only=True)
    assert torch.equal(stats["mean"], release.mean)
    assert torch.equal(stats["var"], release.var)
    for ref, file, config in (("vit", "model.pt", "config.json"), ("dh", "stage2_model.pt", "config.yaml")):
        words = ("--name", f"{ref}-again", "--config", out / config, "--stats", out / "stat.pt", "-w", rae.workspace)
        rae("import", "official", out / file, *words).succeeded()
        assert rae.artifact(f"{ref}-again")["content"] == rae.artifact(ref)["content"]


def test_the_decoders_configuration_is_one_that_transformers_reads(rae: Any, release: Release, tmp_path: Path) -> None:
    rae("export", "official", "decoder/vit", tmp_path / "out", "-w", rae.workspace).succeeded()
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert (config.decoder_hidden_size, config.decoder_num_attention_heads) == (DECODER.hidden_size, DECODER.num_heads)
    assert (config.decoder_num_hidden_layers, config.decoder_intermediate_size) == (DECODER.depth, 24)
    assert (config.layer_norm_eps, config.qkv_bias) == (1e-12, True)


def test_nothing_is_overwritten(rae: Any, release: Release, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "stat.pt").write_text("mine")
    rae("export", "official", "decoder/vit", out, "-w", rae.workspace).refused(4, "stat.pt is there already")
    assert [path.name for path in out.iterdir()] == ["stat.pt"]


def test_what_the_official_code_cannot_load_is_refused(rae_with: Any, tmp_path: Path) -> None:
    rae = rae_with("decoder", "dit", "samples")
    for ref, words in (
        ("decoder/tiny", ("efficientnet-lite0", "timm")),
        ("dit/tiny", ("efficientnet-lite0", "timm")),
        ("samples/tiny", ("of kind samples",)),
    ):
        rae("export", "official", ref, tmp_path / "out", "-w", rae.workspace).refused(2, *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("about", "words"),
    [
        (described("data"), "predicts data"),
        (described("noise", "VP"), "VP path"),
        (described(num_classes=0), "unconditional"),
    ],
)
def test_what_the_official_sampler_would_misread_is_refused(about: DitDescription, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_transport(about, ARTIFACT)
    check_transport(described("noise", "GVP"), ARTIFACT)


def test_a_dinov2_without_registers_is_refused() -> None:
    check_encoder(DINOV2, ARTIFACT)
    with pytest.raises(ConfigError, match="no registers"):
        check_encoder({"name": "facebook/dinov2-base", "kind": "dinov2"}, ARTIFACT)


@pytest.mark.parametrize("changes", [{}, {"model": "LightningDiT", "hidden_size": 32, "depth": 1, "num_heads": 4}])
def test_the_transformers_configuration_reads_back(changes: dict[str, Any]) -> None:
    changes = {key: (value,) if isinstance(value, int) else value for key, value in changes.items()}
    about = described(**changes)
    official = yaml.safe_load(yaml.safe_dump(official_config(about, Path("out"))))
    assert DiTConfig.from_dict(dit_settings(official["stage_2"], "here")) == about.config
    assert transport_settings(official) == about.transport
    assert official["misc"]["time_dist_shift_base"] == 4096


@pytest.mark.parametrize("name", RELEASED)
def test_what_is_exported_has_the_official_names_and_shapes(name: str) -> None:
    kind: Any = "decoder" if name.startswith("decoder") else "dit"
    state = {key: torch.empty(shape, device="meta") for key, shape in RELEASED[name].items()}
    checkpoint = Checkpoint(Path(name), kind, state, "ema")
    # Strict in both directions: what is inferred holds these tensors and no others, and exports write all it holds.
    if kind == "decoder":
        infer_decoder(checkpoint, {"mean": (0.5,) * 3, "std": (0.5,) * 3})
    else:
        infer_dit(checkpoint)
