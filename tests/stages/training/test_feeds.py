"""What the decoder is shown, by each feed: which image, which view, which tokens."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import zarr
from PIL import Image

from rae.stages import encode
from rae.stages.images import center_crop
from rae.stages.job import Job
from rae.stages.models.encoders import load_encoder
from rae.stages.models.pixels import to_unit
from rae.stages.models.weights import locate_encoder
from rae.stages.sections import EncodeSection
from rae.stages.training.feeds import OnlineFeed, StoredFeed
from rae.store.crops import CropLaw
from rae.store.errors import ConfigError, CorruptData, MissingInput, StaleInput
from rae.store.latents import LatentStore
from rae.store.latents_takeover import EarlierParts
from rae.store.shards import Source, open_source
from rae.store.shards_writer import ShardWriter
from tests.conftest import TINY, Rae

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


# ---- crops ----------------------------------------------------------------------------------------------------------


CROPS = ENCODE.model_copy(update={"crops": 3, "resize_size": 40})


def test_tokens_belong_to_the_crop_that_is_shown(tmp_path: Path) -> None:
    images = source(tmp_path / "s", broken=(1,))
    store = latents(tmp_path / "latents", images, CROPS)
    assert (store.views, store.layout.view_kind, len(store)) == (3, "crops", 3)
    feed = StoredFeed(images, store, 32, seed=0, resize_size=40)
    pictures = set()
    for epoch in range(8):
        shown, tokens = feed.batch(np.array([2, 0, 1]), epoch)
        np.testing.assert_allclose(tokens, encoded(shown), atol=1e-4)
        pictures |= {picture.tobytes() for picture in shown}
    assert len(pictures) == 9  # three crops of each of three images


def test_boxes_are_recorded_in_the_image_resized(tmp_path: Path) -> None:
    images = source(tmp_path / "s", broken=(1,))
    store = latents(tmp_path / "latents", images, CROPS)
    boxes = np.load(store.folder / "boxes.npy")
    assert (boxes.shape, boxes.dtype) == ((6, 3, 4), np.int32)  # two parts of three slots
    valid = [0, 3, 4]
    assert (np.delete(boxes, valid, axis=0) == -1).all()
    assert (boxes[valid][..., 2:] - boxes[valid][..., :2] == 32).all()
    resized = Image.fromarray(pixels(2)).resize((48, 40), Image.Resampling.BICUBIC)  # k2: the second shard's first
    crops = np.stack([np.asarray(resized.crop(tuple(box))) for box in boxes[3].tolist()])
    np.testing.assert_allclose(store.rows([1, 1, 1], [0, 1, 2]), encoded(crops), atol=1e-4)


def test_crops_follow_their_source_shard_and_the_seed(tmp_path: Path) -> None:
    store = latents(tmp_path / "latents", source(tmp_path / "s"), CROPS)
    moved = latents(tmp_path / "moved", source(tmp_path / "t", order=(2, 3, 0, 1)), CROPS)
    every = np.arange(3).repeat(4)
    same = moved.rows([2, 3, 0, 1] * 3, every)
    np.testing.assert_allclose(store.rows([0, 1, 2, 3] * 3, every), same, atol=1e-4)
    other = latents(tmp_path / "other", source(tmp_path / "u"), CROPS.model_copy(update={"seed": 1}))
    assert not np.allclose(store.rows([0, 1, 2, 3] * 3, every), other.rows([0, 1, 2, 3] * 3, every), atol=1e-4)


def test_every_position_is_equally_likely() -> None:
    boxes = CropLaw(seed=0, resize_size=10, image_size=9).boxes("a", np.arange(3000), np.full((3000, 2), (20, 10)), 2)
    assert (boxes[..., 2:] - boxes[..., :2] == 9).all()
    counts = [np.bincount(boxes[:, view, 0], minlength=12) for view in range(2)]
    assert all(len(count) == 12 and count.min() > 180 and count.max() < 320 for count in counts)  # 250 each
    assert set(boxes[..., 1].ravel()) == {0, 1}
    assert not np.array_equal(boxes[:, 0], boxes[:, 1])


def test_damaged_boxes_are_named(tmp_path: Path) -> None:
    images = source(tmp_path / "s")
    store = latents(tmp_path / "latents", images, CROPS)
    path = store.folder / "boxes.npy"
    np.save(path, np.load(path)[:-1])
    with pytest.raises(CorruptData, match=r"boxes\.npy holds int32 \(5, 3, 4\), not a box for 6 x 3 views"):
        StoredFeed(images, store, 32, seed=0, resize_size=40)
    path.unlink()
    with pytest.raises(MissingInput, match=r"boxes\.npy, are missing"):
        StoredFeed(images, store, 32, seed=0, resize_size=40)


def test_views_that_are_crops_are_no_flips(tmp_path: Path) -> None:
    store = latents(tmp_path / "latents", source(tmp_path / "s"), CROPS)
    with pytest.raises(ConfigError, match=r"the views in .*latents are crops"):
        store.batches(2, seed=0, epoch=0, horizontal_flip=False)
    assert zarr.open_array(store.folder / "latents").attrs["rae_views"] == "crops"


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


OF_CROPS = ("-s", "encode.crops=2", "-s", "encode.resize_size=36")


def test_a_decoder_trains_on_crops_and_a_transformer_is_refused_them(rae_with: Callable[..., Rae]) -> None:
    rae = rae_with("shards", "latents")
    crops = ("-s", "train_decoder.feed=crops")
    views = "the latents' views are flips: encode with `encode.crops`"
    rae.verb("train-decoder", *crops).refused(2, "`train_decoder.feed` is crops", views)
    rae.verb("train-decoder", *CACHED, *OF_CROPS).refused(3, "rae encode")
    rae.verb("encode", *OF_CROPS, "-s", "name=crops").succeeded()
    rae.verb("train-decoder", *CACHED, *OF_CROPS).refused(2, "the latents' views are crops: set it to crops")
    rae.verb("train-decoder", *crops, *OF_CROPS).succeeded()
    # The transformer's latents by `encode`, the decoder's by name.
    rae.verb("train-decoder", *crops, "-s", "train_decoder.latents=crops", "--json").succeeded().json["reused"]
    rae.verb("train-dit", *OF_CROPS).refused(2, "random crops", "train_dit.allow_crops")
    rae.verb("run", *crops, *OF_CROPS, "--dry-run").refused(2, "random crops", "train_dit.allow_crops")
    rae.verb("train-dit", *OF_CROPS, "-s", "train_dit.allow_crops=true").succeeded()


def test_a_damaged_crop_is_cut_and_encoded_again(tmp_path: Path) -> None:
    encode = TINY["encode"] | {"crops": 2, "resize_size": 36}
    rae = Rae(tmp_path / "rae", {"shards": TINY["shards"] | {"limit": 16}, "encode": encode})
    rae.verb("encode").succeeded()
    whole = rae.payload("latents")
    (shard,) = rae.workspace.glob("objects/latents/*/latents/c/1/0/0/0/0")
    data = bytearray(shard.read_bytes())
    data[5000] ^= 1
    shard.write_bytes(data)
    verify = ("verify", "latents/tiny", "-w", rae.workspace)
    rae(*verify).refused(5, "1 problem(s)")
    rae(*verify, "--repair", "--config", rae.config).succeeded()
    rae(*verify).succeeded()
    assert rae.payload("latents") == whole
    for name in ("latents/zarr.json", "boxes.npy"):
        (path,) = rae.workspace.glob(f"objects/latents/*/{name}")
        path.unlink()
    rae(*verify, "--repair", "--config", rae.config).succeeded()
    rae(*verify).succeeded()
    assert rae.payload("latents") == whole


def test_crops_say_what_they_are_cut_from(rae: Rae) -> None:
    rae.verb("encode", "-s", "encode.crops=2").refused(2, "give both, or neither")
    rae.verb("encode", "-s", "encode.crops=2", "-s", "encode.resize_size=24").refused(2, "24 is less than", "32")


EVERY_LOSS = ("perceptual_loss=encoder", "adversarial_loss=encoder", "disc_start_step=1", "gan_start_step=2")
KEEPING_ALL = ("log_every=1", "keep_checkpoints=9")


def words(*settings: str) -> list[str]:
    return [word for setting in (*settings, *EVERY_LOSS) for word in ("-s", f"train_decoder.{setting}")]


def test_a_discriminator_of_weight_0_is_not_there(rae_with: Callable[..., Rae]) -> None:
    rae = rae_with("shards")
    dino = ("-s", "train_decoder.adversarial_loss=dino", "-s", "train_decoder.disc_weights=nowhere.pth")
    ran = rae.verb("train-decoder", *dino, "-s", "train_decoder.disc_weight=0", "--json")
    metrics = ran.succeeded().json["metrics"]
    assert metrics["adversarial_loss"] == "none"
    assert "disc_loss" not in metrics
    (folder,) = rae.workspace.glob("objects/decoder/*/attempts/*/checkpoints/step-00000006")
    assert not (folder / "heads.safetensors").exists()
    assert rae.verb("train-decoder", "--json").succeeded().json["reused"]  # tiny's has none


@pytest.mark.parametrize("feed", ["online", "cached", "crops"])
def test_a_run_that_was_killed_continues_to_the_bit(feed: str, rae_with: Callable[..., Rae]) -> None:
    rae = rae_with("shards", "latents")
    settings = words(f"feed={feed}", *KEEPING_ALL)
    if feed == "crops":
        rae.verb("encode", *OF_CROPS, "-s", "name=crops").succeeded()
        settings += words("latents=crops")
    rae.verb("train-decoder", *settings).succeeded()
    whole = rae.payload("decoder")
    metrics = rae.artifact("decoder/tiny")["metrics"]
    assert metrics["adversarial_loss"] == "the 4 finest feature maps of efficientnet-lite0 at 64 pixels"
    assert min(metrics[part] for part in ("perceptual", "d_weight", "disc_loss", "disc_grad_norm")) > 0
    # As it lay there after step 4 of 6.
    (made,) = (rae.workspace / "objects" / "decoder").iterdir()
    (made / "manifest.json").unlink()
    shutil.rmtree(next(made.glob("attempts/*/checkpoints/step-00000006")))
    ran = rae.verb("train-decoder", *settings).succeeded()
    assert "continued from step 4" in ran.err
    assert rae.payload("decoder") == whole


def test_two_ranks_are_one_process(rae_with: Callable[..., Rae]) -> None:
    one, two = rae_with("shards", "latents"), rae_with("shards", "latents")
    settings = words("feed=cached")
    one.verb("train-decoder", *settings).succeeded()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "rae.pipeline.cli", *two.words("train-decoder", *settings)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(two.folder / "cache")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    alone, together = (rae.artifact("decoder/tiny") for rae in (one, two))
    assert together["id"] == alone["id"]
    for part in ("loss", "l1", "perceptual", "gen_loss", "disc_loss"):
        assert together["metrics"][part] == pytest.approx(alone["metrics"][part], rel=1e-4, abs=1e-5), part
