"""Create-if-absent: with two writers at once, on file systems without links, and when the disk refuses."""

import ctypes
import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rae.store import publish
from rae.store.errors import RaeError
from rae.store.publish import make_folder, publish_bytes, replace_bytes

RACER = """
import os, sys
from pathlib import Path
from rae.store.publish import publish_bytes
os.fsync = lambda handle: None  # the race is between names, not between disks
folder, name, other = Path(sys.argv[1]), *sys.argv[2:]
won = []
for round in range(100):
    (folder / f"ready-{name}-{round}").touch()
    while not (folder / f"ready-{other}-{round}").exists():
        pass
    if publish_bytes(folder / str(round), name.encode()):
        won.append(round)
print(*won)
"""


def refuse(code: int):
    def call(*names: object, **options: object) -> None:
        raise OSError(code, os.strerror(code))

    return call


def test_the_first_content_stays(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    assert publish_bytes(path, b"first")
    assert not publish_bytes(path, b"second")
    assert path.read_bytes() == b"first"
    assert os.listdir(tmp_path) == ["manifest.json"]


def test_of_two_processes_exactly_one_publishes_each_name(tmp_path: Path) -> None:
    command = [sys.executable, "-c", RACER, str(tmp_path)]
    racers = [subprocess.Popen([*command, *names], stdout=subprocess.PIPE, text=True) for names in ("ab", "ba")]
    won = {name: set(racer.communicate(timeout=60)[0].split()) for name, racer in zip("ab", racers, strict=True)}
    assert [racer.returncode for racer in racers] == [0, 0]
    assert won["a"].isdisjoint(won["b"])
    assert len(won["a"] | won["b"]) == 100
    assert all((tmp_path / number).read_text() == name for name, numbers in won.items() for number in numbers)
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOTSUP, errno.EMLINK])
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "renameat2"), reason="this C library has no renameat2")
def test_without_hard_links_names_are_still_taken_once(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "link", refuse(code))
    path = tmp_path / "manifest.json"
    assert publish_bytes(path, b"first")
    assert not publish_bytes(path, b"second")
    assert path.read_bytes() == b"first"
    assert os.listdir(tmp_path) == ["manifest.json"]


def test_without_links_and_renameat2_nothing_is_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", refuse(errno.EPERM))
    monkeypatch.setattr(publish, "_RENAME_NOREPLACE", 1 << 30)  # a flag that no kernel knows: EINVAL, as old ones say
    with pytest.raises(RaeError, match="offers neither hard links nor renameat2"):
        publish_bytes(tmp_path / "manifest.json", b"first")
    assert os.listdir(tmp_path) == []


def test_a_link_that_a_network_repeats_counts_as_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = os.link

    def retried(source: Path, target: Path) -> None:
        link(source, target)
        link(source, target)  # the answer to the first was lost

    monkeypatch.setattr(os, "link", retried)
    assert publish_bytes(tmp_path / "manifest.json", b"ours")
    monkeypatch.undo()
    assert not publish_bytes(tmp_path / "manifest.json", b"theirs")


@pytest.mark.parametrize("write", [publish_bytes, replace_bytes])
def test_a_full_disk_leaves_neither_the_name_nor_a_rest(write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", refuse(errno.ENOSPC))
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "manifest.json", b"x")
    assert os.listdir(tmp_path) == []


def test_a_reader_sees_old_bytes_or_new_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "name.json"
    replace_bytes(path, b"old")
    with open(path, "rb") as reader:
        replace_bytes(path, b"new")
        assert (reader.read(), path.read_bytes()) == (b"old", b"new")
    monkeypatch.setattr(os, "replace", refuse(errno.EIO))
    with pytest.raises(OSError, match="error"):
        replace_bytes(path, b"newest")
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["name.json"]


def test_bytes_are_flushed_before_their_name_and_the_name_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, seen, fsync = tmp_path / "manifest.json", [], os.fsync

    def watched(handle: int) -> None:
        seen.append((os.path.isdir(f"/proc/self/fd/{handle}") if os.path.isdir("/proc") else None, path.exists()))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", watched)
    publish_bytes(path, b"x")
    assert [named for _, named in seen] == [False, True]
    assert [folder for folder, _ in seen] in ([False, True], [None, None])


def test_folders_are_made_durably_and_files_in_their_way_refused(tmp_path: Path) -> None:
    make_folder(tmp_path / "a" / "b")
    make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"exists|directory"):
        make_folder(tmp_path / "file" / "c")
