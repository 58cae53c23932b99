"""Leases hold while the work goes on, and lapse when nobody renews them."""

import json
import os
import time
from pathlib import Path

import pytest

from rae.store import lease
from rae.store.remote import LocalFolder


def test_a_lease_holds_as_long_as_the_work(tmp_path: Path) -> None:
    with lease.held(LocalFolder(tmp_path), ["dit/a", "latents/b"]), lease.held(LocalFolder(tmp_path), ["dit/c"]):
        assert lease.leased(LocalFolder(tmp_path)) == {"dit/a", "latents/b", "dit/c"}
    assert lease.leased(LocalFolder(tmp_path)) == set()
    assert not list((tmp_path / "leases").iterdir())


def test_a_lease_is_renewed_and_lapses_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "RENEWED_EVERY_S", 0.01)
    long_ago = time.time() - 2 * lease.LAPSES_AFTER_S
    with lease.held(LocalFolder(tmp_path), ["dit/a"]):
        (path,) = (tmp_path / "leases").glob("*.json")
        os.utime(path, (long_ago, long_ago))
        while path.stat().st_mtime == long_ago:
            time.sleep(0.005)
        assert lease.leased(LocalFolder(tmp_path)) == {"dit/a"}
        data = path.read_bytes()
    path.write_bytes(data)  # as a killed process leaves it
    assert lease.leased(LocalFolder(tmp_path)) == {"dit/a"}
    os.utime(path, (long_ago, long_ago))
    assert lease.leased(LocalFolder(tmp_path)) == set()
    assert lease.lapsed(LocalFolder(tmp_path)) == [f"leases/{path.name}"]


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", json.dumps({"holds": 5}).encode()])
def test_what_is_no_lease_holds_nothing(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "leases").mkdir()
    (tmp_path / "leases" / "x.json").write_bytes(data)
    assert lease.leased(LocalFolder(tmp_path)) == set()


def test_where_nobody_works_there_is_nothing_to_read(tmp_path: Path) -> None:
    assert lease.leased(LocalFolder(tmp_path / "none")) == set()
    assert lease.lapsed(LocalFolder(tmp_path / "none")) == []
    assert not (tmp_path / "none").exists()
