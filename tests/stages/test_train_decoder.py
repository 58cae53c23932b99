"""`rae train-decoder`: the sizes that the decoder has."""

from pathlib import Path

import pytest

from rae.stages.models.encoders import load_encoder
from rae.stages.models.weights import locate_encoder
from rae.stages.train_decoder import describe_decoder
from rae.stages.training.sections import TrainDecoderSection
from rae.store.errors import ConfigError

DINOV2 = Path(__file__).parents[1] / "parity" / "encoder_dinov2"
SECTION = TrainDecoderSection(steps=1, hidden_size=32, depth=1, num_heads=2, intermediate_size=64)


def test_the_decoder_makes_one_patch_of_each_token() -> None:
    encoder = load_encoder(locate_encoder(str(DINOV2)), 56).info
    config = describe_decoder(SECTION, 64, encoder)
    assert (config.grid, config.patch_size, config.image_size, config.token_dim) == (4, 16, 64, 32)
    with pytest.raises(ConfigError, match="66 is not a multiple of the encoder's 4x4"):
        describe_decoder(SECTION, 66, encoder)
    small = SECTION.model_copy(update={"resize_size": 63})
    with pytest.raises(ConfigError, match=r"`train_decoder.resize_size` 63 is less than `encode.image_size` 64"):
        describe_decoder(small, 64, encoder)
