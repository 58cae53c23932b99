"""Webdataset shards and image folders, read by address."""

import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from rae.store.errors import ConfigError, CorruptData, MissingInput, StaleInput
from rae.store.shards import Keys, Source, is_shards, open_source
from rae.store.shards_writer import ShardWriter
from rae.store.tar_index import read_index


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def make_tar(path: Path, *members: tuple[str, bytes], format: int = tarfile.GNU_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def sample(key: str, label: int | None = 0, extension: str = "jpg") -> list[tuple[str, bytes]]:
    image = (f"{key}.{extension}", f"pixels of {key}".encode() * 100)
    return [image] if label is None else [image, (f"{key}.cls", str(label).encode())]


def reasons(source: Source) -> dict[str, str | None]:
    return {source.keys[row]: source.reason(row) for row in range(len(source))}


# ---- reading --------------------------------------------------------------------------------------------------------


def test_reads_what_webdataset_reads(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    long = "a/long/folder.with.dots/" + "name" * 40
    path = make_tar(
        tmp_path / "set.tar",
        *sample("first", 3),
        ("first.json", b'{"label": 7}'),
        *sample("./here/second", 1, "PNG"),
        ("third.jpg", b"jpg"),
        ("third.png", b"png"),
        ("third.json", b'{"label": 2}'),
        *sample(long, 5),
        *sample("ünïcode", 6),
        ("fourth.extra.jpg", b"not the image"),
        ("fourth.jpeg", b"the image"),
        ("fourth.cls", b" 4\n"),
        ("__meta__", b"of webdataset"),
    )
    source = open_source(path)
    theirs = list(webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False))
    assert list(source.keys) == [item["__key__"] for item in theirs]
    for row, item in enumerate(theirs):
        image = next(item[suffix] for suffix in ("jpg", "jpeg", "png") if suffix in item)
        label = int(item["cls"]) if "cls" in item else json.loads(item["json"])["label"]
        assert (source.read(row), source.labels[row], source.reason(row)) == (image, label, None)
    assert source.num_classes == 7


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_tar_format_is_read_and_checked(tmp_path: Path, format: int) -> None:
    key = "deep/" * 19 + "name" * 10
    source = open_source(make_tar(tmp_path / "set.tar", *sample(key), *sample("next"), format=format))
    assert list(source.keys) == [key, "next"]
    assert source.read(0) == sample(key)[0][1]


def test_earlier_image_and_label_keys_win(tmp_path: Path) -> None:
    members = [("a.cls", b"1"), ("a.jpg", b"jpg"), ("a.json", b'{"label": 2, "kind": 3}'), ("a.png", b"png")]
    path = make_tar(tmp_path / "set.tar", *members)
    assert open_source(path).read(0) == b"jpg"
    assert open_source(path, image_key="png;jpg").read(0) == b"png"
    assert open_source(path).labels.tolist() == [1]
    assert open_source(path, label_key="json;cls").labels.tolist() == [2]
    assert open_source(path, label_key="json", label_field="kind").labels.tolist() == [3]


def test_labels_may_be_class_names(tmp_path: Path) -> None:
    members = [("a.jpg", b"a"), ("a.json", b'{"class": "dog"}'), ("b.jpg", b"b"), ("b.json", b'{"class": "ox"}')]
    path = make_tar(tmp_path / "set.tar", *members)
    source = open_source(path, label_field="class", classes=["cat", "dog"])
    assert source.labels.tolist() == [1, -1]
    assert reasons(source) == {"a": None, "b": "unreadable label"}
    with pytest.raises(ConfigError, match=r"no label of .*set\.tar"):
        open_source(path, label_field="class")


def test_classes_json_beside_the_tars_names_them(tmp_path: Path) -> None:
    path = make_tar(tmp_path / "set.tar", *sample("a", 1))
    (tmp_path / "classes.json").write_text('["cat", "dog", "ox"]')
    assert open_source(path).classes == ("cat", "dog", "ox")
    assert open_source(path).num_classes == 3
    (tmp_path / "classes.json").write_text('{"cat": 0}')
    with pytest.raises(CorruptData, match=r"classes\.json"):
        open_source(path)


def test_brace_ranges_patterns_and_folders_keep_their_order(tmp_path: Path) -> None:
    for number in range(3):
        make_tar(tmp_path / f"train-{number:04d}.tar", *sample(f"k{number}", number), *sample(f"l{number}", number))
    everything = open_source(f"{tmp_path}/train-{{0000..0002}}.tar")
    assert list(everything.keys) == ["k0", "l0", "k1", "l1", "k2", "l2"]
    assert [(shard.name, shard.samples, shard.first) for shard in everything.shards] == [
        ("train-0000.tar", 2, 0),
        ("train-0001.tar", 2, 2),
        ("train-0002.tar", 2, 4),
    ]
    assert everything.read(5) == sample("l2")[0][1]
    assert list(open_source(f"{tmp_path}/train-{{0002,0000}}.tar").keys) == ["k2", "l2", "k0", "l0"]
    assert open_source(f"{tmp_path}/*.tar").digests == everything.digests == open_source(tmp_path).digests


def test_missing_shards_are_named(tmp_path: Path) -> None:
    make_tar(tmp_path / "train-0001.tar", *sample("a"))
    with pytest.raises(MissingInput, match=r"2 of 3 files.*train-0000\.tar, .*train-0002\.tar"):
        open_source(f"{tmp_path}/train-{{0000..0002}}.tar")
    with pytest.raises(MissingInput, match=r"nowhere\.tar does not exist"):
        open_source(tmp_path / "nowhere.tar")
    with pytest.raises(MissingInput, match="names no file"):
        open_source(f"{tmp_path}/val-*.tar")
    with pytest.raises(ConfigError, match="braces"):
        open_source(f"{tmp_path}/train-{{0000..0002.tar")


def test_what_is_no_tar_is_refused(tmp_path: Path) -> None:
    (tmp_path / "page.tar").write_bytes(b"<html>404</html>" * 100)
    with pytest.raises(CorruptData, match=r"page\.tar is not a tar"):
        open_source(tmp_path / "page.tar")
    with pytest.raises(ConfigError, match="compressed"):
        open_source(tmp_path / "train-{0..9}.tar.gz")


def test_empty_sets_are_refused_with_what_was_found(tmp_path: Path) -> None:
    with pytest.raises(MissingInput, match="holds no images"):
        open_source(make_tar(tmp_path / "empty.tar"))
    with pytest.raises(MissingInput, match="found cls;tiff"):
        open_source(make_tar(tmp_path / "other.tar", *sample("a", extension="tiff")))
    (tmp_path / "folder").mkdir()
    with pytest.raises(MissingInput, match="holds no images"):
        open_source(tmp_path / "folder")


def test_train_and_val_of_one_folder_are_never_mixed(tmp_path: Path) -> None:
    for name in ("train", "val"):
        make_tar(tmp_path / f"{name}-0000.tar", *sample(name))
    with pytest.raises(ConfigError, match="several sets"):
        open_source(tmp_path)
    assert list(open_source(f"{tmp_path}/val-*.tar").keys) == ["val"]


def test_a_label_outside_the_classes_is_refused_by_name(tmp_path: Path) -> None:
    path = make_tar(tmp_path / "set.tar", *sample("good", 2), *sample("bad", 3))
    with pytest.raises(ConfigError, match=r"label 3 of `bad` in .*set\.tar is outside .*0\.\.2, of 3 classes"):
        open_source(path, classes=["a", "b", "c"])
    assert open_source(path, classes=["a", "b", "c", "d"]).num_classes == 4


# ---- samples that can't be used -------------------------------------------------------------------------------------


def test_bad_samples_keep_their_row_and_say_why(tmp_path: Path) -> None:
    path = make_tar(
        tmp_path / "set.tar",
        *sample("good", 1),
        ("no-image.cls", b"1"),
        ("no-label.jpg", b"image"),
        ("odd-label.jpg", b"image"),
        ("odd-label.cls", b"dog"),
        *sample("twice", 1),
        *sample("between", 1),
        ("twice.jpg", b"again"),
        ("twice.cls", b"0"),
        ("empty.jpg", b""),
        ("empty.cls", b"1"),
    )
    source = open_source(path)
    assert [source.reason(row) for row in range(len(source))] == [
        None,
        "missing image",
        "missing label",
        "unreadable label",
        None,
        None,
        "duplicate key",
        None,
    ]
    assert source.read(5) == sample("between")[0][1], "neighbours are not shifted"
    assert source.read(7) == b"", "an empty file is the decoder's to refuse"
    with pytest.raises(CorruptData, match="missing image"):
        source.read(1)


def test_without_any_label_nothing_is_missing(tmp_path: Path) -> None:
    source = open_source(make_tar(tmp_path / "set.tar", *sample("a", None), *sample("b", None)))
    assert reasons(source) == {"a": None, "b": None}
    assert source.num_classes == 0


def test_keys_may_start_again_in_every_tar(tmp_path: Path) -> None:
    for number in range(2):
        make_tar(tmp_path / f"{number}.tar", *sample("000", number))
    source = open_source(tmp_path)
    assert [source.reason(row) for row in range(2)] == [None, None]


# A tar of a.jpg, a.cls, b.jpg, b.cls (3 blocks, 2, 3, 2) is cut at `size`; `usable` are the rows that stay.
@pytest.mark.parametrize(
    ("size", "usable"),
    [
        (0, []),
        (100, []),
        (512 + 700, []),
        (512 * 5, ["a"]),  # after a sample, without an end-of-archive mark
        (512 * 5 + 200, ["a"]),  # within a header
        (512 * 6 + 20, ["a"]),  # within b.jpg
        (512 * 8 + 30, ["a"]),  # b.jpg whole, its label lost
        (512 * 10, ["a", "b"]),
    ],
)
def test_a_truncated_tar_gives_what_it_holds_and_one_row_that_says_so(
    tmp_path: Path, size: int, usable: list[str]
) -> None:
    make_tar(tmp_path / "whole.tar", *sample("w", 1))
    path = make_tar(
        tmp_path / "x-cut.tar", ("a.jpg", b"A" * 900), ("a.cls", b"1"), ("b.jpg", b"B" * 900), ("b.cls", b"2")
    )
    os.truncate(path, size)
    source = open_source(tmp_path)
    found = [source.reason(row) for row in range(len(source))]
    assert [key for key, reason in zip(source.keys, found, strict=True) if reason is None] == ["w", *usable]
    assert [reason for reason in found if reason] == ["truncated tar"]
    assert found[-1] == "truncated tar"
    for row, key in enumerate(usable, start=1):
        assert source.read(row) == key.upper().encode() * 900


def test_noise_within_a_tar_is_recorded(tmp_path: Path) -> None:
    path = make_tar(tmp_path / "set.tar", *sample("a", 1), *sample("b", 1), *sample("c", 1))
    data = bytearray(path.read_bytes())
    start = data.index(b"b.jpg")
    data[start : start + 512] = b"\xff" * 512
    path.write_bytes(data)
    source = open_source(path)
    assert reasons(source) == {"a": None, "set.tar": "damaged tar"}


def test_hostile_tars_end_in_an_answer(tmp_path: Path) -> None:
    """Header fields that no writer makes: negative and huge sizes, thousands of nested extension headers."""
    good = make_tar(tmp_path / "good.tar", *sample("a", 1)).read_bytes()[: 512 * 6]
    member = tarfile.TarInfo("evil.jpg")
    negative = bytearray(member.tobuf())
    negative[124:136] = b"\xff" * 12
    huge = bytearray(member.tobuf())
    huge[124:136] = b"\x80" + b"\0" * 3 + b"\x7f" + b"\xff" * 7
    for header in (negative, huge):
        checksum = sum(header[:148]) + sum(header[156:]) + 8 * 32
        header[148:156] = b"%06o\0 " % checksum
    nested = tarfile.TarInfo("././@LongLink")
    nested.type, nested.size = tarfile.GNUTYPE_LONGNAME, 1
    for number, tail in enumerate([bytes(negative), bytes(huge), (nested.tobuf() + b"x".ljust(512, b"\0")) * 3000]):
        path = tmp_path / f"evil-{number}.tar"
        path.write_bytes(good + tail)
        source = open_source(path)
        assert source.keys[0] == "a"
        assert source.read(0) == sample("a")[0][1]
        assert source.reason(len(source) - 1) in ("truncated tar", "damaged tar")


# ---- the index and the cache are not believed blindly ---------------------------------------------------------------


def written(folder: Path, count: int = 5, **options: int) -> Path:
    folder.mkdir(exist_ok=True)
    with ShardWriter(folder, "train", options.get("samples_per_shard", 2), ["cat", "dog"]) as writer:
        for number in range(count):
            writer.add(f"k{number}", f"image {number}".encode() * 50, "png", number % 2)
    return folder


def test_written_shards_read_back_by_index_and_by_scan(tmp_path: Path) -> None:
    folder = written(tmp_path / "out")
    assert sorted(path.name for path in folder.iterdir()) == [
        "index.json",
        "train-0000.tar",
        "train-0001.tar",
        "train-0002.tar",
    ]
    indexed = open_source(f"{folder}/train-*.tar")
    (folder / "index.json").unlink()
    scanned = open_source(f"{folder}/train-*.tar", classes=["cat", "dog"])
    assert indexed.digests == scanned.digests
    assert list(indexed.keys) == list(scanned.keys) == ["k0", "k1", "k2", "k3", "k4"]
    assert indexed.labels.tolist() == scanned.labels.tolist() == [0, 1, 0, 1, 0]
    assert [indexed.read(row) for row in range(5)] == [scanned.read(row) for row in range(5)]
    assert indexed.classes == ("cat", "dog")


def test_equal_samples_give_equal_bytes(tmp_path: Path) -> None:
    one, two = written(tmp_path / "one"), written(tmp_path / "two")
    for path in sorted(one.iterdir()):
        assert path.read_bytes() == (two / path.name).read_bytes()


def test_several_sets_share_an_index(tmp_path: Path) -> None:
    folder = written(tmp_path / "out")
    with ShardWriter(folder, "val", 10, ["cat", "dog"]) as writer:
        writer.add("v", b"image", "jpg", 1)
    assert sorted(read_index(folder / "index.json")[1]) == [
        "train-0000.tar",
        "train-0001.tar",
        "train-0002.tar",
        "val-0000.tar",
    ]
    entry = json.loads((folder / "index.json").read_text())["shards"][-1]
    assert entry.keys() == {"name", "sha256", "bytes", "samples", "keys", "offsets"}
    assert entry["offsets"] == [[512, 5, 1]]


def test_a_writer_overwrites_nothing_and_refuses_unreadable_keys(tmp_path: Path) -> None:
    written(tmp_path / "out")
    with pytest.raises(StaleInput, match=r"train-0000\.tar exists"):
        written(tmp_path / "out")
    with pytest.raises(ValueError, match="has a dot"), ShardWriter(tmp_path, "x") as writer:
        writer.add("folder.v1/name.v2", b"", "jpg")
    assert not (tmp_path / "index.json").exists()


def test_an_index_that_does_not_fit_the_tar_is_not_used(tmp_path: Path) -> None:
    folder = written(tmp_path / "out")
    make_tar(folder / "train-0001.tar", *sample("replaced" * 200, 1))
    source = open_source(f"{folder}/train-*.tar")
    assert list(source.keys) == ["k0", "k1", "replaced" * 200, "k4"]
    assert source.read(2) == sample("replaced" * 200)[0][1]


def test_a_tar_that_changed_under_its_index_is_noticed_on_reading(tmp_path: Path) -> None:
    folder = written(tmp_path / "out")
    source = open_source(f"{folder}/train-*.tar")
    make_tar(folder / "train-0000.tar", ("other.png", b"x" * 400), ("k1.png", b"x" * 400))
    assert (folder / "train-0000.tar").stat().st_size == read_index(folder / "index.json")[1]["train-0000.tar"].size
    with pytest.raises(CorruptData, match=r"train-0000\.tar does not hold `k0`"):
        source.read(0)
    with pytest.raises(CorruptData, match=r"train-0000\.tar does not hold `k1`"):
        open_source(f"{folder}/train-*.tar").read(1)


def test_verify_finds_a_flipped_bit(tmp_path: Path) -> None:
    folder = written(tmp_path / "out")
    source = open_source(f"{folder}/train-*.tar")
    for shard in source.shards:
        source.verify(shard)
    data = bytearray((folder / "train-0001.tar").read_bytes())
    data[600] ^= 1
    (folder / "train-0001.tar").write_bytes(data)
    with pytest.raises(CorruptData, match=r"train-0001\.tar has sha256"):
        source.verify(source.shards[1])


@pytest.mark.parametrize(
    "change",
    [
        lambda entry: entry["offsets"][0].__setitem__(0, 10**9),
        lambda entry: entry["offsets"][0].__setitem__(1, -5),
        lambda entry: entry["offsets"].pop(),
        lambda entry: entry.__setitem__("sha256", "zz"),
        lambda entry: entry.__setitem__("keys", [1, 2]),
        lambda entry: entry.__setitem__("bytes", "many"),
        lambda entry: entry.pop("offsets"),
    ],
)
def test_an_index_that_can_not_be_right_is_refused(tmp_path: Path, change: object) -> None:
    folder = written(tmp_path / "out")
    document = json.loads((folder / "index.json").read_text())
    change(document["shards"][0])  # type: ignore[operator]
    (folder / "index.json").write_text(json.dumps(document))
    with pytest.raises(CorruptData, match=r"index\.json is not a readable index"):
        open_source(f"{folder}/train-*.tar")


def test_classes_in_another_order_than_the_index_are_refused(tmp_path: Path) -> None:
    spec = f"{written(tmp_path / 'out')}/train-*.tar"
    assert open_source(spec, classes=["Katze", "Hund"]).classes == ("Katze", "Hund")
    with pytest.raises(ConfigError, match="in another order"):
        open_source(spec, classes=["dog", "cat"])


def test_another_tools_index_is_passed_over(tmp_path: Path) -> None:
    folder = written(tmp_path / "out")
    (folder / "index.json").write_text('{"wids_version": 1, "shardlist": [{"url": "train-0000.tar", "nsamples": 2}]}')
    assert len(open_source(f"{folder}/train-*.tar")) == 5


def test_the_cache_saves_the_scan_and_is_dropped_when_the_tar_changes(tmp_path: Path) -> None:
    path = make_tar(tmp_path / "set.tar", *sample("a", 1))
    first = open_source(path)
    assert len(list((Path(os.environ["XDG_CACHE_HOME"]) / "rae" / "index").iterdir())) == 1
    os.chmod(path, 0o644)
    assert open_source(path).digests == first.digests
    make_tar(path, *sample("b", 2))
    os.utime(path, ns=(1, 1))
    assert list(open_source(path).keys) == ["b"]


def test_a_broken_cache_costs_time_only(tmp_path: Path) -> None:
    path = make_tar(tmp_path / "set.tar", *sample("a", 1))
    before = open_source(path)
    for hint in (Path(os.environ["XDG_CACHE_HOME"]) / "rae" / "index").iterdir():
        document = json.loads(hint.read_text())
        document["tar"]["offsets"] = [[0, 0, 0, 0]]
        hint.write_text(json.dumps(document))
    assert open_source(path).digests == before.digests
    for hint in (Path(os.environ["XDG_CACHE_HOME"]) / "rae" / "index").iterdir():
        hint.write_text("{")
    assert open_source(path).digests == before.digests


def test_without_a_cache_folder_everything_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(open_source(make_tar(tmp_path / "set.tar", *sample("a")))) == 1


# ---- the object -----------------------------------------------------------------------------------------------------


def test_a_source_is_read_by_threads_and_other_processes(tmp_path: Path) -> None:
    source = open_source(f"{written(tmp_path / 'out', 300, samples_per_shard=2)}/train-*.tar")  # more tars than handles
    expected = [f"image {row}".encode() * 50 for row in range(300)]
    rows = np.random.default_rng(0).permutation(300).tolist()
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(source.read, rows)) == [expected[row] for row in rows]
    copy = pickle.loads(pickle.dumps(source))  # noqa: S301 (our own object)
    assert copy.read(7) == expected[7]
    assert list(copy.keys[5:8]) == ["k5", "k6", "k7"]


def test_keys_behave_like_a_list() -> None:
    texts = ["a", "", "ü", "long" * 10]
    keys = Keys.concatenate([Keys.of(texts[:2]), Keys.of([]), Keys.of(texts[2:])])
    assert list(keys) == texts
    assert (keys[-1], keys[1:3], len(keys)) == (texts[-1], texts[1:3], 4)
    with pytest.raises(IndexError):
        keys[4]


def test_reading_shards_imports_no_torch() -> None:
    code = "import sys, rae.store.shards, rae.store.shards_writer; print({'torch', 'sklearn'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


# ---- folders --------------------------------------------------------------------------------------------------------


def test_class_folders(tmp_path: Path) -> None:
    for name in ("dog/2.jpg", "dog/10.JPG", "cat/deep/x.v1.png", "cat/._x.png", "cat/notes.txt", ".git/y.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    source = open_source(tmp_path)
    assert source.classes == ("cat", "dog")
    assert list(source.keys) == ["cat/deep/x%2Ev1", "dog/10", "dog/2"]
    assert source.labels.tolist() == [0, 1, 1]
    assert [source.read(row) for row in range(3)] == [b"cat/deep/x.v1.png", b"dog/10.JPG", b"dog/2.jpg"]
    assert [(shard.name, shard.first, shard.samples) for shard in source.shards] == [("cat", 0, 1), ("dog", 1, 2)]
    assert open_source(tmp_path, classes=["ant", "cat", "dog"]).labels.tolist() == [1, 2, 2]
    with pytest.raises(ConfigError, match="dog is not one of the 1 classes"):
        open_source(tmp_path, classes=["cat"])


def test_a_flat_folder_has_no_labels(tmp_path: Path) -> None:
    for name in ("a.jpg", "a.png", "b.webp"):
        (tmp_path / name).write_bytes(name.encode())
    source = open_source(tmp_path)
    assert (source.labels.tolist(), source.classes, source.num_classes) == ([-1, -1, -1], None, 0)
    assert list(source.keys) == ["a%2Ejpg", "a%2Epng", "b"]
    assert [source.reason(row) for row in range(3)] == [None] * 3
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "c.jpg").write_bytes(b"c")
    with pytest.raises(ConfigError, match=r"images \(a\.jpg\) beside class folders \(sub\)"):
        open_source(tmp_path)


def test_sets_are_not_taken_for_classes(tmp_path: Path) -> None:
    for name in ("train/cat/a.jpg", "val/cat/b.jpg"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ConfigError, match="several sets"):
        open_source(tmp_path)
    assert open_source(tmp_path / "train").classes == ("cat",)


def test_a_folders_digest_covers_names_bytes_and_labels(tmp_path: Path) -> None:
    def digests(**files: bytes) -> list[str]:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        for name, data in files.items():
            (folder / name).mkdir(parents=True)
            (folder / name / "x.jpg").write_bytes(data)
        return open_source(folder).digests

    first = digests(b=b"1", c=b"2")
    assert digests(b=b"1", c=b"2") == first
    assert digests(b=b"1", c=b"3")[0] == first[0]
    assert digests(b=b"1", c=b"3")[1] != first[1]
    assert not set(digests(a=b"0", b=b"1", c=b"2")) & set(first), "another first class changes every label"


def test_a_file_that_changes_while_open_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"before")
    source = open_source(tmp_path)
    source.verify(source.shards[0])
    (tmp_path / "a.jpg").write_bytes(b"after!")
    with pytest.raises(StaleInput, match=r"a\.jpg has changed"):
        source.read(0)
    with pytest.raises(CorruptData, match=r"a\.jpg has changed"):
        source.verify(source.shards[0])
    assert open_source(tmp_path).read(0) == b"after!"
    (tmp_path / "a.jpg").unlink()
    with pytest.raises(MissingInput, match=r"a\.jpg can't be read any more"):
        source.read(0)


def test_links_and_names_of_any_bytes(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    (folder / "cat").mkdir(parents=True)
    (folder / "cat" / "loop").symlink_to(folder)
    name = os.fsdecode(b"\xff.jpg")
    try:
        (folder / "cat" / name).write_bytes(b"x")
    except OSError:
        pytest.skip("this file system takes UTF-8 names alone")
    source = open_source(folder)
    assert list(source.keys) == ["cat/\\xff"]
    assert source.read(0) == b"x"


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("a.tar", True),
        ("t-{00..99}.tar", True),
        ("*.tar", True),
        ("a.tgz", True),
        ("digits", False),
        ("a.parquet", False),
    ],
)
def test_is_shards(spec: str, expected: bool, tmp_path: Path) -> None:
    assert is_shards(spec) is expected
    assert is_shards(tmp_path) is False
    make_tar(tmp_path / "x.tar")
    assert is_shards(tmp_path) is True
