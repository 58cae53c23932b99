"""The shapes that encoders, decoder and losses promise, as signatures that are checked (see shapes.py)."""

from pathlib import Path

import numpy as np
import pytest
import torch
from jaxtyping import Float, Float32, TypeCheckError, UInt8
from torch import Tensor, nn

from rae.stages.models import decoder, pixels
from rae.stages.models.autoencoder_kl import KlDecoder
from rae.stages.models.decoder import ViTDecoder
from rae.stages.models.discriminator import BACKBONES, DinoDiscriminator, ScaledResidual
from rae.stages.models.encoders import Encoder, load_encoder
from rae.stages.models.own_encoder import OwnEncoder, own_encoder
from rae.stages.models.perceptual import EncoderDistance, LpipsDistance
from rae.stages.models.trained import Autoencoder, Decoder
from rae.stages.models.weights import locate_encoder
from tests.stages.models.drawn_weights import write_vgg
from tests.stages.models.shapes import BATCHES, Images, Latents, PerElement, checked, draw, every_size, tiny_decoder

PARITY = Path(__file__).parents[2] / "parity"


# ---- tokens and the decoder -----------------------------------------------------------------------------------------


@checked
def whiten(tokens: Latents, mean: PerElement | None, var: PerElement) -> Latents:
    return decoder.whiten(tokens, mean, var)


@checked
def unwhiten(tokens: Latents, mean: PerElement | None, var: PerElement) -> Latents:
    return decoder.unwhiten(tokens, mean, var)


@checked
def noise_tokens(tokens: Latents, tau: float, uniform: Float32[Tensor, " B"], normal: Latents) -> Latents:
    return decoder.noise_tokens(tokens, tau, uniform, normal)


@checked
def decoder_positions(D: int, grid: int) -> Float32[Tensor, "1 1+{grid}**2 {D}"]:
    return decoder.sincos_positions(D, grid)


@checked
def decode(model: ViTDecoder, tokens: Latents, P: int) -> Float32[Tensor, "B 3 H*{P} H*{P}"]:
    return model(tokens)


@checked
def decode_patches(model: ViTDecoder, tokens: Latents, P: int) -> Float32[Tensor, "B H**2 3*{P}**2"]:
    return model.patches(tokens)


@checked
def last_layer(model: ViTDecoder, P: int) -> Float32[Tensor, "3*{P}**2 {model.config.hidden_size}"]:
    return model.last_layer


@checked
def decoder_block(
    block: decoder.DecoderBlock | decoder.DecoderAttention, x: Float32[Tensor, "B N D"]
) -> Float32[Tensor, "B N D"]:
    return block(x)


@every_size
@pytest.mark.parametrize("patch", [1, 4])
def test_the_decoder(batch: int, grid: int, patch: int) -> None:
    model, tokens = tiny_decoder(6, grid, patch), draw(batch, 6, grid, grid)
    decode(model, tokens, patch)
    decode_patches(model, tokens, patch)
    last_layer(model, patch)
    decoder_positions(8, grid)
    decoder_block(model.decoder_layers[0], draw(batch, grid, 8))
    decoder_block(model.decoder_layers[0].attention, draw(batch, grid, 8))
    for mean in (draw(6, grid, grid), None):
        unwhiten(whiten(tokens, mean, draw(6, grid, grid)), mean, draw(6, grid, grid))
    noise_tokens(tokens, 0.8, draw(batch), draw(batch, 6, grid, grid))


# ---- encoders, and what stands on them ------------------------------------------------------------------------------


@checked
def encode(model: Encoder, images: Images) -> Float32[Tensor, "B {model.token_dim} {model.grid[0]} {model.grid[1]}"]:
    return model(images)


@checked
def features(model: Encoder, images: Images) -> list[Float32[Tensor, "B _ _ _"]]:
    return model.features(images)


@checked
def distance(model: EncoderDistance | LpipsDistance, made: Images, images: Images) -> Float32[Tensor, " B"]:
    return model(made, images)


@checked
def round_trip(model: Autoencoder, images: Images, S: int) -> Float32[Tensor, "B 3 {S} {S}"]:
    @checked
    def noised(tokens: Latents) -> Latents:
        return model.noising(tokens, 0.8)

    return model.decode(noised(model.encode(images)))


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize(("family", "sides"), [("dinov2", (28, 56)), ("siglip2", (32, 64)), ("mae", (32, 64))])
def test_encoders_at_every_grid_and_the_autoencoder(family: str, sides: tuple[int, ...], batch: int) -> None:
    files = locate_encoder(str(PARITY / f"encoder_{family}"))
    for side in sides:
        model, images = load_encoder(files, side), draw(batch, 3, 40, 40)
        encode(model, images)
        features(model, images)
        distance(EncoderDistance(model), images, images)
        made = Decoder(tiny_decoder(model.token_dim, model.grid[0], 4), {})
        round_trip(Autoencoder(model, made), images, 4 * model.grid[0])


@pytest.mark.parametrize("batch", BATCHES)
def test_a_feature_map_is_a_grid_of_tokens(batch: int) -> None:
    model = load_encoder(locate_encoder("efficientnet-lite0"), 64, 3)
    encode(model, draw(batch, 3, 64, 64))
    features(model, draw(batch, 3, 48, 48))
    distance(EncoderDistance(model), draw(batch, 3, 64, 64), draw(batch, 3, 64, 64))


@checked
def own_tokens(source: OwnEncoder, images: Images, C: int) -> Float32[Tensor, "B {C} S//4 S//4"]:
    return source.tokens(images)


@pytest.mark.parametrize("batch", BATCHES)
def test_an_encoder_of_your_own(batch: int) -> None:
    source, images = own_encoder(nn.Conv2d(3, 5, 4, stride=4), version="1"), draw(batch, 3, 24, 24)
    own_tokens(source, images, 5)
    assert source.geometry(24) == (5, (6, 6))
    encode(load_encoder(source, 16), images)


@checked
def kl_decode(model: KlDecoder, tokens: Latents, stride: int) -> Float32[Tensor, "B 3 {stride}*H {stride}*H"]:
    return model(tokens)


@pytest.mark.parametrize("batch", BATCHES)
def test_the_vae(batch: int, tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    down, up = ("DownEncoderBlock2D",) * 2, ("UpDecoderBlock2D",) * 2
    sizes = {"block_out_channels": (8, 8), "norm_num_groups": 4, "latent_channels": 4, "layers_per_block": 1}
    vae = diffusers.AutoencoderKL(down_block_types=down, up_block_types=up, sample_size=32, **sizes)
    vae.save_pretrained(tmp_path)
    model = load_encoder(locate_encoder(str(tmp_path)), 32)
    encode(model, draw(batch, 3, 40, 40))
    features(model, draw(batch, 3, 32, 32))
    kl_decode(KlDecoder(vae, 32), draw(batch, 4, 16, 16), 2)


@pytest.mark.parametrize("batch", BATCHES)
def test_lpips(batch: int, tmp_path: Path) -> None:
    distance(LpipsDistance(write_vgg(tmp_path)), draw(batch, 3, 32, 32), draw(batch, 3, 32, 32))


@checked
def discriminate(model: DinoDiscriminator, images: Images, N: int) -> Float32[Tensor, "B 5*{N}"]:
    return model(images)


@checked
def scaled_residual(model: ScaledResidual, x: Float32[Tensor, "B D N"]) -> Float32[Tensor, "B D N"]:
    return model(x)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("norm_type", ["bn", "gn"])
def test_the_discriminator(norm_type: str, batch: int) -> None:
    side = 224 // BACKBONES["S_16"]["patch_size"]
    model = DinoDiscriminator("S_16", norm_type=norm_type).eval()
    with torch.inference_mode():
        discriminate(model, draw(batch, 3, 40, 40), side * side)
        scaled_residual(model.heads[0][1], draw(batch, 384, side))


@checked
def to_unit(images: UInt8[np.ndarray, "B H W 3"]) -> Float32[Tensor, "B 3 H W"]:
    return pixels.to_unit(images, "cpu")


@checked
def to_uint8(images: Float[Tensor, "B 3 H W"]) -> UInt8[np.ndarray, "B H W 3"]:
    return pixels.to_uint8(images)


@checked
def rounded_up(images: Float[Tensor, "B 3 H W"]) -> UInt8[np.ndarray, "B packed"]:
    return pixels.rounded_up(images)


@pytest.mark.parametrize("batch", BATCHES)
def test_pixels(batch: int) -> None:
    images = to_uint8(draw(batch, 3, 5, 7))
    to_uint8(to_unit(images).bfloat16())
    assert rounded_up(draw(batch, 3, 5, 7)).shape == (batch, 14)


# ---- the checks can fail --------------------------------------------------------------------------------------------


def test_a_wrong_shape_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = tiny_decoder(6, 2, 4), draw(3, 6, 2, 2)
    with pytest.raises(TypeCheckError, match="parameter"):
        whiten(tokens, None, draw(6, 1, 1))
    with pytest.raises(TypeCheckError, match="parameter"):
        noise_tokens(tokens, 0.8, draw(3, 1), tokens)
    with pytest.raises(TypeCheckError, match="return"):
        decode(model, tokens, 3)
    monkeypatch.setattr(ViTDecoder, "forward", ViTDecoder.patches)
    with pytest.raises(TypeCheckError, match="return"):
        decode(model, tokens, 4)
