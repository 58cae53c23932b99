"""`rae encode`: what stands in the store is what the encoder gives, row by row, bad images or not."""

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rae.stages import encode
from rae.stages.images import center_crop, decode
from rae.stages.job import Job
from rae.stages.models.encoders import load_encoder
from rae.stages.models.pixels import to_unit
from rae.stages.models.weights import locate_encoder
from rae.stages.sections import EncodeSection
from rae.store.errors import CorruptData, PartialResult
from rae.store.latents import LatentStore
from rae.store.latents_takeover import EarlierParts
from rae.store.shards import Source, open_source
from rae.store.shards_writer import ShardWriter

DINOV2 = Path(__file__).parents[1] / "parity" / "encoder_dinov2"  # a tiny Hugging Face checkpoint with registers
SECTION = EncodeSection(
    encoder=str(DINOV2), image_size=64, encoder_input_size=56, batch_size=3, rows_per_part=4, dtype="float32"
)


def png(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (80, 72, 3), np.uint8)
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_shards(folder: Path, images: list[bytes]) -> Source:
    folder.mkdir()
    with ShardWriter(folder, "train", samples_per_shard=6, classes=["a", "b"]) as writer:
        for number, image in enumerate(images):
            writer.add(f"image{number}", image, "png", number % 2)
    return open_source(folder / "train-*.tar")


def run(folder: Path, source: Source, section: EncodeSection = SECTION, **job: object) -> LatentStore:
    folder.mkdir(exist_ok=True)
    encode.run(section, source, locate_encoder(section.encoder), Job(folder, **job), EarlierParts())  # type: ignore[arg-type]
    return LatentStore(folder, raw=True)


def test_the_store_holds_both_views_of_every_image_as_the_encoder_gives_them(tmp_path: Path) -> None:
    images = [png(seed) for seed in range(9)]
    store = run(tmp_path / "latents", write_shards(tmp_path / "shards", images))
    assert (len(store), store.views, store.shape) == (9, 2, (32, 4, 4))
    assert store.keys == [f"image{number}" for number in range(9)]
    assert store.labels.tolist() == [number % 2 for number in range(9)]
    encoder = load_encoder(locate_encoder(str(DINOV2)), 56)
    pixels = to_unit(np.stack([center_crop(decode(image), 64) for image in images]), "cpu")
    with torch.inference_mode():
        expected = torch.stack([encoder(pixels), encoder(pixels.flip(-1))], dim=1).numpy()
    for view in (0, 1):
        np.testing.assert_allclose(store.rows(range(9), view), expected[:, view], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(store.stats.mean, expected.astype(np.float64).mean((0, 1)), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(store.stats.variance, expected.astype(np.float64).var((0, 1)), rtol=1e-4, atol=1e-6)


def test_a_bad_image_is_recorded_and_changes_no_other_row(tmp_path: Path) -> None:
    images = [png(seed) for seed in range(9)]
    clean = run(tmp_path / "clean", write_shards(tmp_path / "clean-shards", images))
    broken = [*images[:4], images[4][: len(images[4]) // 2], *images[5:]]
    store = run(tmp_path / "broken", write_shards(tmp_path / "broken-shards", broken))
    kept = [row for row in range(9) if row != 4]
    assert store.keys == [clean.keys[row] for row in kept]
    np.testing.assert_array_equal(store.rows(range(8), 0), clean.rows(kept, 0))
    [invalid] = store.invalid_rows()
    assert invalid["key"] == "image4"
    assert "truncated" in invalid["reason"]


def test_an_image_too_thin_to_be_cropped_is_recorded_like_any_bad_one(tmp_path: Path) -> None:
    buffer = BytesIO()
    Image.new("L", (50_000, 1)).save(buffer, "PNG")
    store = run(tmp_path / "latents", write_shards(tmp_path / "shards", [png(0), buffer.getvalue()]))
    assert store.keys == ["image0"]
    assert [row["reason"] for row in store.invalid_rows()] == ["too elongated: 50000 x 1 pixels"]


def test_images_none_of_which_decode_are_refused_with_the_reason(tmp_path: Path) -> None:
    source = write_shards(tmp_path / "shards", [b"not an image", b"neither"])
    with pytest.raises(CorruptData, match="none of the 2 images"):
        run(tmp_path / "latents", source)


def test_an_interrupted_encode_continues_by_part_to_the_same_bytes(tmp_path: Path) -> None:
    source = write_shards(tmp_path / "shards", [png(seed) for seed in range(60)])
    whole = run(tmp_path / "whole", source)
    parts: list[int] = []

    def stop_after_first_part() -> None:
        parts.append(1)
        if len(parts) == 1:
            raise PartialResult("stopped")

    with pytest.raises(PartialResult):
        run(tmp_path / "latents", source, check_stop=stop_after_first_part)
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "latents").glob("latents/c/*/0/0/0/0")}
    assert 1 <= len(done) < 20  # what was under way when it stopped may have ended well
    store = run(tmp_path / "latents", source)
    assert all(path.stat().st_mtime_ns == mtime for path, mtime in done.items())
    for view in (0, 1):
        np.testing.assert_array_equal(store.rows(range(60), view), whole.rows(range(60), view))
    for name in ("index.parquet", "stats.npz"):
        assert (tmp_path / "latents" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_one_view_is_stored_where_a_flip_would_be_another_thing(tmp_path: Path) -> None:
    source = write_shards(tmp_path / "shards", [png(0), png(1)])
    store = run(tmp_path / "latents", source, SECTION.model_copy(update={"horizontal_flip": False}))
    assert store.views == 1
    assert store.draw_views(np.arange(2), seed=0, epoch=0).tolist() == [0, 0]
