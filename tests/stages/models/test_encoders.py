"""Frozen encoders: strict loading, geometry, resizing, determinism; numbers against transformers and timm."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_sample_image

import rae as api
from rae.stages.models.encoders import Encoder, describe, encoder_geometry, load_encoder
from rae.stages.models.geometry import input_size_for
from rae.stages.models.weights import locate_encoder
from rae.store.errors import ConfigError, CorruptData, MissingInput

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
PREPROCESSING = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.25], "size": {"height": 32, "width": 32}}


def images(count: int = 2, size: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def saved(model: Any, folder: Path, **options: Any) -> Path:
    """A Hugging Face folder with weights that differ from their initial zeros and ones everywhere."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    model.save_pretrained(folder, **options)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSING))
    return folder


def dinov2(folder: Path, registers: int | None = None, sizes: dict[str, Any] | None = None, **options: Any) -> Path:
    shape = SMALL | {"patch_size": 8, "image_size": 32, "mlp_ratio": 2} | (sizes or {})
    if registers is None:
        return saved(transformers.Dinov2Model(transformers.Dinov2Config(**shape)), folder, **options)
    config = transformers.Dinov2WithRegistersConfig(**shape, num_register_tokens=registers)
    return saved(transformers.Dinov2WithRegistersModel(config), folder, **options)


def siglip(folder: Path) -> Path:
    config = transformers.SiglipVisionConfig(**SMALL, intermediate_size=64, patch_size=8, image_size=32)
    return saved(transformers.SiglipVisionModel(config), folder)


def naflex(folder: Path) -> Path:
    config = transformers.Siglip2VisionConfig(**SMALL, intermediate_size=64, patch_size=8, num_patches=16)
    return saved(transformers.Siglip2VisionModel(config), folder)


def mae(folder: Path) -> Path:
    config = transformers.ViTMAEConfig(**SMALL, intermediate_size=64, patch_size=8, image_size=32)
    return saved(transformers.ViTMAEModel(config), folder)


MAKERS = {
    "dinov2": dinov2,
    "dinov2_with_registers": lambda folder: dinov2(folder, registers=4),
    "siglip_vision_model": siglip,
    "siglip2_vision_model": naflex,
    "vit_mae": mae,
}


@pytest.fixture(scope="module")
def lite0() -> Encoder:
    return load_encoder(locate_encoder("efficientnet-lite0"), 64)


class TestHuggingFace:
    @pytest.mark.parametrize("model_type", list(MAKERS))
    def test_tokens_have_unit_scale_and_the_stated_geometry(self, tmp_path: Path, model_type: str) -> None:
        files = locate_encoder(str(MAKERS[model_type](tmp_path)))
        for input_size, side in ((None, 4), (48, 6)):  # 48: another grid than the position table's
            encoder = load_encoder(files, input_size)
            assert (encoder.token_dim, encoder.grid, encoder.input_size) == (32, (side, side), input_size or 32)
            assert encoder_geometry(files, input_size) == (32, (side, side))
            tokens = encoder(images())
            assert tokens.shape == (2, 32, side, side)
            torch.testing.assert_close(tokens.mean(dim=1), torch.zeros(2, side, side), atol=1e-5, rtol=0)
            torch.testing.assert_close(tokens.var(dim=1, correction=0), torch.ones(2, side, side), atol=1e-3, rtol=0)

    def test_plain_dinov2_drops_the_class_token(self, tmp_path: Path) -> None:
        folder = dinov2(tmp_path)
        batch = images()
        tokens = load_encoder(locate_encoder(str(folder)))(batch)
        model = transformers.Dinov2Model.from_pretrained(folder)
        mean, std = (torch.tensor(PREPROCESSING[key]).reshape(3, 1, 1) for key in ("image_mean", "image_std"))
        with torch.no_grad():
            hidden = model((batch - mean) / std, output_hidden_states=True).hidden_states[-1]
        expected = F.layer_norm(hidden[:, 1:], (32,), eps=1e-6).transpose(1, 2).unflatten(2, (4, 4))
        torch.testing.assert_close(tokens, expected, atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("patch_size", [8, 14, 16, 32])
    def test_any_patch_size_and_the_feed_forward_of_the_giant(self, tmp_path: Path, patch_size: int) -> None:
        sizes = {"patch_size": patch_size, "image_size": 4 * patch_size, "use_swiglu_ffn": True}
        files = locate_encoder(str(dinov2(tmp_path, registers=1, sizes=sizes)))
        encoder = load_encoder(files, 3 * patch_size)
        assert (encoder.token_dim, encoder.grid) == encoder_geometry(files, 3 * patch_size) == (32, (3, 3))
        assert encoder(images(size=3 * patch_size)).shape == (2, 32, 3, 3)
        assert input_size_for(files, 256) == 16 * patch_size

    @pytest.mark.parametrize("whole", [False, True])
    def test_siglip2_of_variable_resolution_gets_the_patches_of_its_own_processor(
        self, tmp_path: Path, whole: bool
    ) -> None:
        vision = SMALL | {"intermediate_size": 64, "patch_size": 8, "num_patches": 16}
        text = SMALL | {"intermediate_size": 64, "vocab_size": 16, "max_position_embeddings": 4}
        config = transformers.Siglip2Config(text_config=text, vision_config=vision)
        model = transformers.Siglip2Model(config) if whole else transformers.Siglip2VisionModel(config.vision_config)
        encoder = load_encoder(locate_encoder(str(saved(model, tmp_path))), 48)
        pixels = np.random.default_rng(0).integers(0, 256, (48, 48, 3), np.uint8)
        processor = transformers.Siglip2ImageProcessor(
            patch_size=8,
            max_num_patches=36,
            image_mean=PREPROCESSING["image_mean"],
            image_std=PREPROCESSING["image_std"],
        )
        inputs = processor(images=[Image.fromarray(pixels)], return_tensors="pt")
        reference = transformers.Siglip2VisionModel.from_pretrained(tmp_path)
        reference.post_layernorm = torch.nn.LayerNorm(32, eps=1e-6, elementwise_affine=False)
        with torch.no_grad():
            hidden = reference.eval()(**inputs).last_hidden_state
        tokens = encoder(torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255)
        expected = hidden.transpose(1, 2).unflatten(2, (6, 6))
        torch.testing.assert_close(tokens, expected, atol=1e-5, rtol=1e-5)

    def test_mae_masks_nothing_and_keeps_the_order_of_patches(self, tmp_path: Path) -> None:
        encoder = load_encoder(locate_encoder(str(mae(tmp_path))))
        batch = images(1)
        changed = batch.clone()
        changed[:, :, 8:16, 24:32] = 0  # the patch in row 1, column 3
        moved = (encoder(changed) - encoder(batch)).abs().sum(dim=1)[0]
        assert moved.argmax() == 1 * 4 + 3
        torch.testing.assert_close(encoder(batch), encoder(batch), atol=0, rtol=0)

    def test_vision_tower_of_a_whole_siglip(self, tmp_path: Path) -> None:
        vision = SMALL | {"intermediate_size": 64, "patch_size": 8, "image_size": 32}
        text = SMALL | {"intermediate_size": 64, "vocab_size": 16, "max_position_embeddings": 4}
        config = transformers.SiglipConfig(text_config=text, vision_config=vision)
        files = locate_encoder(str(saved(transformers.SiglipModel(config), tmp_path)))
        assert load_encoder(files)(images()).shape == (2, 32, 4, 4)

    def test_same_weights_in_shards_and_as_a_torch_file(self, tmp_path: Path) -> None:
        whole = dinov2(tmp_path / "whole", registers=4)
        expected = load_encoder(locate_encoder(str(whole)))(images())
        shards = dinov2(tmp_path / "shards", registers=4, max_shard_size="20KB")
        weights = load_file(whole / "model.safetensors")
        for shard in shards.glob("model-*.safetensors"):
            save_file({key: weights[key] for key in load_file(shard)}, shard, metadata={"format": "pt"})
        assert len(list(shards.glob("model-*.safetensors"))) > 1
        pickled = dinov2(tmp_path / "pickled", registers=4)
        (pickled / "model.safetensors").unlink()
        torch.save(weights, pickled / "pytorch_model.bin")
        for folder in (shards, pickled):
            torch.testing.assert_close(
                load_encoder(locate_encoder(str(folder)))(images()), expected, atol=0, rtol=0, msg=folder.name
            )

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            (lambda weights: weights.pop("embeddings.cls_token"), "lacks the tensor `embeddings.cls_token`"),
            (lambda weights: weights.update(extra=torch.ones(1)), "has an unknown tensor `extra`"),
            (lambda weights: weights.update({"embeddings.cls_token": torch.ones(1, 1, 8)}), "cannot be loaded"),
        ],
    )
    def test_weights_that_are_not_the_models(self, tmp_path: Path, change: Any, says: str) -> None:
        folder = dinov2(tmp_path)
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(CorruptData, match=says):
            load_encoder(locate_encoder(str(folder)))

    def test_truncated_weights(self, tmp_path: Path) -> None:
        file = dinov2(tmp_path) / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-1000])
        with pytest.raises(CorruptData, match="cannot be loaded"):
            load_encoder(locate_encoder(str(tmp_path)))

    def test_pickles_with_code_are_not_run(self, tmp_path: Path) -> None:
        folder = dinov2(tmp_path)
        (folder / "model.safetensors").unlink()
        torch.save({"weights": Trap(tmp_path / "trapped")}, folder / "pytorch_model.bin")
        with pytest.raises(CorruptData):
            load_encoder(locate_encoder(str(folder)))
        assert not (tmp_path / "trapped").exists()

    def test_loading_is_silent(self, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
        files = locate_encoder(str(mae(tmp_path)))
        capfd.readouterr()
        load_encoder(files)
        assert capfd.readouterr() == ("", "")


class Trap:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


class TestTimm:
    def test_description(self, lite0: Encoder) -> None:
        described = describe(lite0)
        assert json.loads(json.dumps(described)) == described
        digest = described.pop("digest")
        assert digest == locate_encoder("efficientnet-lite0").digest
        assert described == {
            "name": "efficientnet-lite0",
            "kind": "timm",
            "token_dim": 112,
            "grid": [4, 4],
            "input_size": 64,
            "mean": [0.5, 0.5, 0.5],
            "std": [0.5, 0.5, 0.5],
            "feature_index": 3,
            "version": None,
        }

    @pytest.mark.parametrize(("picture", "label"), [("china.jpg", 698), ("flower.jpg", 985)])
    def test_packaged_weights_recognise_photographs(self, lite0: Encoder, picture: str, label: int) -> None:
        """ImageNet's `palace` and `daisy`: the weights are pretrained, and every tensor went to its place."""
        pixels = torch.from_numpy(np.array(load_sample_image(picture))).permute(2, 0, 1)[None] / 255
        square = pixels[..., (pixels.shape[-1] - pixels.shape[-2]) // 2 :][..., : pixels.shape[-2]]
        network: Any = lite0.backbone.model
        with torch.inference_mode():
            logits = network((F.interpolate(square, size=224, mode="bicubic", antialias=True) - 0.5) / 0.5)
        assert logits.argmax() == label

    def test_tokens_are_the_normalised_map_of_features_only(self, lite0: Encoder) -> None:
        reference = timm.create_model("tf_efficientnet_lite0", features_only=True).eval()
        network: Any = lite0.backbone.model
        kept = {key: value for key, value in network.state_dict().items() if key in reference.state_dict()}
        reference.load_state_dict(kept)
        batch = images(size=64)
        with torch.inference_mode():
            maps = reference((batch - 0.5) / 0.5)
            tokens, features = lite0(batch), lite0.features(batch)
        expected = F.layer_norm(maps[3].permute(0, 2, 3, 1), (112,), eps=1e-6).permute(0, 3, 1, 2)
        torch.testing.assert_close(tokens, expected, atol=1e-5, rtol=1e-5)
        assert [tuple(feature.shape[1:]) for feature in features] == [
            (16, 32, 32),
            (24, 16, 16),
            (40, 8, 8),
            (112, 4, 4),
        ]
        for ours, theirs in zip(features, maps, strict=False):
            torch.testing.assert_close(ours, theirs, atol=0, rtol=0)

    def test_another_map_and_size(self) -> None:
        files = locate_encoder("efficientnet-lite0")
        encoder = load_encoder(files, 72, feature_index=2)
        assert encoder(images(size=72)).shape == (2, 40, 9, 9)
        assert encoder_geometry(files, 72, 2) == (encoder.token_dim, encoder.grid) == (40, (9, 9))

    def test_any_timm_model_from_a_file(self, tmp_path: Path) -> None:
        model = timm.create_model("resnet10t")
        save_file(model.state_dict(), tmp_path / "weights.safetensors")
        torch.save(model.state_dict(), tmp_path / "weights.pth")
        one, two = (
            load_encoder(locate_encoder("timm:resnet10t", str(tmp_path / name)), 64)
            for name in ("weights.safetensors", "weights.pth")
        )
        assert one.grid == (4, 4)
        torch.testing.assert_close(one(images(size=64)), two(images(size=64)), atol=0, rtol=0)

    @pytest.mark.parametrize("architecture", ["test_vit", "test_vit3"])  # with a class token, with a register
    @pytest.mark.parametrize("side", [10, 4])
    def test_vit_drops_its_prefix_token_and_interpolates_its_positions(
        self, tmp_path: Path, architecture: str, side: int
    ) -> None:
        """At the size of its positions, 10 x 10 patches of 16, and at another, against timm's own forward pass."""
        network: Any = timm.create_model(architecture, dynamic_img_size=True).eval()
        assert network.num_prefix_tokens == 1
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)), alpha=0.1)
        save_file(network.state_dict(), tmp_path / "weights.safetensors")
        files = locate_encoder(f"timm:{architecture}", str(tmp_path / "weights.safetensors"))
        encoder = load_encoder(files, side * 16)
        width = network.embed_dim
        assert (encoder.token_dim, encoder.grid) == encoder_geometry(files, side * 16) == (width, (side, side))
        batch = images(size=side * 16)
        mean, std = (torch.tensor(value).reshape(3, 1, 1) for value in (encoder.mean, encoder.std))
        network.norm = torch.nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        with torch.no_grad():
            patches = network.forward_features((batch - mean) / std)[:, network.num_prefix_tokens :]
        expected = patches.transpose(1, 2).unflatten(2, (side, side))
        torch.testing.assert_close(encoder(batch), expected, atol=1e-5, rtol=1e-5)

    def test_refusals(self, tmp_path: Path) -> None:
        files = locate_encoder("efficientnet-lite0")
        with pytest.raises(ConfigError, match="has 5 feature maps, of strides 2, 4, 8, 16, 32"):
            load_encoder(files, 64, feature_index=5)
        weights = tmp_path / "weights.safetensors"
        save_file({"a": torch.ones(1)}, weights)
        with pytest.raises(ConfigError, match="did you mean `resnet10t`"):
            encoder_geometry(locate_encoder("timm:resnet10x", str(weights)), 64)
        with pytest.raises(CorruptData, match="does not fit timm's `resnet10t`: it has the unknown"):
            load_encoder(locate_encoder("timm:resnet10t", str(weights)), 64)
        with pytest.raises(ConfigError, match="takes images of 224 pixels only"):
            encoder_geometry(locate_encoder("timm:beit_base_patch16_224", str(weights)), 64)
        with pytest.raises(ConfigError, match="cannot take images of 60 pixels"):
            encoder_geometry(locate_encoder("timm:vit_tiny_patch16_224", str(weights)), 60)
        weights.write_bytes(b"no weights")
        with pytest.raises(CorruptData, match="cannot be read as weights"):
            load_encoder(locate_encoder("timm:resnet10t", str(weights)), 64)


class TestFrozen:
    def test_stays_in_eval_mode_and_takes_no_gradient(self, lite0: Encoder) -> None:
        parent = torch.nn.Sequential(lite0).train()
        assert not any(module.training for module in lite0.modules())
        assert parent.training
        assert not any(parameter.requires_grad for parameter in lite0.parameters())

    def test_gradient_reaches_the_image(self, lite0: Encoder) -> None:
        batch = images(size=64).requires_grad_()
        lite0(batch).square().sum().backward()
        assert batch.grad is not None
        assert batch.grad.abs().amax(dim=(1, 2, 3)).min() > 0

    def test_deterministic_and_telling_images_apart(self, lite0: Encoder) -> None:
        batch = images(size=64)
        tokens = lite0(batch)
        assert torch.equal(tokens, lite0(batch))
        assert (tokens[0] - tokens[1]).abs().mean() > 0.01

    def test_other_sizes_are_resized_as_officially(self, lite0: Encoder) -> None:
        batch = images(size=96)
        resized = F.interpolate(batch, size=(64, 64), mode="bicubic", align_corners=False)
        assert torch.equal(lite0(batch), lite0(resized))

    def test_loading_leaves_the_callers_random_numbers_alone(self) -> None:
        torch.manual_seed(5)
        expected = torch.rand(3)
        torch.manual_seed(5)
        load_encoder(locate_encoder("efficientnet-lite0"), 64)
        assert torch.equal(torch.rand(3), expected)

    def test_float32_tokens_under_bf16_autocast(self, lite0: Encoder) -> None:
        batch = images(size=64)
        with torch.autocast("cpu", torch.bfloat16):
            tokens = lite0(batch)
        assert tokens.dtype == torch.float32
        assert (tokens - lite0(batch)).abs().mean() < 0.05

    def test_refuses_what_is_no_batch_of_images(self, lite0: Encoder) -> None:
        with pytest.raises(ValueError, match=r"\[B, 3, S, S\]"):
            lite0(torch.zeros(3, 64, 64))


def test_folder_without_preprocessing_is_refused(tmp_path: Path) -> None:
    folder = dinov2(tmp_path)
    (folder / "preprocessor_config.json").unlink()
    files = locate_encoder(str(folder))
    with pytest.raises(MissingInput, match="mean and std"):
        load_encoder(files)


def test_arrays_are_encoded_at_the_size_that_the_pipeline_takes_for_images_of_theirs(tmp_path: Path) -> None:
    folder = str(dinov2(tmp_path))  # patches of 8 pixels, so that images of 64 are seen at 32
    files = locate_encoder(folder)
    expected = load_encoder(files, input_size_for(files, 64))(images(size=64))
    assert expected.shape == (2, 32, 4, 4)
    torch.testing.assert_close(api.encode(images(size=64), folder), expected)
    assert api.encode(images(size=64), folder, input_size=64).shape == (2, 32, 8, 8)


@pytest.mark.parametrize(
    ("batch", "found"),
    [
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), r"torch\.uint8 \[2, 3, 8, 8\]"),
        (np.zeros((2, 3, 8, 8), np.float32), r"float32 \[2, 3, 8, 8\]"),
        (torch.zeros(3, 8, 8), r"torch\.float32 \[3, 8, 8\]"),
        ("photo.png", "a str"),
    ],
)
def test_what_is_no_batch_of_images_is_not_encoded(batch: Any, found: str) -> None:
    with pytest.raises(ConfigError, match=f"images are a float tensor .* in \\[0, 1\\] .* and these are {found}"):
        api.encode(batch, "efficientnet-lite0")
