"""A workspace that nobody may write to: whoever may read it reads all of it, finds work done, and leaves no trace."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import Rae

READS = """
import contextlib, io, os, sys
from unittest import mock
import rae
from rae.pipeline.cli import main
from torch.utils.data import DataLoader

def command(*words):
    with mock.patch("sys.argv", ["rae", *words, "-w", root]), contextlib.redirect_stdout(io.StringIO()) as out:
        main()
    return out.getvalue()

root, config = sys.argv[1:]
assert not os.access(root, os.W_OK), "whoever runs this may write everywhere"
latents = rae.open_latents("tiny", workspace=root)
assert sum(len(batch["label"]) for batch in DataLoader(rae.torch_dataset(latents), batch_size=16)) == len(latents)
assert "latents" in command("status")
assert "invalid_rows" in command("inspect", "latents/tiny")
assert "already done" in command("encode", config)
assert "already done" in command("train-dit", config)
"""


def user_words() -> list[str]:
    """What runs a command as one who is bound by the modes of files: as root, without the right to pass over them."""
    if os.geteuid() != 0:
        return []
    words = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search"]
    if shutil.which("setpriv") is None or subprocess.run([*words, "true"], check=False).returncode != 0:
        pytest.skip("root is bound by no mode, and there is no setpriv to change that")
    return words


@pytest.fixture
def locked(rae_with: Callable[..., Rae]) -> Iterator[Rae]:
    """A workspace in which no file and no folder can be written."""
    rae = rae_with("shards", "latents", "dit")
    paths = [rae.workspace, *rae.workspace.rglob("*")]
    for path in paths:
        path.chmod(0o555 if path.is_dir() else 0o444)
    yield rae
    for path in paths:
        path.chmod(0o755)


def stamps(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in [folder, *folder.rglob("*")]}


def test_a_workspace_that_cannot_be_written_is_read_and_left_alone(locked: Rae) -> None:
    before = stamps(locked.workspace)
    command = [*user_words(), sys.executable, "-c", READS, str(locked.workspace), str(locked.config)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(locked.folder / "cache")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert stamps(locked.workspace) == before
