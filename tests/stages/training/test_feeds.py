"""What the decoder is shown, by each feed: which image, which view, which tokens."""

import shutil
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rae.stages import encode
from rae.stages.images import center_crop
from rae.stages.job import Job
from rae.stages.models.encoders import load_encoder
from rae.stages.models.pixels import to_unit
from rae.stages.models.weights import locate_encoder
from rae.stages.sections import EncodeSection
from rae.stages.training.feeds import OnlineFeed, StoredFeed
from rae.store.errors import CorruptData, StaleInput
from rae.store.latents import LatentStore
from rae.store.latents_takeover import EarlierParts
from rae.store.shards import Source, open_source
from rae.store.shards_writer import ShardWriter
from tests.conftest import Rae

DINOV2 = Path(__file__).parents[2] / "parity" / "encoder_dinov2"
ENCODE = EncodeSection(image_size=32, encoder_input_size=28, batch_size=2, rows_per_part=3, dtype="float32")


def pixels(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (40, 48, 3), np.uint8)


def source(folder: Path, broken: tuple[int, ...] = (), order: tuple[int, ...] = (0, 1, 2, 3)) -> Source:
    """Four images, two a shard, whose shards follow each other as `order` says."""
    folder.mkdir()
    with ShardWriter(folder, "train", samples_per_shard=2) as writer:
        for number in order:
            buffer = BytesIO()
            Image.fromarray(pixels(number)).save(buffer, "PNG")
            writer.add(f"k{number}", b"broken" if number in broken else buffer.getvalue(), "png")
    return open_source(folder / "train-*.tar")


# ---- online ---------------------------------------------------------------------------------------------------------


def online(source: Source, resize_size: int | None = None, seed: int = 0) -> OnlineFeed:
    return OnlineFeed(source, 32, resize_size, seed)


def test_without_a_resize_the_image_is_shown_as_the_encoder_sees_it(tmp_path: Path) -> None:
    shown, tokens = online(source(tmp_path / "s")).batch(np.array([2, 0]), epoch=0)
    expected = [center_crop(Image.fromarray(pixels(row)), 32) for row in (2, 0)]
    np.testing.assert_array_equal(shown, np.stack(expected))
    assert tokens is None


def test_a_random_crop_is_a_function_of_seed_epoch_and_row(tmp_path: Path) -> None:
    images = source(tmp_path / "s")
    feed = online(images, 36)
    batch, _ = feed.batch(np.array([0, 1, 2, 3]), epoch=5)
    np.testing.assert_array_equal(feed.batch(np.array([3]), epoch=5)[0][0], batch[3])
    assert not np.array_equal(feed.batch(np.array([3]), epoch=6)[0][0], batch[3])
    assert not np.array_equal(online(images, 36, seed=1).batch(np.array([0, 1, 2, 3]), epoch=5)[0], batch)


def test_an_image_that_does_not_decode_never_trains(tmp_path: Path) -> None:
    shown, _ = online(source(tmp_path / "s", broken=(1, 3))).batch(np.arange(4), epoch=0)
    expected = [center_crop(Image.fromarray(pixels(row)), 32) for row in (0, 2, 2, 0)]
    np.testing.assert_array_equal(shown, np.stack(expected))
    nothing = online(source(tmp_path / "t", broken=(0, 1, 2, 3)))
    with pytest.raises(CorruptData, match="none of the training images"):
        nothing.batch(np.arange(1), epoch=0)


# ---- stored ---------------------------------------------------------------------------------------------------------


def latents(folder: Path, images: Source, section: EncodeSection = ENCODE) -> LatentStore:
    encode.run(section, images, locate_encoder(str(DINOV2)), Job(folder), EarlierParts())
    return LatentStore(folder)


def encoded(shown: np.ndarray) -> np.ndarray:
    """The tokens that the encoder makes of pixels."""
    tokens: np.ndarray = load_encoder(locate_encoder(str(DINOV2)), 28)(to_unit(shown, "cpu")).numpy()
    return tokens


def test_tokens_belong_to_the_image_and_the_view_that_is_shown(tmp_path: Path) -> None:
    images = source(tmp_path / "s", broken=(1,))
    store = latents(tmp_path / "latents", images)
    feed = StoredFeed(images, store, 32, seed=0)
    assert len(feed) == 3  # what has no latent never trains
    assert feed.keys_of(np.arange(3)) == ["k0", "k2", "k3"]
    flipped = set()
    for epoch in range(4):
        shown, tokens = feed.batch(np.array([2, 0, 1]), epoch)
        np.testing.assert_allclose(tokens, encoded(shown), atol=1e-4)
        for picture, number in zip(shown, (3, 0, 2), strict=True):
            crop = center_crop(Image.fromarray(pixels(number)), 32)
            flipped.add(bool(np.array_equal(picture, crop[:, ::-1])))
            assert np.array_equal(picture, crop) or flipped.issuperset({True})
    assert flipped == {True, False}


def test_the_view_is_a_function_of_seed_epoch_and_row(tmp_path: Path) -> None:
    images = source(tmp_path / "s")
    store = latents(tmp_path / "latents", images)
    feed = StoredFeed(images, store, 32, seed=0)
    whole, tokens = feed.batch(np.arange(4), epoch=3)
    for row in range(4):
        alone, token = feed.batch(np.array([row]), epoch=3)
        assert np.array_equal(alone[0], whole[row])
        assert np.array_equal(token[0], tokens[row])


def test_images_are_found_wherever_their_shards_stand_now(tmp_path: Path) -> None:
    store = latents(tmp_path / "latents", source(tmp_path / "s"))
    feed = StoredFeed(source(tmp_path / "t", order=(2, 3, 0, 1)), store, 32, seed=0)
    shown, tokens = feed.batch(np.arange(4), epoch=0)
    np.testing.assert_allclose(tokens, encoded(shown), atol=1e-4)
    assert feed.keys_of(np.arange(4)) == ["k0", "k1", "k2", "k3"]


def test_other_images_than_those_that_were_encoded_are_refused(tmp_path: Path) -> None:
    images = source(tmp_path / "s")
    store = latents(tmp_path / "latents", images)
    with pytest.raises(StaleInput, match="2 of their 2 source shards are not among the 2"):
        StoredFeed(source(tmp_path / "t", order=(0, 2, 1, 3)), store, 32, seed=0)
    feed = StoredFeed(images, store, 32, seed=0)
    tar = sorted((tmp_path / "s").glob("*.tar"))[-1]
    data = tar.read_bytes()
    place = data.index(b"IEND", data.index(b"k3"))
    tar.write_bytes(data[: place + 4] + b"!" + data[place + 5 :])
    feed.batch(np.arange(3), epoch=0)
    with pytest.raises(StaleInput, match="the image `k3` is not the one that was encoded"):
        feed.batch(np.array([3]), epoch=0)


# ---- the command ----------------------------------------------------------------------------------------------------


CACHED = ("-s", "train_decoder.feed=cached")


def test_cached_trains_without_the_encoder(rae_with: Callable[..., Rae]) -> None:
    rae = rae_with("shards", "latents")
    # No encoder is named at all: the latents say whose tokens they are.
    words = ("-s", "encode=null", "-s", "train_decoder.latents=tiny", *CACHED)
    rae.verb("train-decoder", *words).succeeded()
    about = rae.artifact("decoder/tiny")
    assert about["recipe"]["inputs"] == {"latents": rae.artifact("latents/tiny")["id"]}
    assert about["recipe"]["weights"] == {}
    assert "efficientnet-lite0" in rae("inspect", "decoder/tiny", "-w", rae.workspace).succeeded().out
    # The latents that the configuration makes are the same ones.
    assert rae.verb("train-decoder", *CACHED, "--json").succeeded().json["reused"]
    # A loss may still look at what the encoder sees.
    ran = rae.verb("train-decoder", *CACHED, "-s", "train_decoder.perceptual_loss=encoder", "--json").succeeded()
    assert ran.json["metrics"]["perceptual"] > 0
    assert len(rae.artifact("decoder/tiny")["recipe"]["weights"]) == 1


def test_latents_are_what_the_configuration_asks_for(rae_with: Callable[..., Rae]) -> None:
    rae = rae_with("shards", "latents")
    rae.verb("train-decoder", "-s", "train_decoder.latents=tiny").refused(2, "`feed: cached`")
    rae.verb("train-decoder", *CACHED, "-s", "train_decoder.latents=tiny", "-s", "encode.image_size=48").refused(
        4, "encode.image_size", "32", "48"
    )
    rae.verb("train-decoder", *CACHED, "-s", "encode.dtype=float32").refused(3, "latents", "rae encode")
    # Another number format is of the same tokens.
    words = ("-s", "train_decoder.latents=tiny", "-s", "encode.dtype=float32")
    rae.verb("train-decoder", *CACHED, *words).succeeded()


EVERY_LOSS = ("perceptual_loss=encoder", "adversarial_loss=encoder", "disc_start_step=1", "gan_start_step=2")


@pytest.mark.parametrize("feed", ["online", "cached"])
def test_a_run_that_was_killed_continues_to_the_bit(feed: str, rae_with: Callable[..., Rae]) -> None:
    losses = [word for setting in EVERY_LOSS for word in ("-s", f"train_decoder.{setting}")]
    words = (
        "-s",
        f"train_decoder.feed={feed}",
        *losses,
        "-s",
        "train_decoder.log_every=1",
        "-s",
        "train_decoder.keep_checkpoints=9",
    )
    rae = rae_with("shards", "latents")
    rae.verb("train-decoder", *words).succeeded()
    whole = rae.payload("decoder")
    metrics = rae.artifact("decoder/tiny")["metrics"]
    assert metrics["adversarial_loss"] == "the 4 finest feature maps of efficientnet-lite0 at 64 pixels"
    assert min(metrics[part] for part in ("perceptual", "d_weight", "disc_loss", "disc_grad_norm")) > 0
    # As it lay there after step 4 of 6.
    (made,) = (rae.workspace / "objects" / "decoder").iterdir()
    (made / "manifest.json").unlink()
    shutil.rmtree(next(made.glob("attempts/*/checkpoints/step-00000006")))
    ran = rae.verb("train-decoder", *words).succeeded()
    assert "continued from step 4" in ran.err
    assert rae.payload("decoder") == whole
