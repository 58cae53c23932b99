"""`rae train-decoder`: what the decoder is shown, and the sizes it has."""

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rae.stages.images import center_crop
from rae.stages.models.encoders import load_encoder
from rae.stages.models.weights import locate_encoder
from rae.stages.sections import EncodeSection, TrainDecoderSection
from rae.stages.train_decoder import Crops, describe_decoder
from rae.store.errors import ConfigError, CorruptData
from rae.store.shards import Source, open_source
from rae.store.shards_writer import ShardWriter

DINOV2 = Path(__file__).parents[1] / "parity" / "encoder_dinov2"
SECTION = TrainDecoderSection(steps=1, hidden_size=32, depth=1, num_heads=2, intermediate_size=64)


def pixels(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (40, 48, 3), np.uint8)


def source(folder: Path, broken: set[int] = frozenset()) -> Source:  # type: ignore[assignment]
    folder.mkdir()
    with ShardWriter(folder, "train", samples_per_shard=100) as writer:
        for number in range(4):
            buffer = BytesIO()
            Image.fromarray(pixels(number)).save(buffer, "PNG")
            writer.add(f"k{number}", b"broken" if number in broken else buffer.getvalue(), "png")
    return open_source(folder / "train-*.tar")


def test_without_a_resize_the_image_is_shown_as_the_encoder_sees_it(tmp_path: Path) -> None:
    crops = Crops(source(tmp_path / "s"), SECTION, image_size=32)
    shown = crops.batch(np.array([2, 0]), epoch=0)
    expected = [center_crop(Image.fromarray(pixels(row)), 32) for row in (2, 0)]
    np.testing.assert_array_equal(shown, np.stack(expected))


def test_a_random_crop_is_a_function_of_seed_epoch_and_row(tmp_path: Path) -> None:
    crops = Crops(source(tmp_path / "s"), SECTION.model_copy(update={"resize_size": 36}), image_size=32)
    batch = crops.batch(np.array([0, 1, 2, 3]), epoch=5)
    np.testing.assert_array_equal(crops.batch(np.array([3]), epoch=5)[0], batch[3])
    assert not np.array_equal(crops.batch(np.array([3]), epoch=6)[0], batch[3])
    other = Crops(source(tmp_path / "t"), SECTION.model_copy(update={"resize_size": 36, "seed": 1}), image_size=32)
    assert not np.array_equal(other.batch(np.array([0, 1, 2, 3]), epoch=5), batch)


def test_an_image_that_does_not_decode_never_trains(tmp_path: Path) -> None:
    crops = Crops(source(tmp_path / "s", broken={1, 3}), SECTION, image_size=32)
    shown = crops.batch(np.arange(4), epoch=0)
    expected = [center_crop(Image.fromarray(pixels(row)), 32) for row in (0, 2, 2, 0)]
    np.testing.assert_array_equal(shown, np.stack(expected))
    nothing = Crops(source(tmp_path / "t", broken={0, 1, 2, 3}), SECTION, image_size=32)
    with pytest.raises(CorruptData, match="none of the training images"):
        nothing.batch(np.arange(1), epoch=0)


def test_the_decoder_makes_one_patch_of_each_token() -> None:
    encoder = load_encoder(locate_encoder(str(DINOV2)), 56)
    config = describe_decoder(SECTION, EncodeSection(image_size=64, encoder_input_size=56), encoder)
    assert (config.grid, config.patch_size, config.image_size, config.token_dim) == (4, 16, 64, 32)
    with pytest.raises(ConfigError, match="66 is not a multiple of the encoder's 4x4"):
        describe_decoder(SECTION, EncodeSection(image_size=66, encoder_input_size=56), encoder)
    small = SECTION.model_copy(update={"resize_size": 63})
    with pytest.raises(ConfigError, match=r"`train_decoder.resize_size` 63 is less than `encode.image_size` 64"):
        describe_decoder(small, EncodeSection(image_size=64, encoder_input_size=56), encoder)
