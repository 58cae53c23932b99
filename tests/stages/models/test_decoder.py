"""The ViT decoder: official names and sizes, whitening, noise, gradients."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from rae.stages.models.decoder import (
    DecoderConfig,
    ViTDecoder,
    noise_tokens,
    sincos_positions,
    unwhiten,
    whiten,
)
from rae.stages.models.sizes import VIT_SIZES
from rae.store.errors import ConfigError

OFFICIAL = Path(__file__).parents[2] / "parity" / "official_state_dicts.json"
IMAGENET = {"image_mean": (0.485, 0.456, 0.406), "image_std": (0.229, 0.224, 0.225)}
TINY = DecoderConfig(
    token_dim=12, grid=3, hidden_size=16, depth=2, num_heads=2, intermediate_size=32, patch_size=4, **IMAGENET
)


def tiny(seed: int = 0) -> ViTDecoder:
    torch.manual_seed(seed)
    return ViTDecoder(TINY)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("size", "millions"), [("B", 86), ("L", 304), ("XL", 415)])
def test_state_dict_is_the_official_one(size: str, millions: int) -> None:
    official = json.loads(OFFICIAL.read_text())[f"decoder-ViT{size}"]
    config = DecoderConfig(token_dim=768, grid=16, patch_size=16, **VIT_SIZES[size], **IMAGENET)
    with torch.device("meta"):
        decoder = ViTDecoder(config)
    assert {key: list(value.shape) for key, value in decoder.state_dict().items()} == official
    assert config.image_size == 256
    assert round(sum(parameter.numel() for parameter in decoder.parameters()) / 1e6) == millions


def test_images_have_the_size_of_grid_times_patch() -> None:
    decoder = tiny()
    assert TINY.image_size == 12
    assert decoder(draw(2, 12, 3, 3)).shape == (2, 3, 12, 12)
    assert decoder.last_layer.shape == (3 * 4 * 4, 16)


def test_a_token_becomes_its_patch() -> None:
    """Row-major on both sides: the patch that changes most is the one whose token changed."""
    decoder, tokens = tiny(), draw(1, 12, 3, 3)
    changed = tokens.clone()
    changed[:, :, 1, 2] += 5
    moved = (decoder(changed) - decoder(tokens)).abs().sum(dim=1)[0]
    per_patch = moved.unflatten(0, (3, 4)).unflatten(2, (3, 4)).sum(dim=(1, 3))
    assert per_patch.argmax() == 1 * 3 + 2


def test_output_undoes_the_encoders_normalisation() -> None:
    decoder = tiny()
    with torch.no_grad():
        decoder.decoder_pred.weight.zero_()
        decoder.decoder_pred.bias.zero_()
    image = decoder(draw(1, 12, 3, 3))
    torch.testing.assert_close(image.mean(dim=(0, 2, 3)), torch.tensor(IMAGENET["image_mean"]))


def test_positions_are_sines_and_cosines_of_column_then_row() -> None:
    table = sincos_positions(8, 3)
    assert table.shape == (1, 10, 8)
    assert not table[0, 0].any()
    row, column = 2, 1
    angles = torch.tensor([1.0, 0.01])  # 10000 ** -(0, 1/2)
    expected = torch.cat([f(angles * place) for place in (column, row) for f in (torch.sin, torch.cos)])
    torch.testing.assert_close(table[0, 1 + row * 3 + column], expected)


def test_positions_are_constants() -> None:
    names = {name for name, _ in tiny().named_parameters()}
    assert "decoder_pos_embed" not in names
    assert "trainable_cls_token" in names


def test_gradient_reaches_every_parameter_and_checkpointing_does_not_change_it() -> None:
    decoder, tokens = tiny(), draw(2, 12, 3, 3)

    def gradients() -> list[torch.Tensor]:
        decoder.zero_grad()
        decoder(tokens).square().mean().backward()
        return [parameter.grad.clone() for parameter in decoder.parameters() if parameter.grad is not None]

    plain = gradients()
    decoder.grad_checkpoint = True
    recomputed = gradients()
    assert len(plain) == len(list(decoder.parameters()))
    for one, two in zip(plain, recomputed, strict=True):
        torch.testing.assert_close(one, two, atol=0, rtol=0)


def test_float32_images_under_bf16_autocast() -> None:
    decoder, tokens = tiny(), draw(2, 12, 3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        images = decoder(tokens)
    assert images.dtype == torch.float32
    assert (images - decoder(tokens)).abs().max() < 0.05


def test_compiles_without_graph_breaks() -> None:
    decoder, tokens = tiny(), draw(2, 12, 3, 3)
    compiled = torch.compile(decoder, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(tokens), decoder(tokens))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_agrees_with_the_processor() -> None:
    decoder, tokens = tiny(), draw(2, 12, 3, 3)
    expected = decoder(tokens)
    torch.testing.assert_close(decoder.cuda()(tokens.cuda()).cpu(), expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("shape", [(2, 11, 3, 3), (2, 12, 4, 4), (12, 3, 3)])
def test_other_tokens_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"takes tokens \[B, 12, 3, 3\]"):
        tiny()(draw(*shape))


class TestConfig:
    def test_round_trip_through_json(self) -> None:
        assert DecoderConfig.from_dict(json.loads(json.dumps(TINY.to_dict()))) == TINY

    def test_unknown_and_missing_keys(self) -> None:
        with pytest.raises(ConfigError, match="no key `hiden_size`; did you mean `hidden_size`"):
            DecoderConfig.from_dict(TINY.to_dict() | {"hiden_size": 3})
        values = TINY.to_dict()
        del values["grid"]
        with pytest.raises(ConfigError, match="lacks its key `grid`"):
            DecoderConfig.from_dict(values)

    def test_sizes_that_do_not_fit(self) -> None:
        with pytest.raises(ConfigError, match="not a multiple of `num_heads` 3"):
            dataclasses.replace(TINY, num_heads=3)
        with pytest.raises(ConfigError, match="not a multiple of 4"):
            dataclasses.replace(TINY, hidden_size=18, num_heads=2)


class TestWhitening:
    def test_statistics_are_per_channel_and_position(self) -> None:
        tokens = 3 * draw(1000, 2, 3, 3) + torch.arange(18.0).reshape(2, 3, 3)
        white = whiten(tokens, tokens.mean(dim=0), tokens.var(dim=0))
        torch.testing.assert_close(white.mean(dim=0), torch.zeros(2, 3, 3), atol=1e-4, rtol=0)
        torch.testing.assert_close(white.std(dim=0), torch.ones(2, 3, 3), atol=1e-4, rtol=0)

    @pytest.mark.parametrize("mean", [None, draw(2, 3, 3, seed=1)])
    def test_unwhiten_is_the_inverse(self, mean: torch.Tensor | None) -> None:
        tokens, var = draw(4, 2, 3, 3), draw(2, 3, 3, seed=2).square()
        torch.testing.assert_close(unwhiten(whiten(tokens, mean, var), mean, var), tokens, atol=1e-5, rtol=1e-5)

    def test_eps_stands_under_the_root(self) -> None:
        assert whiten(torch.ones(1, 1, 1, 1), None, torch.zeros(1, 1, 1)).item() == pytest.approx(1e5**0.5)


class TestNoise:
    def test_level_is_one_number_an_image(self) -> None:
        tokens, normal = draw(3, 2, 4, 4), draw(3, 2, 4, 4, seed=1)
        uniform = torch.tensor([0.0, 0.5, 1.0])
        noisy = noise_tokens(tokens, 0.8, uniform, normal)
        for row, sigma in enumerate((0.0, 0.4, 0.8)):
            torch.testing.assert_close(noisy[row], tokens[row] + sigma * normal[row])

    def test_without_tau_nothing_changes(self) -> None:
        tokens = draw(3, 2, 4, 4)
        assert torch.equal(noise_tokens(tokens, 0.0, torch.rand(3), torch.randn_like(tokens)), tokens)
