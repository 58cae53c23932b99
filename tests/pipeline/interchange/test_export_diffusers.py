"""`rae export diffusers`: a decoder that was trained here becomes a folder that diffusers loads whole."""

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

import rae as api
from rae.store.latents import LatentStore
from tests.conftest import TINY, Rae
from tests.pipeline.interchange.released import Release
from tests.stages.models.test_autoencoder_rae import dinov2, images


@pytest.fixture(autouse=True)
def _no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Rae:
    """Latents of 16 x 16 tokens and a decoder of them."""
    folder = tmp_path_factory.mktemp("trained")
    encode = {"encoder": str(dinov2(folder / "encoder")), "image_size": 32, "encoder_input_size": 224}
    sections = {
        "shards": {"train": "digits", "limit": 12},
        "encode": encode | {"horizontal_flip": False, "batch_size": 4},
        "train_decoder": TINY["train_decoder"] | {"steps": 2, "batch_size": 4},
    }
    rae = Rae(folder, sections)
    rae.verb("encode").succeeded()
    rae.verb("train-decoder").succeeded()
    return rae


def exporting(rae: Rae, out: Path, *words: object) -> Any:
    return rae("export", "diffusers", "decoder/tiny", out, "-w", rae.workspace, *words)


def test_an_exported_decoder_loads_whole_and_reconstructs_as_here(trained: Rae, tmp_path: Path) -> None:
    encoder = trained.folder / "encoder"
    words = ("--encoder", encoder, "--stats", "latents/tiny")
    made = exporting(trained, tmp_path / "out", *words, "--json").succeeded().json
    assert [Path(path).name for path in made["files"]] == ["config.json", "diffusion_pytorch_model.safetensors"]
    model, report = diffusers.AutoencoderRAE.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values())
    autoencoder = api.load_autoencoder("tiny", workspace=str(trained.workspace), encoder=str(encoder))
    (folder,) = (trained.workspace / "objects" / "latents").iterdir()
    batch = images(32)
    with torch.inference_mode():
        tokens = autoencoder.encode(batch)
        torch.testing.assert_close(model(batch).sample.clamp(0, 1), autoencoder.decode(tokens), atol=1e-3, rtol=0)
        whitened = torch.from_numpy(LatentStore(folder).stats.whiten(tokens.numpy()))
        torch.testing.assert_close(model.encode(batch).latent, whitened, atol=1e-3, rtol=1e-4)

    again = ("import", "diffusers", tmp_path / "out", "--name", "back", "--encoder", encoder)
    trained(*again, "-w", trained.workspace).succeeded()
    back, ours = (api.load_decoder(name, workspace=str(trained.workspace)) for name in ("back", "tiny"))
    assert back.encoder == ours.encoder
    assert all(torch.equal(one, back.state_dict()[name]) for name, one in ours.state_dict().items())
    exporting(trained, tmp_path / "out", *words).succeeded()  # the same files: nothing to refuse
    raw = exporting(trained, tmp_path / "raw", "--encoder", encoder).succeeded()
    assert "latents are raw" in raw.out
    exporting(trained, tmp_path / "out", "--encoder", encoder).refused(4, "config.json is there already")


def test_the_encoder_must_be_here_and_be_the_decoders(trained: Rae, tmp_path: Path) -> None:
    out = tmp_path / "out"
    exporting(trained, out).refused(3, "holds the encoder, too", "`encoder` is not to be found", "--encoder FOLDER")
    other = dinov2(tmp_path / "other", layerscale_value=0.5)
    exporting(trained, out, "--encoder", other).refused(4, "encoder.digest", "`other`")
    exporting(trained, out, "--encoder", "efficientnet-lite0").refused(2, "a dinov2", "is a timm")
    exporting(trained, out, "--encoder", "no/where").refused(3, "no/where", "export diffusers decoder/tiny")
    assert not out.exists()


def test_what_is_no_such_autoencoder_is_refused(rae_with: Any, tmp_path: Path) -> None:
    rae = rae_with("decoder", "samples")
    exporting(rae, tmp_path / "out").refused(2, "efficientnet-lite0", "a timm")
    rae("export", "diffusers", "samples/tiny", tmp_path / "out", "-w", rae.workspace).refused(2, "of kind samples")


def test_statistics_come_from_the_decoder_the_latents_or_a_dit(trained: Rae, rae_with: Any, tmp_path: Path) -> None:
    other = rae_with("latents", "samples").workspace
    words = ("--encoder", trained.folder / "encoder", "--stats")
    exporting(trained, tmp_path / "out", *words, other / "objects/latents").refused(3)
    (latents,) = (other / "objects/latents").iterdir()
    exporting(trained, tmp_path / "out", *words, latents).refused(4, "the encoder of these latents makes")
    (samples,) = (other / "objects/samples").iterdir()
    exporting(trained, tmp_path / "out", *words, samples).refused(2, "has no latent statistics")


def test_released_models_need_their_encoder(rae: Any, tmp_path: Path) -> None:
    (tmp_path / "release").mkdir()
    release = Release(tmp_path / "release")
    words = ("--name", "tiny", "--config", release.config, "-w", rae.workspace)
    rae("import", "official", release.model, *words).succeeded()
    exporting(rae, tmp_path / "out").refused(3, "facebook/dinov2-with-registers-base", "is not to be found here")
