"""Source tars in a bucket and on a web server: the same images as from the disk, each byte asked for once."""

import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from rae.store.errors import ConfigError, CorruptData, MissingInput
from rae.store.remote import open_objects
from rae.store.shards import Source, open_source
from rae.store.shards_writer import ShardWriter
from tests.store.test_shards import make_tar, sample


@pytest.fixture(params=["s3", "web"])
def url(request: pytest.FixtureRequest, s3, web) -> str:
    return s3.place() if request.param == "s3" else web.url


@pytest.fixture
def put(web, url: str):
    """Puts files where `url` is."""

    def put(*paths: Path) -> None:
        for path in paths:
            if url == web.url:
                (web.folder / path.name).write_bytes(path.read_bytes())
            else:
                open_objects(url).replace(path.name, path.read_bytes())

    return put


def foreign(folder: Path) -> list[Path]:
    """Two tars of another tool, with classes beside them."""
    folder.mkdir(exist_ok=True)
    (folder / "classes.json").write_text('["cat", "dog"]')
    tars = [
        make_tar(folder / f"train-{number}.tar", *(m for k in "abc" for m in sample(f"{k}{number}", number)))
        for number in range(2)
    ]
    return [*tars, folder / "classes.json"]


def images(source: Source) -> list[bytes]:
    return [source.read(row) for row in range(len(source))]


def test_images_and_labels_are_those_from_the_disk(tmp_path: Path, url: str, put) -> None:
    put(*foreign(tmp_path / "local"))
    there, here = open_source(f"{url}/train-{{0..1}}.tar"), open_source(tmp_path / "local/train-{0..1}.tar")
    assert (there.digests, list(there.keys), there.classes) == (here.digests, list(here.keys), here.classes)
    np.testing.assert_array_equal(there.labels, here.labels)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(there.read, range(len(there)))) == images(here)
    assert images(pickle.loads(pickle.dumps(there))) == images(here)  # noqa: S301 (our own object)
    for shard in there.shards:
        there.verify(shard)


def test_an_index_beside_the_tars_is_taken_and_nothing_is_scanned(tmp_path: Path, web) -> None:
    with ShardWriter(web.folder, "train", 10, ("cat", "dog")) as writer:
        for number in range(20):
            writer.add(f"{number:02d}", bytes([number]) * 100_000, "jpg", number % 2)
    size = sum(path.stat().st_size for path in web.folder.glob("*.tar"))
    source = open_source(f"{web.url}/train-{{0000..0001}}.tar")
    assert web.sent_bytes < 10_000
    assert (source.classes, len(source)) == (("cat", "dog"), 20)
    assert source.read(13) == bytes([13]) * 100_000
    assert web.sent_bytes < size


def test_each_byte_is_asked_for_once_by_all_who_read_it(tmp_path: Path, web) -> None:
    tar = make_tar(web.folder / "train-0.tar", *(m for n in range(40) for m in sample(f"{n:02d}" * 200, n)))
    spec = f"{web.url}/train-0.tar"
    source = open_source(spec)
    source.verify(source.shards[0])
    images(source)
    images(open_source(spec))
    assert tar.stat().st_size <= web.sent_bytes < tar.stat().st_size + 10_000


def test_a_cache_without_room_costs_requests_and_nothing_else(tmp_path: Path, url: str, put, monkeypatch) -> None:
    monkeypatch.setenv("RAE_CACHE_GB", "0")
    put(*foreign(tmp_path / "local"))
    there, here = open_source(f"{url}/train-0.tar"), open_source(tmp_path / "local/train-0.tar")
    assert images(there) == images(here)
    there.verify(there.shards[0])


def test_a_tar_that_changed_is_scanned_anew(tmp_path: Path, url: str, put) -> None:
    put(*foreign(tmp_path / "local"))
    before = open_source(f"{url}/train-0.tar")
    put(make_tar(tmp_path / "train-0.tar", *sample("other", 1)))
    after = open_source(f"{url}/train-0.tar")
    assert (list(before.keys), list(after.keys)) == (["a0", "b0", "c0"], ["other"])
    assert after.read(0) == sample("other", 1)[0][1]


def test_a_tar_that_is_not_what_its_index_says_is_damaged(tmp_path: Path, web) -> None:
    with ShardWriter(web.folder, "train", 10, None) as writer:
        writer.add("a", b"pixels" * 100, "jpg", 0)
    tar = web.folder / "train-0000.tar"
    tar.write_bytes(tar.read_bytes().replace(b"pixels", b"PIXELS"))
    source = open_source(f"{web.url}/train-0000.tar")
    with pytest.raises(CorruptData, match=r"http://.*train-0000\.tar has sha256"):
        source.verify(source.shards[0])
    tar.write_bytes(tar.read_bytes().replace(b"a.jpg", b"b.jpg"))
    with pytest.raises(CorruptData, match=r"http://.*does not hold `a`"):
        open_source(f"{web.url}/train-0000.tar").read(0)


def test_a_pattern_names_tars_of_a_bucket(tmp_path: Path, s3) -> None:
    place = s3.place()
    for path in foreign(tmp_path / "local"):
        open_objects(place).replace(path.name, path.read_bytes())
    open_objects(place).replace("val/train-7.tar", b"")
    assert [shard.name for shard in open_source(f"{place}/train-*.tar").shards] == ["train-0.tar", "train-1.tar"]
    with pytest.raises(MissingInput, match=r"test-\*\.tar names no file"):
        open_source(f"{place}/test-*.tar")


def test_what_is_missing_or_cannot_be_meant_is_said(tmp_path: Path, url: str, put, web) -> None:
    with pytest.raises(MissingInput, match=r"train-1\.tar does not exist"):
        open_source(f"{url}/train-1.tar")
    with pytest.raises(ConfigError, match="something else than tars"):
        open_source(f"{url}/images")
    put(make_tar(tmp_path / "noise.tar"))
    (tmp_path / "noise.tar").write_bytes(b"?" * 4096)
    put(tmp_path / "noise.tar")
    with pytest.raises(CorruptData, match=r"/noise\.tar is not a tar file"):
        open_source(f"{url}/noise.tar")
    with pytest.raises(ConfigError, match="a web server lists no files"):
        open_source(f"{web.url}/train-*.tar")


def test_credentials_in_a_url_are_refused_and_not_repeated(web) -> None:
    with pytest.raises(ConfigError, match="carries credentials") as refused:
        open_source(web.url.replace("://", "://me:hunter2@") + "/train-0.tar")
    assert "hunter2" not in refused.value.message


def test_a_web_server_without_ranges_is_refused(tmp_path: Path, web) -> None:
    make_tar(web.folder / "train-0.tar", *sample("a"))
    web.ranges = False
    with pytest.raises(MissingInput, match="answers no requests for ranges"):
        open_source(f"{web.url}/train-0.tar")
