"""Extractors by name, on drawn weights: loaded strictly, verified, and the published preprocessing to the bit."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from rae.stages.models.weights import digest_file
from rae.stages.scoring.extractor_files import INCEPTION_FILE, locate_extractor
from rae.stages.scoring.load_extractor import load_extractor
from rae.store.errors import ConfigError, CorruptData, MissingInput
from tests.stages.scoring.drawn_inception import write_inception

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


def pictures(count: int, side: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def channels_first(images: np.ndarray) -> Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2)


@pytest.fixture(scope="module")
def inception(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inception(tmp_path_factory.mktemp("inception") / "drawn.pth")


def test_inception_is_torch_fidelitys(inception: Path) -> None:
    ours = load_extractor("inception", str(inception), sha256=digest_file(inception))
    theirs = FeatureExtractorInceptionV3("theirs", ["2048", "logits_unbiased"], str(inception))
    images = pictures(3, 40)
    features, logits = (one.numpy() for one in theirs(channels_first(images)))
    found = ours(images)
    np.testing.assert_allclose(found, features, rtol=1e-3, atol=1e-5 * np.abs(features).max())
    assert found.std() > 0
    np.testing.assert_allclose(found @ ours.head.T, logits, rtol=1e-3, atol=1e-4 * np.abs(logits).max())
    protocol = ours.protocol()
    assert protocol["name"] == "inception"
    assert protocol["digest"] == digest_file(inception)
    assert "TensorFlow" in str(protocol["resize"])


def test_inception_of_another_digest_is_refused_unless_it_is_stated(inception: Path) -> None:
    with pytest.raises(CorruptData, match=r"and 6726825d\.\.\. is expected.*`evaluate\.extractor_sha256`"):
        load_extractor("inception", str(inception))
    assert locate_extractor("inception", str(inception), digest_file(inception)[:12].upper()).name == "inception"


def test_inception_that_is_missing_says_what_and_where(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(MissingInput, match="sha256 6726825d") as told:
        load_extractor("inception")
    assert str(tmp_path / "hub/checkpoints" / INCEPTION_FILE) in told.value.message
    assert "evaluate.extractor_weights" in str(told.value.next_command)
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    (tmp_path / "hub/checkpoints" / INCEPTION_FILE).write_bytes(b"cut off")
    with pytest.raises(CorruptData, match="6726825d"):
        load_extractor("inception")


def test_a_file_that_would_run_code_is_not_unpickled(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "ran",)

    path = tmp_path / "evil.pth"
    torch.save({"a": Evil()}, path)
    with pytest.raises(CorruptData, match=r"evil\.pth cannot be read as weights"):
        load_extractor("inception", str(path), sha256=digest_file(path))
    assert not (tmp_path / "ran").exists()
    torch.save({"a": torch.zeros(1)}, path)
    with pytest.raises(CorruptData, match="does not hold the tensors of torch-fidelity's Inception"):
        load_extractor("inception", str(path), sha256=digest_file(path))


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny DINOv2 with positions for 6 x 6 patches of 14 pixels."""
    torch.manual_seed(0)
    config = transformers.Dinov2Config(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=84, patch_size=14, mlp_ratio=2
    )
    folder = tmp_path_factory.mktemp("dinov2")
    model = transformers.Dinov2Model(config)
    nn.init.normal_(model.embeddings.position_embeddings)
    model.save_pretrained(folder)
    return folder


def reference_dinov2(folder: Path, inputs: Tensor) -> np.ndarray:
    """The class token with positions moved as in torch hub's code, written out for this test."""
    model = transformers.Dinov2Model.from_pretrained(folder).eval()
    trained = model.embeddings.position_embeddings.detach()
    grid = trained[0, 1:].T.reshape(1, 24, 6, 6)
    moved = F.interpolate(grid, scale_factor=(16.1 / 6, 16.1 / 6), mode="bicubic")
    assert moved.shape[2:] == (16, 16)
    positions = torch.cat([trained[:, :1], moved.flatten(2).transpose(1, 2)], dim=1)
    tokens = model.embeddings.patch_embeddings(inputs)
    tokens = torch.cat([model.embeddings.cls_token.expand(len(inputs), -1, -1), tokens], dim=1) + positions
    with torch.inference_mode():
        for block in model.encoder.layer if hasattr(model, "encoder") else model.layers:
            out = block(tokens)
            tokens = out[0] if isinstance(out, tuple) else out
        return model.layernorm(tokens)[:, 0].numpy()


def test_dinov2_of_dgm_eval_sees_what_pillow_makes(dinov2: Path) -> None:
    images = pictures(3, 64)
    resized = [np.asarray(Image.fromarray(one).resize((224, 224), Image.Resampling.BICUBIC)) for one in images]
    expected = reference_dinov2(dinov2, (channels_first(np.stack(resized)) / 255 - MEAN) / STD)
    ours = load_extractor("dinov2-dgm-eval", str(dinov2))
    np.testing.assert_allclose(ours(images), expected, atol=2e-5)
    assert "Pillow" in str(ours.protocol()["resize"])


def test_dinov2_of_edm2_sees_what_torch_makes(dinov2: Path) -> None:
    images = pictures(3, 300)
    resized = F.interpolate(channels_first(images).float(), size=(224, 224), mode="bicubic", antialias=True)
    expected = reference_dinov2(dinov2, (resized / 255 - MEAN) / STD)
    ours, other = load_extractor("dinov2-edm2", str(dinov2)), load_extractor("dinov2-dgm-eval", str(dinov2))
    np.testing.assert_allclose(ours(images), expected, atol=2e-5)
    apart, error = (np.abs(one(images) - expected).max() for one in (other, ours))
    assert apart > 2 * error, "two protocols, two scores"
    assert ours.protocol() != other.protocol()
    assert ours.digest == other.digest


def test_dinov2_that_is_missing_or_another_model_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(MissingInput, match="facebook/dinov2-large"):
        load_extractor("dinov2-edm2")
    config = transformers.ViTMAEConfig(hidden_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=32)
    transformers.ViTMAEModel(config).save_pretrained(tmp_path / "mae")
    with pytest.raises(ConfigError, match="`mae` is another model"):
        load_extractor("dinov2-edm2", str(tmp_path / "mae"))


class Quarters(nn.Module):
    def forward(self, images: Tensor, return_features: bool = False) -> Tensor:
        pooled = F.adaptive_avg_pool2d(images.float(), 2).flatten(1)
        return pooled if return_features else pooled[:, :1]


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_a_torchscript_file_is_asked_for_features(tmp_path: Path) -> None:
    path = tmp_path / "net.pt"
    torch.jit.script(Quarters()).save(str(path))
    ours = load_extractor("torchscript", str(path))
    images = pictures(20, 10)
    assert ours.dim == 12
    expected = images.reshape(20, 2, 5, 2, 5, 3).mean(axis=(2, 4)).transpose(0, 3, 1, 2).reshape(20, 12)
    np.testing.assert_allclose(ours(images), expected, rtol=1e-5)
    assert ours.protocol()["resize"] == "the network's own"
    path.write_bytes(b"no script")
    with pytest.raises(CorruptData, match=r"net\.pt is no TorchScript network"):
        load_extractor("torchscript", str(path))
    with pytest.raises(MissingInput, match="nowhere"):
        load_extractor("torchscript", str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match=r"needs `evaluate\.extractor_weights`"):
        load_extractor("torchscript")


def test_any_timm_model_by_file(tmp_path: Path) -> None:
    import timm

    torch.manual_seed(0)
    model = timm.create_model("resnet10t", pretrained=False)
    torch.save(model.state_dict(), tmp_path / "drawn.pth")
    ours = load_extractor("timm:resnet10t", str(tmp_path / "drawn.pth"), input_size=64)
    images = pictures(2, 64)
    config = model.pretrained_cfg
    mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.inference_mode():
        inputs = (channels_first(images) / 255 - mean) / std
        expected = model.eval().forward_head(model.forward_features(inputs), pre_logits=True).numpy()
    np.testing.assert_allclose(ours(images), expected, rtol=1e-3, atol=1e-5)
    with pytest.raises(ConfigError, match="needs `weights`"):
        load_extractor("timm:resnet10t")


def test_a_protocol_that_fixes_its_resize_takes_no_other(inception: Path, dinov2: Path) -> None:
    for name, weights in (("inception", inception), ("dinov2-edm2", dinov2)):
        with pytest.raises(ConfigError, match=r"`evaluate\.extractor_input_size` has no part"):
            load_extractor(
                name, str(weights), input_size=128, sha256=digest_file(weights) if weights.is_file() else None
            )
