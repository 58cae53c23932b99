"""Models of diffusers' AutoencoderRAE and ours make the same of an image, whichever was there first."""

import contextlib
import json
import warnings
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from rae.stages.models.autoencoder_rae import (
    WEIGHTS_FILE,
    build_autoencoder_rae,
    positions,
    read_autoencoder_rae,
    same_weights,
)
from rae.stages.models.backbones import load_hugging_face
from rae.stages.models.decoder import DecoderConfig, ViTDecoder, unwhiten, whiten
from rae.stages.models.encoders import Encoder, load_encoder
from rae.stages.models.weights import locate_encoder
from rae.store.errors import ConfigError, CorruptData

WIDTH = 64  # the least that diffusers gives an attention head
NORMALISATION = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


def drawn(model: Any, seed: int = 1) -> Any:
    """Weights that differ from their initial zeros and ones everywhere."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model


def dinov2(folder: Path, **changes: Any) -> Path:
    """A DINOv2 with registers as small as diffusers can hold it, saved by transformers: patch 14, at 28 px."""
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 1, "image_size": 518}
    config = transformers.Dinov2WithRegistersConfig(**sizes | {"patch_size": 14} | changes)
    return saved(transformers.Dinov2WithRegistersModel(config), folder, 28)


def mae(folder: Path, **changes: Any) -> Path:
    """Likewise a ViT-MAE: patch 16, at 224 px."""
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 1, "image_size": 224}
    config = transformers.ViTMAEConfig(**sizes | {"patch_size": 16} | changes)
    return saved(transformers.ViTMAEModel(config), folder, 224)


def siglip(folder: Path, **changes: Any) -> Path:
    """Likewise a SigLIP: patch 16, at 256 px."""
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 1, "image_size": 256}
    config = transformers.SiglipVisionConfig(**sizes | {"patch_size": 16} | changes)
    return saved(transformers.SiglipVisionModel(config), folder, 256)


def saved(model: Any, folder: Path, size: int) -> Path:
    drawn(model).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(NORMALISATION | {"size": size}))
    return folder


def statistics(grid: int) -> tuple[Tensor, Tensor]:
    """Mean and variance [C, H, W]; some variances are so small that the epsilons count."""
    generator = torch.Generator().manual_seed(2)
    mean, var = (torch.rand(WIDTH, grid, grid, generator=generator) for _ in range(2))
    var[::2] *= 1e-6
    var[0] = 0
    return mean, var


def ours(encoder: Encoder, seed: int = 3, **changes: Any) -> ViTDecoder:
    """A tiny decoder of these tokens, on the positions that diffusers builds."""
    sizes: dict[str, Any] = {"hidden_size": 32, "depth": 2, "num_heads": 2, "intermediate_size": 48, "patch_size": 4}
    normalisation = {"image_mean": encoder.mean, "image_std": encoder.std}
    config = DecoderConfig(token_dim=WIDTH, grid=encoder.grid[0], **sizes | normalisation | changes)
    decoder = drawn(ViTDecoder(config), seed).requires_grad_(False).eval()
    decoder.decoder_pos_embed.copy_(positions(config))
    return decoder


def theirs(folder: Path, grid: int = 2, **changes: Any) -> Any:
    """A tiny AutoencoderRAE of diffusers with a DINOv2 inside, saved to `folder`."""
    mean, var = statistics(grid)
    sizes = {"encoder_hidden_size": WIDTH, "encoder_num_hidden_layers": 1, "encoder_input_size": 14 * grid}
    sizes |= {"decoder_hidden_size": 32, "decoder_num_hidden_layers": 2, "decoder_num_attention_heads": 2}
    # As its conversion from the release fills them in: the root already contains one epsilon.
    stats = {"latents_mean": mean, "latents_std": torch.sqrt(var + 1e-5)}
    settings = sizes | stats | {"decoder_intermediate_size": 48, "patch_size": 4} | changes
    torch.manual_seed(0)
    model = drawn(diffusers.AutoencoderRAE(**settings)).requires_grad_(False).eval()
    model.save_pretrained(folder)
    return model


def images(side: int) -> Tensor:
    return torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize(("maker", "input_size"), [(dinov2, 28), (mae, 256)])
@torch.inference_mode()
def test_what_is_written_loads_in_diffusers_and_makes_the_same(tmp_path: Path, maker: Any, input_size: int) -> None:
    encoder = load_encoder(locate_encoder(str(maker(tmp_path / "encoder"))), input_size)
    decoder, (mean, var) = ours(encoder), statistics(encoder.grid[0])
    build_autoencoder_rae(decoder, encoder, (mean, var)).save_pretrained(tmp_path / "out")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, report = diffusers.AutoencoderRAE.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values())
    batch = images(decoder.image_size)
    tokens = encoder(batch)
    torch.testing.assert_close(model(batch).sample, decoder(tokens), atol=1e-3, rtol=0)
    latents = model.encode(batch).latent
    torch.testing.assert_close(latents, whiten(tokens, mean, var), atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(model.decode(latents).sample, decoder(tokens), atol=1e-3, rtol=0)

    back = read_autoencoder_rae(tmp_path / "out")
    assert (back.config, back.input_size) == (decoder.config, input_size)
    assert all(torch.equal(tensor, back.state[name]) for name, tensor in decoder.state_dict().items())
    assert same_weights(back.encoder, load_hugging_face(locate_encoder(str(tmp_path / "encoder"))).state_dict())
    assert back.stats is not None
    torch.testing.assert_close(back.stats[0], mean, atol=0, rtol=0)
    torch.testing.assert_close(back.stats[1], var, atol=1e-8, rtol=1e-5)


@pytest.mark.parametrize("grid", [2, 16])
@torch.inference_mode()
def test_what_diffusers_wrote_makes_the_same_here(tmp_path: Path, grid: int) -> None:
    model = theirs(tmp_path, grid)
    found = read_autoencoder_rae(tmp_path)
    decoder = ViTDecoder(found.config)
    decoder.load_state_dict(found.state)
    batch = images(decoder.image_size)
    latents = model.encode(batch).latent
    assert found.stats is not None
    tokens = unwhiten(latents, *found.stats)
    assert latents.abs().max() > 50  # else no epsilon would show
    torch.testing.assert_close(decoder(tokens), model.decode(latents).sample, atol=1e-4, rtol=0)
    torch.testing.assert_close(whiten(tokens, *found.stats), latents, atol=1e-3, rtol=1e-5)
    assert (found.config.image_mean, found.config.image_std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_without_statistics_there_are_none(tmp_path: Path) -> None:
    theirs(tmp_path / "none", latents_mean=None, latents_std=None)
    assert read_autoencoder_rae(tmp_path / "none").stats is None
    theirs(tmp_path / "scaled", latents_mean=None, latents_std=None, scaling_factor=0.5)
    scaled = read_autoencoder_rae(tmp_path / "scaled").stats
    assert scaled is not None
    torch.testing.assert_close(scaled[1], torch.full((WIDTH, 2, 2), 4.0), atol=1e-3, rtol=0)


def test_an_encoder_is_known_by_its_numbers_whatever_they_are_called(tmp_path: Path) -> None:
    own = load_hugging_face(locate_encoder(str(dinov2(tmp_path)))).state_dict()
    older = {name.replace("attention.q_proj", "attention.attention.query"): one for name, one in own.items()}
    older = {name: one for name, one in older.items() if name != "layernorm.weight"}
    assert same_weights(older, own)
    name = "encoder.layer.0.norm1.bias"
    assert not same_weights(older | {name: torch.nextafter(own[name], own[name] + 1)}, own)
    del older[name]
    assert not same_weights(older, own)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_attention_heads": 2}, "other heads or constants"),
        ({"mlp_ratio": 2}, "no place for this encoder: .*mlp.fc1"),
        ({"num_register_tokens": 0}, "no place for this encoder: .*register_tokens"),
        ({"layer_norm_eps": 1.0}, "other heads or constants"),
    ],
)
def test_an_encoder_that_diffusers_would_misread_is_refused(
    tmp_path: Path, changes: dict[str, int], words: str
) -> None:
    encoder = load_encoder(locate_encoder(str(dinov2(tmp_path, **changes))), 28)
    with pytest.raises(ConfigError, match=words):
        build_autoencoder_rae(ours(encoder), encoder, None)


def test_a_siglip_is_written_unless_diffusers_cannot_build_it(tmp_path: Path) -> None:
    encoder = load_encoder(locate_encoder(str(siglip(tmp_path))), 256)
    try:
        diffusers.AutoencoderRAE(encoder_type="siglip2", encoder_hidden_size=WIDTH, encoder_num_hidden_layers=1)
        outcome: Any = contextlib.nullcontext()
    except AttributeError:
        outcome = pytest.raises(ConfigError, match=f"transformers {transformers.__version__} cannot build .* `siglip2`")
    with outcome:
        build_autoencoder_rae(ours(encoder), encoder, None)


def test_positions_that_diffusers_does_not_build_are_refused(tmp_path: Path) -> None:
    encoder = load_encoder(locate_encoder(str(dinov2(tmp_path))), 28)
    decoder = ViTDecoder(ours(encoder).config)
    with pytest.raises(ConfigError, match="for 2 x 2 tokens are not this decoder's"):
        build_autoencoder_rae(decoder, encoder, None)


@pytest.mark.parametrize(
    ("config", "tensors", "kind", "words"),
    [
        ({"encoder_type": "clip"}, {}, ConfigError, "`encoder_type` is 'clip'"),
        ({"decoder_num_hidden_layers": 0}, {}, ConfigError, "`decoder_num_hidden_layers` is 0"),
        ({"reshape_to_2d": False}, {}, ConfigError, "`reshape_to_2d`"),
        ({"encoder_input_size": 30}, {}, CorruptData, "no multiple"),
        ({"decoder_num_hidden_layers": 3}, {}, CorruptData, "lacks `decoder_layers.2"),
        ({}, {"decoder.decoder_norm.bias": None}, CorruptData, "lacks `decoder_norm.bias`"),
        ({}, {"disc.weight": torch.ones(1)}, CorruptData, "`disc.weight`"),
        ({}, {"_latents_std": None}, CorruptData, "lacks `_latents_std`"),
        ({}, {"_latents_std": torch.ones(3)}, CorruptData, "statistics of shapes"),
        ({}, {"_latents_std": torch.full((1,), 1e-3)}, CorruptData, "no mean and variance"),
        ({}, {"_latents_mean": torch.full((1,), torch.nan)}, CorruptData, "no mean and variance"),
        ({}, {"encoder_mean": torch.ones(4)}, CorruptData, "three numbers"),
    ],
)
def test_a_file_that_is_no_such_model_is_refused(
    tmp_path: Path, config: dict[str, Any], tensors: dict[str, Any], kind: type[Exception], words: str
) -> None:
    theirs(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    held = load_file(tmp_path / WEIGHTS_FILE) | tensors
    save_file({name: one for name, one in held.items() if one is not None}, tmp_path / WEIGHTS_FILE)
    with pytest.raises(kind, match=words):
        read_autoencoder_rae(tmp_path)
