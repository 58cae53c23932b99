"""Perceptual distances: the published formula, gradients, and no silent substitutes."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rae.stages.models.encoders import Encoder, load_encoder
from rae.stages.models.perceptual import EncoderDistance, LpipsDistance, build_perceptual
from rae.stages.models.weights import locate_encoder
from rae.store.errors import ConfigError, CorruptData, MissingInput
from tests.stages.models.drawn_weights import vgg_features, write_vgg

RELUS = (3, 8, 15, 22, 29)  # relu1_2, relu2_2, relu3_3, relu4_3, relu5_3


def images(count: int = 2, size: int = 64, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return load_encoder(locate_encoder("efficientnet-lite0"), 64)


@pytest.fixture(scope="module")
def vgg() -> nn.Sequential:
    return vgg_features()


@pytest.fixture(scope="module")
def vgg_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_vgg(tmp_path_factory.mktemp("vgg"))


def lpips_by_hand(layers: nn.Sequential, one: Tensor, two: Tensor) -> Tensor:
    """Zhang et al. 2018, eq. 1, with the linear weights that the package carries."""
    import lpips

    linear = torch.load(Path(lpips.__file__).parent / "weights/v0.1/vgg.pth", map_location="cpu", weights_only=True)
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    x, y = ((2 * image - 1 - shift.reshape(3, 1, 1)) / scale.reshape(3, 1, 1) for image in (one, two))
    total = torch.zeros(len(one))
    for index, layer in enumerate(layers):
        x, y = layer(x), layer(y)
        if index in RELUS:
            weight = linear[f"lin{RELUS.index(index)}.model.1.weight"].flatten()
            difference = x / x.norm(dim=1, keepdim=True) - y / y.norm(dim=1, keepdim=True)
            total += (difference.square() * weight[:, None, None]).sum(dim=1).mean(dim=(1, 2))
    return total


class TestLpips:
    def test_is_the_published_formula(self, vgg: nn.Sequential, vgg_file: Path) -> None:
        distance = build_perceptual("lpips", None, str(vgg_file))
        assert isinstance(distance, LpipsDistance)
        one, two = images(seed=1), images(seed=2)
        found = distance(one, two)
        assert found.shape == (2,)
        torch.testing.assert_close(found, lpips_by_hand(vgg, one, two), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(distance(one, one), torch.zeros(2))

    def test_is_frozen_and_lets_the_gradient_through(self, vgg_file: Path) -> None:
        distance: Any = build_perceptual("lpips", None, str(vgg_file))
        distance.train()
        assert not any(module.training for module in distance.modules())
        assert not any(parameter.requires_grad for parameter in distance.parameters())
        reconstruction = images(seed=1).requires_grad_()
        distance(reconstruction, images(seed=2)).sum().backward()
        assert reconstruction.grad is not None
        assert reconstruction.grad.abs().sum() > 0

    def test_manifest_names_the_weights(self, vgg_file: Path, tmp_path: Path) -> None:
        state = torch.load(vgg_file, weights_only=True)
        state["features.0.bias"] += 1
        torch.save(state, tmp_path / "other.pth")
        one, two = (build_perceptual("lpips", None, str(path)) for path in (vgg_file, tmp_path / "other.pth"))
        assert one is not None
        assert two is not None
        assert one.digest != two.digest
        assert "LPIPS" in one.description

    def test_without_weights_nothing_takes_its_place(
        self, encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("TORCH_HOME", str(tmp_path))
        with pytest.raises(MissingInput, match=r"vgg16-397923af\.pth"):
            build_perceptual("lpips", encoder, None)

    def test_other_weights_are_refused(self, tmp_path: Path) -> None:
        torch.save({"features.0.weight": torch.ones(64, 3, 3, 3)}, tmp_path / "other.pth")
        with pytest.raises(CorruptData, match=r"lacks the tensor `features\.0\.bias`"):
            build_perceptual("lpips", None, str(tmp_path / "other.pth"))


class TestEncoderDistance:
    def test_grows_with_the_damage(self, encoder: Encoder) -> None:
        distance = EncoderDistance(encoder)
        target = images()
        noise = torch.randn(target.shape, generator=torch.Generator().manual_seed(1))
        steps = [distance(target + level * noise, target) for level in (0.0, 0.05, 0.2, 1.0)]
        torch.testing.assert_close(steps[0], torch.zeros(2))
        for smaller, larger in itertools.pairwise(steps):
            assert (larger > smaller).all()
        assert (steps[-1] < 4).all()

    def test_is_a_mean_over_unit_normalised_maps(self, encoder: Encoder) -> None:
        one, two = images(seed=1), images(seed=2)
        maps = zip(encoder.features(one), encoder.features(two), strict=True)
        cosines = [torch.cosine_similarity(a, b, dim=1).mean(dim=(1, 2)) for a, b in maps]
        expected = 2 - 2 * torch.stack(cosines).mean(dim=0)  # |a - b|^2 of unit vectors
        torch.testing.assert_close(EncoderDistance(encoder)(one, two), expected, atol=1e-5, rtol=1e-4)

    def test_gradient_flows_to_the_reconstruction_alone(self, encoder: Encoder) -> None:
        reconstruction, target = images(seed=1).requires_grad_(), images(seed=2).requires_grad_()
        EncoderDistance(encoder)(reconstruction, target).sum().backward()
        assert reconstruction.grad is not None
        assert reconstruction.grad.abs().amax(dim=(1, 2, 3)).min() > 0
        assert target.grad is None

    def test_black_images_have_finite_gradients(self, encoder: Encoder) -> None:
        reconstruction = torch.zeros(1, 3, 64, 64, requires_grad=True)
        EncoderDistance(encoder)(reconstruction, torch.zeros(1, 3, 64, 64)).sum().backward()
        assert reconstruction.grad is not None
        assert reconstruction.grad.isfinite().all()

    def test_descending_it_finds_the_image(self, encoder: Encoder) -> None:
        distance = build_perceptual("encoder", encoder, None)
        assert distance is not None
        target = images(1)
        reconstruction = (target + 0.2 * images(1, seed=3)).requires_grad_()
        optimizer = torch.optim.Adam([reconstruction], lr=0.01)
        before = distance(reconstruction, target).item()
        for _ in range(10):
            optimizer.zero_grad()
            distance(reconstruction, target).sum().backward()
            optimizer.step()
        assert distance(reconstruction, target).item() < 0.7 * before

    def test_other_sizes_are_resized(self, encoder: Encoder) -> None:
        assert EncoderDistance(encoder)(images(size=96), images(size=96, seed=1)).shape == (2,)

    def test_manifest_names_the_encoder(self, encoder: Encoder) -> None:
        distance = EncoderDistance(encoder)
        assert distance.digest == encoder.digest
        assert "efficientnet-lite0 at 64 pixels" in distance.description


def test_none_is_none(encoder: Encoder) -> None:
    assert build_perceptual("none", encoder, None) is None


def test_contradictions_are_refused(encoder: Encoder) -> None:
    with pytest.raises(ConfigError, match="needs an encoder"):
        build_perceptual("encoder", None, None)
    with pytest.raises(ConfigError, match="`lpips_weights` has no part"):
        build_perceptual("encoder", encoder, "vgg.pth")
