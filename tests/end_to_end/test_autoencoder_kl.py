"""The baseline's whole way: an AutoencoderKL encodes, a transformer learns its latents, its own decoder shows them."""

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

import rae as api
from rae.store.latents import LatentStore
from tests.conftest import TINY, Rae, one_thread
from tests.stages.models.test_autoencoder_kl import saved


@pytest.fixture
def baseline(tmp_path: Path) -> Rae:
    saved(tmp_path / "vae")
    encode = {"encoder": str(tmp_path / "vae"), "image_size": 32, "horizontal_flip": False, "batch_size": 8}
    sections: dict[str, Any] = {key: TINY[key] for key in ("shards", "train_dit", "evaluate")}
    sections |= {"encode": encode, "sample": TINY["sample"] | {"decoder": "vae"}}
    return Rae(tmp_path / "baseline", sections)


def test_from_digits_to_scores_with_its_own_decoder(baseline: Rae, tmp_path: Path) -> None:
    imported = baseline("import", "diffusers", tmp_path / "vae", "--name", "vae", "-w", baseline.workspace, "--json")
    made = imported.succeeded().json
    assert (made["kind"], made["metrics"]["image_size"]) == ("decoder", 32)
    for verb in ("encode", "train-dit", "evaluate"):
        baseline.verb(verb).succeeded()
    shown = baseline.artifact("latents/tiny")
    assert shown["metrics"]["shape"] == [4, 8, 8]
    assert shown["encoder"]["kind"] == "autoencoder_kl"
    assert baseline.artifact("decoder/vae")["encoder"] == shown["encoder"]
    assert f"decoder/{made['id']}" in baseline.artifact("samples/tiny")["inputs"]
    assert {"reconstruction_psnr_db", "frechet_distance"} <= set(baseline.artifact("scores/tiny")["metrics"])

    # Stored latents are raw: its decoder takes them as they are, and a transformer's come back to that scale.
    model: Any = diffusers.AutoencoderKL.from_pretrained(tmp_path / "vae")
    store = LatentStore(baseline.workspace / "objects" / "latents" / shown["id"], raw=True)
    whitened = LatentStore(baseline.workspace / "objects" / "latents" / shown["id"])
    stored = torch.from_numpy(store.rows(range(4), 0)).float()
    decoder, dit = api.load_decoder("vae", str(baseline.workspace)), api.load_dit("tiny", str(baseline.workspace))
    with torch.no_grad(), one_thread():
        expected = (model.decode(stored).sample / 2 + 0.5).clamp(0, 1)
        torch.testing.assert_close(decoder(stored), expected, atol=1e-5, rtol=0)
        back = dit.raw(torch.stack([torch.from_numpy(whitened[row]["latent"]) for row in range(4)]))
    torch.testing.assert_close(back, stored, atol=1e-3, rtol=1e-3)


def test_a_decoder_for_another_size_is_refused(baseline: Rae, tmp_path: Path) -> None:
    words = ("import", "diffusers", tmp_path / "vae", "--name", "vae", "-w", baseline.workspace)
    baseline(*words, "--image-size", 64).succeeded()
    for verb in ("encode", "train-dit"):
        baseline.verb(verb).succeeded()
    baseline.verb("sample").refused(4, "encoder.grid", "encoder.input_size")
    baseline(*words, "--image-size", 30).refused(2, "not a multiple of the stride 4")


def test_what_has_no_decoder_is_not_imported(baseline: Rae) -> None:
    words = ("--name", "other", "-w", baseline.workspace)
    said = baseline("import", "diffusers", "efficientnet-lite0", *words)
    said.refused(2, "no AutoencoderKL", "rae train-decoder CONFIG -s encode.encoder=efficientnet-lite0")
    baseline("import", "diffusers", "no/vae", *words).refused(3, "not in the Hugging Face cache", "--allow-download")
