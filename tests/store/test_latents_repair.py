"""Repairs restore what was published to the bit, or change nothing."""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from rae.store import latents_repair
from rae.store.errors import CorruptData
from rae.store.latents_repair import EncodedRow, Repair, published_layout
from rae.store.latents_verify import Problem, verify
from rae.store.layout import LatentLayout, Part
from rae.store.manifest import Manifest
from rae.store.zarr_shard import file_sha256

GivenMaker = Callable[..., object]


def files(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): file_sha256(path) for path in folder.rglob("*") if path.is_file()}


class Published:
    """A published store of known latents, and an encoder that counts what it is asked for."""

    def __init__(self, folder: Path, given, **settings: object) -> None:
        self.folder, self.given = folder, given(**settings)
        summary = self.given.write(folder)
        self.described = {"encoder.json": b'{"name": "some"}', "classes.json": b'["cat", "dog"]'}
        for name, data in self.described.items():
            (folder / name).write_bytes(data)
        entries = [
            {"path": str(path.relative_to(folder)), "bytes": path.stat().st_size, "sha256": file_sha256(path)}
            for path in (*summary.files, *(folder / name for name in self.described))
        ]
        layout = self.given.layout
        config = {"encode": {"dtype": layout.dtype, "rows_per_part": layout.rows_per_part}}
        metrics = {"shape": list(layout.latent_shape), "views": layout.views}
        recipe = {"source": self.given.sources}
        self.manifest = Manifest("latents", "some", recipe, summary.content, {}, config, entries, metrics)
        (folder / "manifest.json").write_bytes(self.manifest.to_json())
        self.before = files(folder)
        self.encoded: list[int] = []  # slots
        self.drift = 0.0  # of a device that computes other bits

    def encode(self, part: Part, rows: Sequence[int]) -> Iterator[EncodedRow]:
        for row in rows:
            slot = part.first_slot + row
            self.encoded.append(slot)
            bad = slot in self.given.invalid
            latent = None if bad else self.given.latents[slot] + np.float16(self.drift)
            yield EncodedRow(latent, "not an image" if bad else None, self.given.entry(slot))

    def problems(self) -> list[Problem]:
        return verify(self.folder, LatentLayout.load(self.folder)[0], "full")

    def repair(self) -> list[str]:
        layout = published_layout(self.folder, self.manifest)
        replaced = Repair(self.folder, layout, self.manifest, self.encode, lambda: self.described).run("full")
        return [str(path.relative_to(self.folder)) for path in replaced]

    def damage(self, name: str, byte: int = 3) -> None:
        path = self.folder / name
        data = bytearray(path.read_bytes())
        data[byte] ^= 0x11
        path.write_bytes(data)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
def test_only_damaged_rows_are_encoded_again(tmp_path: Path, given, dtype: str) -> None:
    store = Published(tmp_path, given, dtype=dtype)
    array = store.given.layout.arrays[-1]
    store.damage(f"{array.name}/c/3/0/0/0/0", byte=2 * 2 * store.given.layout.chunk_bytes(array) + 1)  # third row
    assert [problem.slot for problem in store.problems()] == [14]
    assert store.repair() == [f"{array.name}/c/3/0/0/0/0"]
    assert store.encoded == [14]
    assert files(tmp_path) == store.before


@pytest.mark.parametrize("name", ["encoder.json", "classes.json"])
def test_what_the_encode_put_beside_the_latents_is_made_again_or_left(tmp_path: Path, given, name: str) -> None:
    store = Published(tmp_path, given)
    store.damage(name)
    assert [problem.file.name for problem in store.problems()] == [name]
    assert store.repair() == [name]
    assert files(tmp_path) == store.before
    (tmp_path / name).unlink()
    assert store.repair() == [name]
    assert store.encoded == []
    store.damage(name)
    damaged = files(tmp_path)
    store.described[name] = b"of another encoder"
    with pytest.raises(CorruptData, match=f"{name} is damaged.*not what was published"):
        store.repair()
    assert files(tmp_path) == damaged


@pytest.mark.parametrize("damage", ["index", "truncated", "missing", "foreign"])
def test_a_shard_that_is_none_is_made_again(tmp_path: Path, given, damage: str) -> None:
    store = Published(tmp_path, given)
    path = tmp_path / "latents/c/0/0/0/0/0"
    size = path.stat().st_size
    if damage == "index":
        store.damage("latents/c/0/0/0/0/0", byte=size - 7)
    elif damage == "truncated":
        os.truncate(path, 100)
    elif damage == "missing":
        path.unlink()
    else:
        path.write_bytes(b"\0" * size)
    assert store.repair() == ["latents/c/0/0/0/0/0"]
    assert store.encoded == [0, 1, 3]  # slot 2 is an image that could not be used
    assert files(tmp_path) == store.before


@pytest.mark.parametrize(
    "names",
    [
        ["parts/000000.json"],
        ["parts/000001.npz"],
        ["index.parquet"],
        ["stats.npz"],
        ["parts.parquet"],
        ["zarr.json"],
        ["latents/zarr.json"],
        ["latents/zarr.json", "parts.parquet", "index.parquet", "stats.npz", "parts/000002.npz"],
    ],
    ids="+".join,
)
@pytest.mark.parametrize("how", ["flipped", "missing"])
def test_what_follows_from_the_rest_needs_no_encoder(tmp_path: Path, given, names: list[str], how: str) -> None:
    store = Published(tmp_path, given)
    for name in names:
        if how == "flipped":
            store.damage(name, byte=(tmp_path / name).stat().st_size // 2)
        else:
            (tmp_path / name).unlink()
    assert sorted(store.repair()) == sorted(names)
    assert store.encoded == []
    assert files(tmp_path) == store.before


def test_every_file_of_a_part_and_the_index_are_made_again_at_once(tmp_path: Path, given) -> None:
    store = Published(tmp_path, given)
    for name in ("parts/000000.json", "parts/000000.npz", "latents/c/0/0/0/0/0", "index.parquet"):
        (tmp_path / name).unlink()
    store.repair()
    assert store.encoded == [0, 1, 2, 3]
    assert files(tmp_path) == store.before


def test_other_bits_change_nothing(tmp_path: Path, given) -> None:
    store = Published(tmp_path, given)
    store.damage("latents/c/0/0/0/0/0")
    damaged, store.drift = files(tmp_path), 0.5
    with pytest.raises(CorruptData, match=r"part 0 .* is not what was published; nothing of it was changed"):
        store.repair()
    assert files(tmp_path) == damaged


def test_a_repair_that_dies_has_lost_nothing(tmp_path: Path, given, monkeypatch: pytest.MonkeyPatch) -> None:
    """At every file that it replaces: what was good before is good after, and the next repair ends it."""
    store = Published(tmp_path, given)
    for name in ("latents/c/0/0/0/0/0", "parts/000001.npz", "latents/c/3/0/0/0/0", "stats.npz"):
        store.damage(name)
    good = {name for name, digest in files(tmp_path).items() if digest == store.before[name]}
    replace, calls = os.replace, [0]

    def dying(source: Path, target: Path) -> None:
        calls[0] += 1
        if calls[0] == limit:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(latents_repair.os, "replace", dying)
    for limit in (1, 2, 2, 99):
        calls[0] = 0
        if limit < 99:
            with pytest.raises(KeyboardInterrupt):
                store.repair()
        else:
            store.repair()
        now = files(tmp_path)
        assert {name: now[name] for name in good} == {name: store.before[name] for name in good}
    assert files(tmp_path) == store.before


def test_nothing_is_made_up_when_too_much_is_lost(tmp_path: Path, given) -> None:
    store = Published(tmp_path, given)
    store.damage("parts.parquet")
    store.damage("parts/000002.json")
    with pytest.raises(CorruptData):
        store.repair()
