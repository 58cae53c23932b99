"""diffusers' AutoencoderKL: the same latents and images as there, strictly loaded, and nothing scaled twice."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from rae.stages.models.autoencoder_kl import KlDecoder, load_autoencoder_kl
from rae.stages.models.encoders import describe, encoder_geometry, load_encoder
from rae.stages.models.geometry import input_size_for
from rae.stages.models.trained import Decoder, save_kl_decoder
from rae.stages.models.weights import EncoderFiles, locate_encoder
from rae.store.errors import ConfigError, CorruptData, MissingInput


def saved(folder: Path, **settings: Any) -> Any:
    """A tiny model of stride 4 in `folder`, with factors that must not be applied, and weights all drawn."""
    down, up = ("DownEncoderBlock2D",) * 3, ("UpDecoderBlock2D",) * 3
    sizes: dict[str, Any] = {"block_out_channels": (4, 8, 8), "down_block_types": down, "up_block_types": up}
    sizes |= {"norm_num_groups": 2, "latent_channels": 4, "sample_size": 32}
    model: Any = diffusers.AutoencoderKL(**sizes, scaling_factor=0.18, shift_factor=0.5, **settings).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    model.save_pretrained(folder)
    return model


def located(folder: Path) -> EncoderFiles:
    files = locate_encoder(str(folder))
    assert isinstance(files, EncoderFiles)
    return files


def images(size: int = 32) -> torch.Tensor:
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("convolutions", [True, False])
@torch.no_grad()
def test_latents_and_images_are_those_of_diffusers(tmp_path: Path, convolutions: bool) -> None:
    model = saved(tmp_path / "vae", use_quant_conv=convolutions, use_post_quant_conv=convolutions)
    encoder = load_encoder(located(tmp_path / "vae"))
    latents = encoder(images())
    torch.testing.assert_close(latents, model.encode(images() * 2 - 1).latent_dist.mean, atol=1e-5, rtol=1e-5)
    assert latents.shape == (2, 4, 8, 8)

    decoder = KlDecoder(load_autoencoder_kl(located(tmp_path / "vae")), 32)
    expected = (model.decode(latents).sample / 2 + 0.5).clamp(0, 1)
    paths, _ = save_kl_decoder(tmp_path, decoder, describe(encoder))
    assert {path.name for path in paths} == {"decoder.json", "ema.safetensors"}
    loaded = Decoder.load(tmp_path)
    assert loaded.image_size == 32
    torch.testing.assert_close(loaded(latents), expected, atol=1e-5, rtol=0)
    assert 0 < expected.mean() < 1
    with pytest.raises(MissingInput, match="one set of weights"):
        Decoder.load(tmp_path, "model")


def test_geometry_is_known_from_its_configuration(tmp_path: Path) -> None:
    saved(tmp_path)
    files = located(tmp_path)
    assert encoder_geometry(files) == (4, (8, 8))
    assert encoder_geometry(files, 64) == (4, (16, 16))
    assert input_size_for(files, 256) == 256
    assert load_encoder(files, 48)(images(48)).shape == (2, 4, 12, 12)
    described = describe(load_encoder(files))
    assert (described["kind"], described["input_size"], described["mean"]) == ("autoencoder_kl", 32, [0.5] * 3)
    with pytest.raises(ConfigError, match=r"multiple of the stride 4 .* take 28 or 32"):
        encoder_geometry(files, 30)
    with pytest.raises(ConfigError, match="`feature_index`"):
        encoder_geometry(files, 32, 1)


def test_a_pickle_is_read_where_there_is_nothing_safer(tmp_path: Path) -> None:
    saved(tmp_path)
    expected = load_encoder(located(tmp_path))(images())
    safe = tmp_path / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(safe), tmp_path / "diffusion_pytorch_model.bin")
    assert set(located(tmp_path).digests) == {"config.json", safe.name}
    safe.unlink()
    torch.testing.assert_close(load_encoder(located(tmp_path))(images()), expected, atol=0, rtol=0)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda weights: weights.pop("encoder.conv_in.bias"), "lacks the tensor `encoder.conv_in.bias`"),
        (lambda weights: weights.update(extra=torch.ones(1)), "has an unknown tensor `extra`"),
        (lambda weights: weights.update({"encoder.conv_in.bias": torch.ones(3)}), "cannot be loaded"),
    ],
)
def test_weights_that_are_not_the_models(tmp_path: Path, change: Any, says: str, capfd: Any) -> None:
    saved(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})
    capfd.readouterr()
    with pytest.raises(CorruptData, match=says):
        load_encoder(located(tmp_path))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("change", [{"block_out_channels": 8}, {"latent_channels": None}])
def test_configurations_without_sizes(tmp_path: Path, change: dict[str, Any]) -> None:
    saved(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CorruptData, match="says no usable"):
        encoder_geometry(located(tmp_path))


def test_without_diffusers_it_says_what_to_install(tmp_path: Path) -> None:
    saved(tmp_path)
    program = """
import sys
sys.modules["diffusers"] = None
from rae.stages.models.encoders import load_encoder
from rae.stages.models.weights import locate_encoder
from rae.store.errors import MissingInput
try:
    load_encoder(locate_encoder(sys.argv[1]))
except MissingInput as error:
    assert "which is not installed" in error.message
    assert error.next_command == 'pip install "rae-pipeline[diffusers]"'
else:
    raise SystemExit("loaded it without diffusers")
"""
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True)


def test_names_of_older_releases_are_read(tmp_path: Path) -> None:
    """`stabilityai/sd-vae-ft-mse` calls the attention's projections as diffusers did in 2022."""
    saved(tmp_path)
    expected = load_encoder(located(tmp_path))(images())
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = load_file(file)
    for name in [name for name in weights if ".attentions." in name]:
        for new, old in older.items():
            if f".{new}." in name:
                weights[name.replace(f".{new}.", f".{old}.")] = weights.pop(name)
    assert "encoder.mid_block.attentions.0.query.weight" in weights
    save_file(weights, file, metadata={"format": "pt"})
    torch.testing.assert_close(load_encoder(located(tmp_path))(images()), expected, atol=0, rtol=0)
