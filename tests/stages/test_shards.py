"""`rae shards`: every kind of source, the seeded choices, and what is written."""

import io
import json
import pickle
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from rae.stages.images import decode
from rae.stages.job import Job, Result
from rae.stages.sections import ShardsSection
from rae.stages.shards import choose_balanced, hold_out, in_place, run, seeded_ranks, source_digest
from rae.store.errors import ConfigError, CorruptData, MissingInput, PartialResult
from rae.store.shards import Source, open_source


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def convert(folder: Path, **settings: Any) -> Result:
    folder.mkdir(exist_ok=True)
    return run(ShardsSection(**settings), Job(folder))


def written(folder: Path, split: str = "train") -> Source:
    return open_source(f"{folder}/{split}-*.tar")


def image(number: int, format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (6, 5), (number % 256, 10, 20)).save(buffer, format)
    return buffer.getvalue()


def class_folders(root: Path, **counts: int) -> Path:
    for offset, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True)
        for number in range(count):
            (root / name / f"{number:03d}.png").write_bytes(image(100 * offset + number))
    return root


def by_key(source: Source) -> dict[str, tuple[bytes, int]]:
    return {source.keys[row]: (source.read(row), int(source.labels[row])) for row in range(len(source))}


# ---- sources --------------------------------------------------------------------------------------------------------


def test_class_folders_keep_their_bytes(tmp_path: Path) -> None:
    root = class_folders(tmp_path / "in", dog=3, cat=2)
    (root / "cat" / "photo.final.JPEG").write_bytes(image(7, "JPEG"))
    (root / "cat" / "broken.jpg").write_bytes(b"not an image")
    result = convert(tmp_path / "out", train=str(root))
    source = written(tmp_path / "out")
    assert source.classes == ("cat", "dog")
    assert json.loads((tmp_path / "out" / "classes.json").read_text()) == ["cat", "dog"]
    samples = by_key(source)
    assert samples["cat/photo%2Efinal"] == (image(7, "JPEG"), 0)
    assert samples["cat/broken"] == (b"not an image", 0), "the encoder records what can't be decoded"
    assert samples["dog/002"] == ((root / "dog" / "002.png").read_bytes(), 1)
    assert len(samples) == 7
    metrics = {"rows": 7, "val_rows": 0, "classes": 2, "skipped": 0, "bytes": 20480}
    assert result.metrics == metrics
    assert [path.name for path in result.files] == ["train-0000.tar", "index.json", "classes.json"]
    with tarfile.open(tmp_path / "out" / "train-0000.tar") as archive:
        names = set(archive.getnames())
    assert {"cat/photo%2Efinal.jpg", "cat/photo%2Efinal.cls", "dog/002.png"} <= names


def test_a_flat_folder_has_no_classes(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for number in range(3):
        (tmp_path / "in" / f"{number}.png").write_bytes(image(number))
    result = convert(tmp_path / "out", train=str(tmp_path / "in"))
    source = written(tmp_path / "out")
    assert (source.classes, source.num_classes, result.metrics["classes"]) == (None, 0, 0)
    assert not (tmp_path / "out" / "classes.json").exists()
    assert [source.reason(row) for row in range(3)] == [None] * 3


HUB_FEATURES = {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}, "img": {"_type": "Image"}}


def hub_table(first: int, count: int, column: str = "img", label: str = "label") -> pa.Table:
    images = [{"bytes": image(number), "path": f"{number}.png"} for number in range(first, first + count)]
    table = pa.table({column: images, label: pa.array([number % 2 for number in range(first, first + count)])})
    return table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": HUB_FEATURES}})})


def test_parquet_of_the_hub(tmp_path: Path) -> None:
    data = tmp_path / "hub" / "data"
    data.mkdir(parents=True)
    pq.write_table(hub_table(0, 70), data / "train-00000-of-00002.parquet", row_group_size=40)
    pq.write_table(hub_table(70, 30), data / "train-00001-of-00002.parquet")
    pq.write_table(hub_table(200, 4), data / "test-00000-of-00001.parquet")
    convert(tmp_path / "out", train=str(tmp_path / "hub"), val=str(tmp_path / "hub"), samples_per_shard=64)
    train, val = written(tmp_path / "out"), written(tmp_path / "out", "val")
    assert train.classes == val.classes == ("cat", "dog")
    assert train.labels.tolist() == [number % 2 for number in range(100)]
    assert [train.read(row) for row in range(100)] == [image(number) for number in range(100)]
    assert [val.read(row) for row in range(4)] == [image(number) for number in range(200, 204)]
    assert [shard.samples for shard in train.shards] == [64, 36]


def test_a_choice_from_parquet_reads_only_its_rows(tmp_path: Path) -> None:
    pq.write_table(hub_table(0, 90), tmp_path / "set.parquet", row_group_size=7)
    convert(tmp_path / "out", train=str(tmp_path / "set.parquet"), limit=10)
    source = written(tmp_path / "out")
    numbers = [int(key) for key in source.keys]
    assert numbers == sorted(numbers)
    assert [source.read(row) for row in range(10)] == [image(number) for number in numbers]
    assert Counter(source.labels.tolist()) == {0: 5, 1: 5}


@pytest.mark.parametrize("kind", ["bytes", "fine_label", "names", "dictionary", "nulls"])
def test_parquet_columns_of_many_kinds(tmp_path: Path, kind: str) -> None:
    images: list[object] = [image(0), image(1), image(2)]
    labels, classes = [1, 0, 1], None
    name, label, column = "image", "label", pa.array(labels)
    if kind == "fine_label":
        label = "fine_label"
    if kind in ("names", "dictionary"):
        column = pa.array(["ox", "ant", "ox"])
        column = column.dictionary_encode() if kind == "dictionary" else column
        classes = ("ant", "ox")
    if kind == "nulls":
        images[1], column, labels = None, pa.array([1, None, 1]), [1, -1, 1]
    pq.write_table(pa.table({name: images, label: column}), tmp_path / "set.parquet")
    convert(tmp_path / "out", train=str(tmp_path / "set.parquet"))
    source = written(tmp_path / "out")
    assert source.labels.tolist() == labels
    assert source.classes == classes
    assert source.read(1) == (b"" if kind == "nulls" else image(1))
    assert source.reason(1) == ("missing label" if kind == "nulls" else None)


def test_parquet_that_can_not_be_used(tmp_path: Path) -> None:
    path = tmp_path / "set.parquet"
    pq.write_table(pa.table({"text": ["a"], "label": [0]}), path)
    with pytest.raises(ConfigError, match=r"no image column.*text"):
        convert(tmp_path / "out", train=str(path))
    path.write_bytes(b"PAR1 but no more")
    with pytest.raises(CorruptData, match=r"set\.parquet can't be read as parquet"):
        convert(tmp_path / "out", train=str(path))
    pq.write_table(pa.table({"img": [image(0)], "label": [0.5]}), path)
    with pytest.raises(ConfigError, match="holds double"):
        convert(tmp_path / "out", train=str(path))
    pq.write_table(pa.table({"img": [image(0)], "label": [5]}), path)
    with pytest.raises(ConfigError, match=r"label 5 of `000000000`.*outside the class count"):
        convert(tmp_path / "out", train=str(path), classes=["a", "b"])
    (tmp_path / "hub").mkdir()
    pq.write_table(hub_table(0, 2), tmp_path / "hub" / "train-0.parquet")
    with pytest.raises(MissingInput, match="holds no val files"):
        convert(tmp_path / "out", train=str(tmp_path / "hub"), val=str(tmp_path / "hub"))


def cifar(folder: Path) -> np.ndarray:
    """Two training files of four records and a test file of two; returns all records, [10, 3073]."""
    folder.mkdir()
    records = np.random.default_rng(0).integers(0, 256, (10, 3073), np.uint8)
    records[:, 0] = np.arange(10) % 3
    for name, part in {"data_batch_1": records[:4], "data_batch_2": records[4:8], "test_batch": records[8:]}.items():
        (folder / f"{name}.bin").write_bytes(part.tobytes())
    (folder / "batches.meta.txt").write_text("\n".join(f"class{number}" for number in range(10)) + "\n\n")
    return records


def test_cifar10_binary_files(tmp_path: Path) -> None:
    records = cifar(tmp_path / "in")
    convert(tmp_path / "out", train=str(tmp_path / "in"), val=str(tmp_path / "in"))
    train, val = written(tmp_path / "out"), written(tmp_path / "out", "val")
    assert (len(train), len(val), train.num_classes, train.classes[3]) == (8, 2, 10, "class3")  # type: ignore[index]
    for row in range(len(train)):
        stem, place = train.keys[row].split("-")
        record = records[4 * (int(stem[-1]) - 1) + int(place)]
        assert train.labels[row] == record[0]
        pixels = np.asarray(decode(train.read(row)))
        np.testing.assert_array_equal(pixels, record[1:].reshape(3, 32, 32).transpose(1, 2, 0))
    (tmp_path / "in" / "data_batch_2.bin").write_bytes(b"\0" * 3074)
    with pytest.raises(CorruptData, match=r"data_batch_2\.bin"):
        convert(tmp_path / "out", train=str(tmp_path / "in"))


def test_digits_are_lossless(tmp_path: Path) -> None:
    from sklearn.datasets import load_digits

    result = convert(tmp_path / "out", train="digits", val_fraction=0.2)
    train, val = written(tmp_path / "out"), written(tmp_path / "out", "val")
    digits = load_digits()
    assert result.metrics["rows"] + result.metrics["val_rows"] == 1797
    assert set(train.keys) | set(val.keys) == {f"{row:04d}" for row in range(1797)}
    assert result.metrics["val_rows"] == pytest.approx(0.2 * 1797, abs=5)
    assert train.classes == tuple("0123456789")
    for source in (train, val):
        for row in range(0, len(source), 50):
            number = int(source.keys[row])
            assert source.labels[row] == digits.target[number]
            pixels = np.asarray(decode(source.read(row)))
            np.testing.assert_array_equal(np.rint(pixels[..., 0] * (16 / 255)), digits.images[number])


def test_tars_are_chosen_from(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for number in range(2):  # keys start again in each tar
        with tarfile.open(tmp_path / "in" / f"{number}.tar", "w") as archive:
            for key, suffix, data in [
                ("a", "png", image(number)),
                ("a", "cls", b"0"),
                ("b", "png", image(10 + number)),
                ("c", "cls", b"1"),
            ]:
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    result = convert(tmp_path / "out", train=str(tmp_path / "in"), limit=3)
    samples = by_key(written(tmp_path / "out"))
    assert result.metrics["skipped"] == 2, "c has no image"
    assert samples["00000/a"] == (image(0), 0)
    assert samples["00001/a"] == (image(1), 0)
    (last,) = samples.keys() - {"00000/a", "00001/a"}
    assert (last[-2:], samples[last][1]) == ("/b", -1), "what has no label comes last, and keeps having none"


def test_tars_without_a_choice_stay_where_they_lie(tmp_path: Path) -> None:
    convert(tmp_path / "first", train="digits", limit=10)
    tars = f"{tmp_path}/first/train-*.tar"
    assert in_place(ShardsSection(train=tars), "train")
    assert not in_place(ShardsSection(train=tars, limit=5), "train")
    assert not in_place(ShardsSection(train="digits"), "train")
    with pytest.raises(ConfigError, match="is webdataset tars already"):
        convert(tmp_path / "out", train=tars)
    root = class_folders(tmp_path / "in", **{"3": 2})
    result = convert(tmp_path / "out", train=tars, val=str(root))
    assert [path.name for path in result.files] == ["val-0000.tar", "index.json", "classes.json"]
    assert written(tmp_path / "out", "val").labels.tolist() == [3, 3], "numbered as the training classes are"


def test_val_folders_are_numbered_like_train(tmp_path: Path) -> None:
    class_folders(tmp_path / "train", ant=2, bee=2, cat=2)
    class_folders(tmp_path / "val", cat=1, bee=1)
    convert(tmp_path / "out", train=str(tmp_path / "train"), val=str(tmp_path / "val"))
    assert {key: label for key, (_, label) in by_key(written(tmp_path / "out", "val")).items()} == {
        "cat/000": 2,
        "bee/000": 1,
    }
    class_folders(tmp_path / "other", dog=1)
    with pytest.raises(ConfigError, match="dog is not one of the 3 classes"):
        convert(tmp_path / "out", train=str(tmp_path / "train"), val=str(tmp_path / "other"))


@pytest.mark.parametrize(
    ("train", "error", "message"),
    [
        (None, ConfigError, "names no images"),
        ("nowhere", MissingInput, "nowhere does not exist"),
        ("nowhere/*.parquet", MissingInput, "names no file"),
        (__file__, ConfigError, "is no source of images"),
    ],
)
def test_what_is_no_source_is_refused(tmp_path: Path, train: str | None, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        convert(tmp_path / "out", train=train)


# ---- seeded choices -------------------------------------------------------------------------------------------------


def test_limit_is_balanced_and_nested(tmp_path: Path) -> None:
    labels = np.repeat([0, 1, 2, 3], [100, 50, 3, 20])
    ranks = seeded_ranks([f"k{row}" for row in range(len(labels))], seed=0)
    chosen = choose_balanced(labels, ranks, 43)
    counts = Counter(labels[chosen].tolist())
    assert counts[2] == 3, "a small class gives all it has"
    assert sorted(counts[label] for label in (0, 1, 3)) == [13, 13, 14]
    assert set(choose_balanced(labels, ranks, 20)) < set(chosen), "a larger limit adds to a smaller one"
    assert len(choose_balanced(labels, ranks, None)) == len(choose_balanced(labels, ranks, 10**6)) == 173


def test_the_remainder_does_not_always_go_to_the_first_classes() -> None:
    labels = np.repeat(np.arange(10), 20)
    first = {
        int(labels[choose_balanced(labels, seeded_ranks([str(row) for row in range(200)], seed), 1)[0]])
        for seed in range(30)
    }
    assert len(first) > 5


def test_ranks_depend_on_seed_and_key_alone() -> None:
    keys = ["a", "b", "ü"]
    assert seeded_ranks(keys, 0).tolist() == seeded_ranks(keys[::-1], 0).tolist()[::-1]
    assert not set(seeded_ranks(keys, 0).tolist()) & set(seeded_ranks(keys, 1).tolist())
    assert seeded_ranks(["a"], 0).tolist() == [seeded_ranks(["b", "a"], 0).tolist()[1]]


def test_held_out_share_is_balanced() -> None:
    labels = np.repeat([0, 1, 2, -1], [100, 11, 1, 30])
    ranks = seeded_ranks([str(row) for row in range(len(labels))], 0)
    held = hold_out(labels, ranks, 0.2)
    assert [int(held[labels == label].sum()) for label in (0, 1, 2, -1)] == [20, 2, 0, 0]
    assert hold_out(np.full(50, -1), ranks[:50], 0.1).sum() == 5
    assert not hold_out(labels, ranks, 0.0).any()


def test_train_and_val_are_disjoint_and_complete(tmp_path: Path) -> None:
    root = class_folders(tmp_path / "in", ant=20, bee=10)
    result = convert(tmp_path / "out", train=str(root), val_fraction=0.25, limit=24)
    train, val = written(tmp_path / "out"), written(tmp_path / "out", "val")
    assert (result.metrics["rows"], result.metrics["val_rows"]) == (len(train), len(val)) == (17, 7)
    assert not set(train.keys) & set(val.keys)
    assert Counter(val.labels.tolist()) == {0: 4, 1: 3}, "a quarter of 14 and of 10, halves rounded up"
    with pytest.raises(ConfigError, match="leaves none to hold out"):
        convert(tmp_path / "other", train=str(root), val_fraction=0.1, limit=2)


# ---- what is written ------------------------------------------------------------------------------------------------


def test_the_same_source_gives_the_same_bytes(tmp_path: Path) -> None:
    root = class_folders(tmp_path / "in", ant=7, bee=5)
    settings: dict[str, Any] = {"train": str(root), "val_fraction": 0.3, "samples_per_shard": 4}
    one, two = convert(tmp_path / "one", **settings), convert(tmp_path / "two", **settings)
    assert one.content == two.content
    assert [path.name for path in one.files] == [path.name for path in two.files]
    for first, second in zip(one.files, two.files, strict=True):
        assert first.read_bytes() == second.read_bytes()
    assert convert(tmp_path / "three", **settings, seed=1).content != one.content


def test_class_folders_are_mixed(tmp_path: Path) -> None:
    root = class_folders(tmp_path / "in", ant=20, bee=20)
    convert(tmp_path / "out", train=str(root))
    labels = written(tmp_path / "out").labels
    assert 0 < labels[:20].sum() < 20


def test_a_stopped_run_starts_again_in_its_folder(tmp_path: Path) -> None:
    root = class_folders(tmp_path / "in", ant=9)
    config = ShardsSection(train=str(root), samples_per_shard=2)
    seen: list[tuple[int, int, str]] = []

    def stop() -> None:
        if len(seen) == 2:
            raise PartialResult("stopped")

    def progress(done: int, total: int, unit: str, **numbers: float) -> None:
        seen.append((done, total, unit))

    folder = tmp_path / "out"
    folder.mkdir()
    with pytest.raises(PartialResult):
        run(config, Job(folder, progress=progress, check_stop=stop))
    assert seen == [(2, 9, "images"), (4, 9, "images")]
    assert not (folder / "index.json").exists()
    result = run(config, Job(folder, progress=progress))
    assert seen[-1] == (9, 9, "images")
    assert result.content == convert(tmp_path / "fresh", train=str(root), samples_per_shard=2).content
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out", "fresh"}


@pytest.mark.parametrize("kind", ["folder", "parquet", "cifar10", "tars"])
def test_the_source_digest_follows_the_bytes_not_the_place(tmp_path: Path, kind: str) -> None:
    def folder(root: Path) -> Path:
        return class_folders(root, ant=2)

    def parquet(root: Path) -> Path:
        root.mkdir()
        pq.write_table(hub_table(0, 3), root / "x.parquet")
        return root

    def cifar10(root: Path) -> Path:
        cifar(root)
        return root

    def tars(root: Path) -> Path:
        convert(root, train=str(class_folders(tmp_path / f"for-{root.name}", ant=2)))
        return root

    make: Callable[[Path], Path] = {"folder": folder, "parquet": parquet, "cifar10": cifar10, "tars": tars}[kind]
    one, two = make(tmp_path / "one"), make(tmp_path / "two")
    before = source_digest(ShardsSection(train=str(one)))
    assert before == source_digest(ShardsSection(train=str(two)))
    assert before["val"] is None
    changed = next(path for path in sorted(two.rglob("*")) if path.suffix in (".png", ".parquet", ".bin", ".tar"))
    changed.write_bytes(changed.read_bytes()[:-1] + b"x")
    (two / "index.json").unlink(missing_ok=True)
    assert before != source_digest(ShardsSection(train=str(two)))


def test_digits_have_a_digest() -> None:
    digest = source_digest(ShardsSection(train="digits"))["train"]
    assert digest is not None
    assert len(digest) == 64


def test_the_source_of_a_stage_can_be_pickled(tmp_path: Path) -> None:
    convert(tmp_path / "out", train="digits", limit=10)
    source = written(tmp_path / "out")
    assert pickle.loads(pickle.dumps(source)).read(3) == source.read(3)  # noqa: S301 (our own object)


def test_of_several_processes_one_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = class_folders(tmp_path / "images", a=3, b=3)
    convert(tmp_path / "shards", train=str(source))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "shards").iterdir()}
    monkeypatch.setenv("RANK", "1")
    assert convert(tmp_path / "shards", train=str(source)).files == ()
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "shards").iterdir()} == before
