"""A data set that grows: what was encoded before is taken over, and the encoder sees nothing but what is new."""

import errno
import os
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import pytest
import torch

from rae.stages.models.encoders import Encoder
from tests.conftest import Rae
from tests.stages.test_encode import DINOV2, png, write_shards

ENCODE = {
    "encoder": str(DINOV2),
    "image_size": 64,
    "encoder_input_size": 56,
    "horizontal_flip": False,
    "batch_size": 2,
    "rows_per_part": 4,
}


class Growing:
    """Tars of six images each (parts of four and two) in a folder, and the pipeline that encodes what is there."""

    def __init__(self, folder: Path) -> None:
        self.tars = folder / "tars"
        self.tars.mkdir()
        self._made = folder / "made"
        write_shards(self._made, [png(seed) for seed in range(18)])
        self.rae = self.pipeline(folder / "rae")
        self.fresh = lambda: self.pipeline(folder / "fresh")

    def pipeline(self, folder: Path) -> Rae:
        return Rae(folder, {"shards": {"train": f"{self.tars}/*.tar"}, "encode": ENCODE})

    def put(self, number: int, name: str) -> None:
        (self.tars / f"{name}.tar").write_bytes(sorted(self._made.glob("*.tar"))[number].read_bytes())

    def parts(self, rae: Rae) -> dict[str, Path]:
        """The files of the newest latents' parts, by their names."""
        folder = Path(rae.artifact("latents/tiny")["path"])
        return {str(path.relative_to(folder)): path for path in folder.glob("latents/c/*/0/0/0/0")}


@pytest.fixture
def growing(tmp_path: Path) -> Growing:
    growing = Growing(tmp_path)
    for number, name in enumerate("ab"):
        growing.put(number, name)
    growing.rae.verb("encode").succeeded()
    return growing


@contextmanager
def images_encoded() -> Iterator[Callable[[], int]]:
    """How many batches of two images went through an encoder within the block, times two."""
    seen = []

    def count(module: torch.nn.Module, args: object, output: object) -> None:
        if isinstance(module, Encoder):
            seen.append(1)

    handle = torch.nn.modules.module.register_module_forward_hook(count)
    try:
        yield lambda: 2 * len(seen)
    finally:
        handle.remove()


def test_appended_shards_are_the_only_thing_encoded(growing: Growing) -> None:
    before, old = growing.parts(growing.rae), growing.rae.artifact("latents/tiny")
    growing.put(2, "c")
    with images_encoded() as count:
        growing.rae.verb("encode").succeeded()
    assert count() == 6
    after, new = growing.parts(growing.rae), growing.rae.artifact("latents/tiny")
    assert len(after) == 6
    assert all(after[name].samefile(path) for name, path in before.items())
    assert new["provenance"]["parts_taken_over"] == {f"latents/{old['id']}": 4}
    fresh = growing.fresh()
    fresh.verb("encode").succeeded()
    assert growing.rae.content("latents") == fresh.content("latents")
    assert growing.rae.payload("latents") == fresh.payload("latents")


def test_shards_that_moved_are_not_encoded_again(growing: Growing) -> None:
    (growing.tars / "b.tar").rename(growing.tars / "0.tar")  # b, c, a
    (growing.tars / "a.tar").rename(growing.tars / "d.tar")
    growing.put(2, "c")
    with images_encoded() as count:
        growing.rae.verb("encode").succeeded()
    assert count() == 6
    fresh = growing.fresh()
    fresh.verb("encode").succeeded()
    assert growing.rae.payload("latents") == fresh.payload("latents")


def test_a_share_takes_over_its_own_parts(growing: Growing) -> None:
    growing.put(2, "c")
    with images_encoded() as count:
        for share in (1, 0):
            growing.rae.verb("encode", "--parts", f"{share}/2").succeeded()
    assert count() == 6
    assert sum(growing.rae.artifact("latents/tiny")["provenance"]["parts_taken_over"].values()) == 4


def test_other_settings_take_nothing_over(growing: Growing) -> None:
    with images_encoded() as count:
        growing.rae.verb("encode", "-s", "encode.dtype=float32").succeeded()
    assert count() == 12
    assert "parts_taken_over" not in growing.rae.artifact("latents/tiny")["provenance"]


def test_a_part_of_which_one_file_is_lost_brings_none_of_its_files_over(growing: Growing) -> None:
    """The codes that lay there alone would be adopted by the encode that follows, damage and all."""
    int8 = ("-s", "encode.dtype=int8")
    growing.rae.verb("encode", *int8).succeeded()
    old = Path(growing.rae.artifact("latents/tiny")["path"])
    codes = old / "latents/c/0/0/0/0/0"
    damaged = bytearray(codes.read_bytes())
    damaged[5] ^= 4
    codes.write_bytes(damaged)
    (old / "scales/c/0/0/0/0/0").unlink()
    growing.put(2, "c")
    growing.rae.verb("encode", *int8).succeeded()
    fresh = growing.fresh()
    fresh.verb("encode", *int8).succeeded()
    assert growing.rae.payload("latents") == fresh.payload("latents")


def test_rows_that_now_lack_a_label_are_not_taken_over(growing: Growing) -> None:
    """In a set without labels none is missing; beside a labelled shard, these rows lack theirs."""
    without_labels(growing.tars / "a.tar")
    without_labels(growing.tars / "b.tar")
    growing.rae.verb("encode").succeeded()
    assert growing.rae.artifact("latents/tiny")["metrics"]["rows"] == 12
    growing.put(2, "c")
    growing.rae.verb("encode").succeeded()
    metrics = growing.rae.artifact("latents/tiny")["metrics"]
    assert (metrics["rows"], metrics["invalid_reasons"]) == (6, {"missing label": 12})


def without_labels(path: Path) -> None:
    with tarfile.open(path) as archive:
        images = [(member, archive.extractfile(member)) for member in archive if not member.name.endswith(".cls")]
        contents = [(member, file.read()) for member, file in images if file is not None]
    with tarfile.open(path, "w") as archive:
        for member, data in contents:
            archive.addfile(member, BytesIO(data))


@pytest.mark.parametrize("damage", ["shard", "bit", "statistics", "record"])
def test_a_damaged_part_is_encoded_again(damage: str, growing: Growing) -> None:
    folder = Path(growing.rae.artifact("latents/tiny")["path"])
    places = {"statistics": "parts/000001.npz", "record": "parts/000001.json"}
    place = places.get(damage, "latents/c/1/0/0/0/0")
    if damage == "statistics":
        (folder / place).unlink()
    elif damage == "bit":
        data = bytearray((folder / place).read_bytes())
        data[7] ^= 1
        (folder / place).write_bytes(data)
    else:
        os.truncate(folder / place, 100)
    growing.put(2, "c")
    with images_encoded() as count:
        growing.rae.verb("encode").succeeded()
    assert count() == 6 + 2
    fresh = growing.fresh()
    fresh.verb("encode").succeeded()
    assert growing.rae.payload("latents") == fresh.payload("latents")


def test_where_files_cannot_be_linked_they_are_copied(growing: Growing, monkeypatch: pytest.MonkeyPatch) -> None:
    link = os.link
    old = growing.rae.artifact("latents/tiny")["id"]

    def within_a_store(source: Path, target: Path) -> None:
        if old in Path(source).parts:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        link(source, target)

    before = growing.parts(growing.rae)
    growing.put(2, "c")
    monkeypatch.setattr(os, "link", within_a_store)
    with images_encoded() as count:
        growing.rae.verb("encode").succeeded()
    assert count() == 6
    after = growing.parts(growing.rae)
    assert not any(after[name].samefile(path) for name, path in before.items())
    assert {name: after[name].read_bytes() for name in before} == {name: p.read_bytes() for name, p in before.items()}
