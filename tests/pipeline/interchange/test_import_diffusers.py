"""`rae import diffusers` of an AutoencoderRAE: its decoder, its statistics, and the encoder that is inside."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import rae as api
from rae.stages.models.autoencoder_rae import WEIGHTS_FILE, read_autoencoder_rae
from rae.stages.models.backbones import load_hugging_face
from rae.stages.models.weights import locate_encoder
from tests.stages.models.test_autoencoder_rae import dinov2, images, siglip, theirs


@pytest.fixture(autouse=True)
def _no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture
def importing(rae: Any) -> Any:
    """`importing(FOLDER, WORDS...)` runs `rae import diffusers FOLDER --name vit WORDS... -w WORKSPACE`."""
    return lambda folder, *words: rae("import", "diffusers", folder, "--name", "vit", *words, "-w", rae.workspace)


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    return dinov2(tmp_path / "encoder")


def holding(folder: Path, encoder: Path, prefix: str = "encoder.", **changes: Any) -> Any:
    """A model of diffusers with the weights of an encoder that transformers saved; returns the decoder in it."""
    model = theirs(folder)
    own = load_hugging_face(locate_encoder(str(encoder))).state_dict()
    kept = {name: one for name, one in load_file(folder / WEIGHTS_FILE).items() if not name.startswith("encoder.")}
    inside = {f"{prefix}{name}": one for name, one in own.items() if not name.startswith(("layernorm", "post_layer"))}
    save_file(kept | inside, folder / WEIGHTS_FILE)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return model


def test_an_imported_autoencoder_reconstructs_as_in_diffusers(
    rae: Any, importing: Any, encoder: Path, tmp_path: Path
) -> None:
    holding(tmp_path / "model", encoder)
    made = importing(tmp_path / "model", "--encoder", encoder, "--json").succeeded().json
    assert (made["kind"], made["metrics"]["image_size"]) == ("decoder", 8)
    import diffusers

    model = diffusers.AutoencoderRAE.from_pretrained(tmp_path / "model")
    autoencoder = api.load_autoencoder("vit", workspace=str(rae.workspace), encoder=str(encoder))
    batch = images(8)
    with torch.inference_mode():
        expected = model(batch).sample.clamp(0, 1)
        torch.testing.assert_close(autoencoder.decode(autoencoder.encode(batch)), expected, atol=1e-3, rtol=0)
    about = rae.artifact("decoder/vit")
    assert about["encoder"]["digest"] == locate_encoder(str(encoder)).digest
    (path,) = Path(about["path"]).rglob("latent_stats.safetensors")
    stats = read_autoencoder_rae(tmp_path / "model").stats
    assert stats is not None
    assert torch.equal(load_file(path)["var"], stats[1])
    assert importing(tmp_path / "model", "--encoder", encoder, "--json").succeeded().json["reused"]


def test_an_encoder_that_is_not_here_is_taken_at_its_word(rae: Any, importing: Any, tmp_path: Path) -> None:
    theirs(tmp_path / "model")
    importing(tmp_path / "model").refused(3, "64 wide, of no name that is known", "--encoder FOLDER")
    ran = importing(tmp_path / "model", "--encoder", "someone/dinov2-tiny").succeeded()
    assert "taken at its word" in ran.out
    assert "stretched over 2 x 2" in ran.out
    about = rae.artifact("decoder/vit")["encoder"]
    assert (about["name"], about["digest"], about["input_size"]) == ("someone/dinov2-tiny", None, 28)
    assert about["mean"] == [0.485, 0.456, 0.406]


def test_another_encoder_than_the_one_inside_is_refused(importing: Any, encoder: Path, tmp_path: Path) -> None:
    holding(tmp_path / "model", encoder)
    other = dinov2(tmp_path / "other", layerscale_value=0.5)
    importing(tmp_path / "model", "--encoder", other).refused(4, "is not", "its weights differ", "--encoder")
    said = json.loads((encoder / "preprocessor_config.json").read_text())
    (encoder / "preprocessor_config.json").write_text(json.dumps(said | {"image_std": [0.5, 0.5, 0.5]}))
    importing(tmp_path / "model", "--encoder", encoder).refused(4, "encoder.std: found [0.5, 0.5, 0.5]")
    importing(tmp_path / "model", "--encoder", siglip(tmp_path / "siglip")).refused(4, "is a dinov2", "is a siglip")
    (tmp_path / "empty").mkdir()
    importing(tmp_path / "model", "--encoder", tmp_path / "empty").refused(3, "has no config.json")


def test_a_siglip_by_its_older_names_is_recognised(rae: Any, importing: Any, tmp_path: Path) -> None:
    encoder = siglip(tmp_path / "encoder")
    sizes = {"encoder_type": "siglip2", "encoder_patch_size": 16, "encoder_input_size": 32}
    holding(tmp_path / "model", encoder, "encoder.vision_model.", **sizes)
    importing(tmp_path / "model", "--encoder", encoder).succeeded()
    assert rae.artifact("decoder/vit")["encoder"]["digest"] == locate_encoder(str(encoder)).digest


def test_options_of_the_other_class_are_refused(importing: Any, tmp_path: Path) -> None:
    theirs(tmp_path / "model")
    importing(tmp_path / "model", "--image-size", 8).refused(2, "`--image-size` has no part")
    importing("no/model").refused(3, "not in the Hugging Face cache", "import diffusers no/model --name vit --allow")
    importing(tmp_path / "nothing").refused(2, "is no encoder")
