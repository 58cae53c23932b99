"""The protocol in a folder of this machine."""

from pathlib import Path

import pytest

from contracts.protocol import ObjectsContract, WorkspaceContract


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    # These tests kill nobody, least of all the machine: flushing to the disk would take most of their time.
    monkeypatch.setattr("os.fsync", lambda handle: None)
    return tmp_path / "workspace"


class TestObjects(ObjectsContract):
    pass


class TestWorkspace(WorkspaceContract):
    pass
