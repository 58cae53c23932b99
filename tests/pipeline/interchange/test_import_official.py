"""Released checkpoints come in by one command each, and make the images that their tensors make by hand."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

import rae as api
from rae.stages.models.decoder import DecoderConfig, ViTDecoder
from rae.stages.models.discriminator import DinoDiscriminator
from rae.stages.models.dit import DiTConfig, build_dit
from tests.pipeline.interchange.released import DECODER, DIT, Release

PARITY = Path(__file__).parents[2] / "parity"


@pytest.fixture(autouse=True)
def _no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Release:
    return Release(tmp_path_factory.mktemp("release"))


@pytest.fixture
def importing(rae: Any) -> Any:
    """`importing(FILE, WORDS...)` runs `rae import official FILE WORDS... -w WORKSPACE`."""
    return lambda *words: rae("import", "official", *words, "-w", rae.workspace)


@pytest.fixture
def imported(importing: Any, release: Release) -> None:
    importing(release.model, "--name", "vit", "--stats", release.stat, "--config", release.config).succeeded()
    importing(release.checkpoint, "--name", "dh", "--stats", release.stat).succeeded()


@pytest.mark.usefixtures("imported")
def test_imported_models_make_the_images_that_their_tensors_make(rae: Any, release: Release) -> None:
    where = str(rae.workspace)
    dit, decoder = api.load_dit("dh", workspace=where), api.load_decoder("vit", workspace=where)
    by_hand = release.images([0, 2], seed=5, num_steps=3)
    assert by_hand.shape == (2, 256, 256, 3)
    assert by_hand.std() > 1
    assert np.array_equal(api.sample(dit, decoder, [0, 2], seed=5, num_steps=3, batch_size=2), by_hand)


@pytest.mark.usefixtures("imported")
def test_a_configuration_samples_imported_models_by_name(rae: Any, release: Release) -> None:
    sample = {
        "dit": "dh",
        "decoder": "decoder/vit",
        "num_images": 2,
        "classes": [1, 0],
        "num_steps": 3,
        "batch_size": 2,
    }
    rae.config.write_text(yaml.safe_dump({"name": "released", "sample": {**sample, "seed": 5}}))
    samples = rae.verb("sample", "--json").succeeded().json
    (path,) = Path(samples["path"]).rglob("*.npz")
    assert np.array_equal(np.load(path)["images"], release.images([1, 0], seed=5, num_steps=3))


def test_a_decoder_keeps_statistics_and_says_what_it_took_at_its_word(
    rae: Any, importing: Any, release: Release
) -> None:
    words = (release.model, "--name", "vit", "--stats", release.stat, "--config", release.config)
    ran = importing(*words).succeeded()
    assert "taken at its word" in ran.out
    about = rae.artifact("decoder/vit")
    encoder = about["config"]["import_official"]["encoder"]
    assert (encoder["name"], encoder["digest"]) == ("facebook/dinov2-with-registers-base", None)
    assert about["metrics"]["parameters"] == sum(tensor.numel() for tensor in release.decoder.parameters())
    (stats,) = Path(about["path"]).rglob("latent_stats.safetensors")
    assert torch.equal(load_file(stats)["var"], release.var)


def test_the_same_files_are_imported_once(importing: Any, release: Release) -> None:
    words = (release.model, "--name", "vit", "--config", release.config, "--json")
    first, again = (importing(*words).succeeded().json for _ in range(2))
    other = importing(*words, "--stats", release.stat).succeeded().json
    assert (first["reused"], again["reused"], other["reused"]) == (False, True, False)
    assert first["id"] == again["id"] != other["id"]


def test_the_raw_weights_of_a_checkpoint_are_taken_if_asked(rae: Any, importing: Any, release: Release) -> None:
    importing(release.checkpoint, "--name", "raw", "--stats", release.stat, "--weights", "model").succeeded()
    raw = api.load_dit("raw", workspace=str(rae.workspace)).model.state_dict()
    assert all(torch.equal(tensor, release.dit.state_dict()[name] + 1) for name, tensor in raw.items())


@pytest.mark.usefixtures("imported")
def test_the_weights_that_an_import_does_not_have_are_refused(rae: Any) -> None:
    rae.config.write_text(
        yaml.safe_dump({"name": "raw", "sample": {"dit": "dh", "decoder": "vit", "weights": "model", "num_images": 1}})
    )
    rae.verb("sample").refused(3, "one set of weights", "`ema`")


@pytest.mark.usefixtures("imported")
def test_a_decoder_of_another_encoder_is_refused(rae: Any, importing: Any, release: Release) -> None:
    words = ("--config", release.config, "--encoder", "facebook/vit-mae-base")
    importing(release.model, "--name", "mae", *words).succeeded()
    rae.config.write_text(yaml.safe_dump({"name": "x", "sample": {"dit": "dh", "decoder": "mae", "num_images": 1}}))
    rae.verb("sample").refused(4, "encoder.name", "vit-mae-base")


def test_an_encoder_on_this_machine_is_recorded_with_its_digest(rae: Any, importing: Any, tmp_path: Path) -> None:
    config = DecoderConfig(**DECODER.to_dict() | {"token_dim": 32, "grid": 4})
    torch.save(ViTDecoder(config).state_dict(), tmp_path / "model.pt")
    (tmp_path / "config.json").write_text(json.dumps({"decoder_num_attention_heads": 2}))
    words = ("--name", "tiny", "--config", tmp_path / "config.json", "--encoder", PARITY / "encoder_siglip2")
    importing(tmp_path / "model.pt", *words).succeeded()
    autoencoder = api.load_autoencoder("tiny", workspace=str(rae.workspace), encoder=str(PARITY / "encoder_siglip2"))
    assert autoencoder.decoder.encoder["digest"] == autoencoder.encoder.digest
    images = autoencoder.decode(autoencoder.encode(torch.rand(1, 3, 64, 64)))
    assert images.shape == (1, 3, 64, 64)


def test_imported_models_are_scored_and_reported_like_trained_ones(
    rae: Any, importing: Any, tmp_path: Path, release: Release
) -> None:
    small = {"in_channels": 32, "input_size": 4}
    decoder = ViTDecoder(DecoderConfig.from_dict({**DECODER.to_dict(), "token_dim": 32, "grid": 4}))
    dit = build_dit(DiTConfig.from_dict({**DIT.to_dict(), **small}))
    torch.save(decoder.state_dict(), tmp_path / "model.pt")
    torch.save(dit.state_dict(), tmp_path / "stage2_model.pt")
    torch.save({"var": torch.ones(32, 4, 4)}, tmp_path / "stat.pt")
    encoder = str(PARITY / "encoder_siglip2")
    words = ("--encoder", encoder, "--stats", tmp_path / "stat.pt")
    importing(tmp_path / "model.pt", "--name", "vit", "--config", release.config, *words).succeeded()
    importing(tmp_path / "stage2_model.pt", "--name", "dh", *words).succeeded()
    sections = {
        "shards": {"train": "digits", "limit": 60, "val_fraction": 0.2},
        "encode": {"encoder": encoder, "image_size": 64, "encoder_input_size": 64},
        "sample": {"dit": "dh", "decoder": "vit", "num_images": 12, "num_steps": 2, "batch_size": 12},
        "evaluate": rae.sections["evaluate"],
    }
    rae.config.write_text(yaml.safe_dump({"name": "released", **sections}))
    scores = rae.verb("evaluate", "--json").succeeded().json
    assert scores["metrics"]["reconstruction_psnr_db"] > 0
    assert set(rae.artifact("samples/released")["inputs"]) == {
        f"{kind}/{rae.artifact(f'{kind}/{name}')['id']}" for kind, name in (("dit", "dh"), ("decoder", "vit"))
    }
    rae.verb("report").succeeded()


def test_a_yaml_file_says_what_shapes_do_not(rae: Any, importing: Any, release: Release, tmp_path: Path) -> None:
    sizes = {"hidden_size": (16, 16), "depth": (1, 2), "num_heads": (2, 2)}
    narrow = DiTConfig(**{**DIT.to_dict(), **sizes})
    torch.save(build_dit(narrow).state_dict(), tmp_path / "stage2_model.pt")
    words = (tmp_path / "stage2_model.pt", "--name", "narrow", "--stats", release.stat)
    importing(*words).refused(2, "both 16 wide", "--config")
    params = {key: value for key, value in narrow.to_dict().items() if key != "model"} | {"use_rope": True}
    official = {
        "stage_1": {"params": {"encoder_params": {"model_name": "facebook/vit-mae-base"}}},
        "stage_2": {"target": "stage2.models.DDT.DiTwDDTHead", "params": params},
        "transport": {"params": {"path_type": "GVP", "time_dist_type": "logit-normal_0_1"}},
        "misc": {"time_dist_shift_dim": 16384},
    }
    yaml_file = tmp_path / "official.yaml"
    yaml_file.write_text(yaml.safe_dump(official))
    importing(*words, "--config", yaml_file).succeeded()
    about = api.load_dit("narrow", workspace=str(rae.workspace)).about
    assert about.config == narrow
    assert about.transport["path_type"] == "GVP"
    assert (about.transport["time_dist_type"], about.transport["time_dist_shift"]) == ("logit-normal", 2.0)
    assert about.encoder["name"] == "facebook/vit-mae-base"
    official["stage_2"]["params"]["use_rmsnorm"] = False
    yaml_file.write_text(yaml.safe_dump(official))
    importing(*words, "--config", yaml_file).refused(2, "use_rmsnorm")


def test_a_transformer_without_statistics_is_refused_with_the_next_command(importing: Any, release: Release) -> None:
    importing(release.checkpoint, "--name", "dh").refused(
        3, "stat.pt", f"{release.checkpoint} --name dh --stats stat.pt"
    )


def test_what_cannot_be_imported_is_refused_by_name(rae: Any, importing: Any, release: Release, tmp_path: Path) -> None:
    importing(release.model).refused(2, "--name")
    importing(release.model, "--name", "x", "--out", "x.safetensors").refused(2, "leave out `--out`")
    importing(release.model, "--name", "x", "--config", tmp_path / "nothing.yaml").refused(3, "nothing.yaml")
    importing(release.model, "--name", "../x").refused(2, "can't be a name")
    importing(tmp_path / "nothing.pt", "--name", "x").refused(3, "nothing.pt")
    importing(release.model, "--name", "x", "--config", rae.config).refused(2, "says nothing of an official model")
    importing(release.stat, "--name", "x").refused(5, "`mean`")
    importing(release.model, "--name", "x", "--encoder", PARITY / "encoder_mae").refused(4, "32 wide", "--encoder")
    damaged = {**release.decoder.state_dict(), "decoder_norm.wieght": torch.ones(16)}
    del damaged["decoder_norm.weight"]
    torch.save(damaged, tmp_path / "damaged.pt")
    importing(tmp_path / "damaged.pt", "--name", "x", "--config", release.config).refused(
        5, "unknown `decoder_norm.wieght` (did you mean `decoder_norm.weight`?)"
    )
    assert not rae.workspace.exists()


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with torch.device("meta"):
        shapes = DinoDiscriminator("S_8").backbone.state_dict()
    state: dict[str, Tensor] = {name: torch.full(tensor.shape, 0.5) for name, tensor in shapes.items()}
    path = tmp_path_factory.mktemp("discs") / "dino_vit_small_patch8_224.pth"
    torch.save(state, path)
    return path


def test_the_discriminators_backbone_becomes_a_file(importing: Any, backbone: Path, tmp_path: Path) -> None:
    out = tmp_path / "disc.safetensors"
    ran = importing(backbone, "--out", out).succeeded()
    assert f"train_decoder.disc_weights={out}" in ran.out
    written = load_file(out)
    assert all(torch.equal(tensor, written[name]) for name, tensor in torch.load(backbone, weights_only=True).items())
    discriminator = DinoDiscriminator("S_8")
    discriminator.load_backbone(out)
    assert discriminator.backbone.blocks[0].attn.qkv.bias.unique().tolist() == [0.0, 0.5]
    importing(backbone, "--name", "x").refused(2, "--out")
    importing(backbone, "--out", tmp_path / "disc.pt").refused(2, ".safetensors")
    importing(backbone, "--out", out).succeeded()
    out.write_bytes(b"mine")
    importing(backbone, "--out", out).refused(4, "is there already")
    assert [path.name for path in tmp_path.glob("disc*")] == ["disc.safetensors"]
