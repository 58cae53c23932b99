"""Latents that lie in a bucket: the same rows and batches as from the disk, by range, through a cache that is bounded
and shared."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rae.store.artifacts import Work, Workspace
from rae.store.errors import ConfigError, CorruptData, MissingInput, Overtaken
from rae.store.latents import LatentStore
from rae.store.latents_finish import LatentsSummary, finish
from rae.store.manifest import Manifest
from rae.store.remote import open_objects
from rae.store.transfer import copy_payload
from rae.store.zarr_shard import file_sha256
from tests.store.conftest import Given

SAMPLES = (20, 12)


def described(work: Work, summary: LatentsSummary) -> Manifest:
    files = [
        {"path": str(path.relative_to(work.folder)), "bytes": path.stat().st_size, "sha256": file_sha256(path)}
        for path in summary.files
    ]
    metrics = {"bytes": summary.bytes, "seconds": 1.0}
    return Manifest("latents", "given", work.recipe, summary.content, {}, {}, files, metrics)


def store_in(place: str, given: Given, folder: Path) -> str:
    """Latents as an artifact at `place`; returns their REF."""
    workspace = Workspace(folder)
    recipe = {"kind": "latents", "config": {"encode": {}}, "inputs": {}}
    work = workspace.begin("latents", "given", recipe, {})
    made = workspace.publish(work, described(work, given.write(work.folder)))
    target = Workspace(place)
    copy_payload(workspace.objects, target.objects, made)
    target.adopt(made)
    target.name(made, "given")
    return "latents/given"


@pytest.fixture(params=["float16", "int8"])
def stored(request, given, s3, tmp_path: Path) -> tuple[str, Path]:
    place = s3.place()
    ref = store_in(place, given(SAMPLES, dtype=request.param, invalid=(2, 9)), tmp_path / "local")
    local = Workspace(tmp_path / "local").resolve(ref).folder
    return place, local


def remote(place: str) -> LatentStore:
    return LatentStore(Workspace(place).resolve("latents/given").payload)


def batches(store: LatentStore, epoch: int = 0, **options) -> list[dict]:
    return list(store.batches(4, seed=1, epoch=epoch, **options))


def assert_same(one: list[dict], other: list[dict]) -> None:
    assert len(one) == len(other) > 0
    for a, b in zip(one, other, strict=True):
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


@pytest.mark.parametrize("options", [{}, {"shuffle": "windowed", "window_parts": 2}, {"rank": 1, "world_size": 2}])
def test_batches_are_those_from_the_disk(stored, options) -> None:
    place, local = stored
    assert_same(batches(remote(place), **options), batches(LatentStore(local), **options))


def test_everything_else_of_the_store_is_there(stored) -> None:
    place, local = stored
    one, other = remote(place), LatentStore(local)
    assert (len(one), one.shape, one.keys, one.invalid_rows()) == (
        len(other),
        other.shape,
        other.keys,
        other.invalid_rows(),
    )
    np.testing.assert_array_equal(one.labels, other.labels)
    np.testing.assert_array_equal(one[-1]["latent"], other[-1]["latent"])


def test_the_second_epoch_asks_the_bucket_for_nothing(stored, s3) -> None:
    place, _ = stored
    store = remote(place)
    for row in range(len(store)):
        store.rows([row] * store.views, range(store.views))
    s3.requests.clear()
    first = batches(store, 0)
    assert_same(batches(remote_from_cache(store), 0), first)
    assert s3.requests == []


def remote_from_cache(store: LatentStore) -> LatentStore:
    return LatentStore(store.folder)


def test_neighbours_are_read_in_one_request(stored, s3) -> None:
    place, _ = stored
    store = remote(place)
    store.rows([0], 0)
    s3.requests.clear()
    store.rows([1, 2, 1], [0, 0, 1])
    assert len(s3.requests) == len(store.layout.arrays)


@pytest.mark.parametrize("gigabytes", ["0", "2e-5"])
def test_a_small_cache_stays_small_and_changes_no_batch(stored, s3, monkeypatch, gigabytes: str) -> None:
    monkeypatch.setenv("RAE_CACHE_GB", gigabytes)
    place, local = stored
    store = remote(place)
    for epoch in range(2):
        assert_same(batches(store, epoch), batches(LatentStore(local), epoch))
    files = [path for path in (s3.cache / "ranges").rglob("*") if path.is_file()]
    used = sum(path.stat().st_blocks * 512 for path in files)
    assert used <= float(gigabytes) * 1e9 + 4096 * len(files)


def test_another_process_reads_what_this_one_brought(stored, s3) -> None:
    place, local = stored
    store = remote(place)
    batches(store)
    s3.requests.clear()
    script = (
        "import sys; from rae.store.latents import LatentStore; store = LatentStore(sys.argv[1]);"
        "print(sum(float(b['latent'].sum()) for b in store.batches(4, seed=1, epoch=0)))"
    )
    ran = subprocess.run([sys.executable, "-c", script, store.folder], capture_output=True, text=True, check=True)
    expected = sum(float(batch["latent"].sum()) for batch in batches(LatentStore(local)))
    assert float(ran.stdout) == expected
    assert s3.requests == []


def test_what_a_killed_process_left_is_no_lie(stored, s3) -> None:
    place, local = stored
    store = remote(place)
    script = (
        "import sys; from rae.store.latents import LatentStore; store = LatentStore(sys.argv[1])\n"
        "for epoch in range(1000):\n  for b in store.batches(4, seed=1, epoch=epoch): print(1, flush=True)"
    )
    process = subprocess.Popen([sys.executable, "-c", script, store.folder], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.read(4)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert_same(batches(store), batches(LatentStore(local)))


def test_what_another_boot_left_is_not_believed(stored, s3, monkeypatch) -> None:
    place, local = stored
    batches(remote(place))
    for path in (s3.cache / "ranges").rglob("*"):
        if path.is_file():
            path.write_bytes(b"\1" * path.stat().st_size)  # as a disk may look after the power was lost
    monkeypatch.setattr("rae.store.remote_shard.range_folder", lambda: s3.cache / "ranges" / "next-boot")
    assert_same(batches(remote(place)), batches(LatentStore(local)))


def test_a_missing_object_and_a_damaged_index_are_named(stored) -> None:
    place, _ = stored
    artifact = Workspace(place).resolve("latents/given")
    objects, key = open_objects(place), f"{artifact.key}/latents/c/0/0/0/0/0"
    whole = objects.read(key)
    assert whole is not None
    objects.remove(key)
    with pytest.raises(MissingInput, match=f"{key} is missing"):
        remote(place).rows([0], 0)
    objects.create(key, whole[:-9] + b"?" + whole[-8:])
    with pytest.raises(CorruptData, match="checksum of its index"):
        remote(place).rows([0], 0)


def test_a_folder_that_is_no_mirror_sends_nobody_elsewhere(stored) -> None:
    _, local = stored
    (local / "lies_at.json").write_text('{"place": "s3://elsewhere/x", "key": "y"}')
    assert len(batches(LatentStore(local))) > 0


def test_a_forked_process_is_told_how_to_read(stored) -> None:
    place, _ = stored
    store = remote(place)
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        try:
            store.rows([0], 0)
        except ConfigError as error:
            os.write(write, error.message.encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert b"multiprocessing_context='spawn'" in os.read(read, 1000)


@pytest.mark.parametrize("first", ["one", "other"])
def test_two_machines_that_make_the_same_latents_otherwise_agree(given, s3, tmp_path, monkeypatch, first) -> None:
    place = s3.place()
    recipe = {"kind": "latents", "config": {"encode": {}}, "inputs": {}}
    makers = {"one": given(SAMPLES, seed=0, invalid=()), "other": given(SAMPLES, seed=1, invalid=())}
    works = {}

    def on(machine: str) -> Workspace:
        monkeypatch.setenv("RAE_CACHE", str(tmp_path / machine))
        return Workspace(place)

    def encode(machine: str, *parts: int) -> None:
        workspace = on(machine)
        with workspace.sending(works[machine]):
            for part in parts:
                makers[machine].write_part(works[machine].folder, part)

    def publish(machine: str) -> None:
        workspace, maker = on(machine), makers[machine]
        for _ in range(2):
            summary = finish(works[machine].folder, maker.layout, maker.parts, maker.sources)
            try:
                workspace.publish(works[machine], described(works[machine], summary))
                return
            except Overtaken:
                continue
        pytest.fail("what the others made was not taken")

    for machine in makers:
        works[machine] = on(machine).begin("latents", "given", recipe, {})
    last = range(1, len(makers["one"].parts))
    encode("one", 0)
    encode("other", 0, *last)
    encode("one", *last)
    for machine in (first, *(makers.keys() - {first})):
        publish(machine)
    on("third")
    third = remote(place)
    for machine in makers:
        on(machine)
        assert_same(batches(remote(place)), batches(third))
    raw = LatentStore(Workspace(place).resolve("latents/given").payload, raw=True)
    for machine, rows in (("one", np.arange(0, 4)), ("other", np.arange(4, 32))):
        found = raw.rows(rows, np.zeros_like(rows))
        np.testing.assert_array_equal(found, makers[machine].latents[rows, 0])
    assert not list(Workspace(place).unfinished())
