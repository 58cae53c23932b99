import errno
import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rae.stages.training.checkpoints import load, newest, save
from rae.store.errors import CorruptData, PartialResult
from rae.store.manifest import canonical


def groups(value: float) -> dict[str, dict[str, torch.Tensor]]:
    return {
        "model": {"weight": torch.full((40, 30), value), "transposed": torch.arange(6.0).reshape(2, 3).T},
        "optimizer": {"weight.step": torch.tensor(value), "mask": torch.tensor([True, False])},
    }


def names(attempt: Path) -> list[str]:
    return sorted(path.name for path in (attempt / "checkpoints").iterdir())


def test_what_is_saved_comes_back(tmp_path):
    state = {"run": {"seconds": 0.1}, "text": "grün"}
    folder = save(tmp_path, 500, groups(3.0), state, keep=2)
    assert folder == tmp_path / "checkpoints" / "step-00000500"
    assert sorted(os.listdir(folder)) == ["checkpoint.json", "model.safetensors", "optimizer.safetensors"]
    found = newest([tmp_path])
    assert (found.step, found.state, found.folder, found.attempt) == (500, state, folder, tmp_path)
    for group, tensors in groups(3.0).items():
        assert found.tensors[group].keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert torch.equal(found.tensors[group][name], tensor)
            assert found.tensors[group][name].dtype == tensor.dtype


def test_the_last_k_are_kept(tmp_path):
    for step in (1, 3, 20, 100_000_000):
        save(tmp_path, step, groups(step), {}, keep=2)
    assert names(tmp_path) == ["step-00000020", "step-100000000"]
    assert newest([tmp_path]).step == 100_000_000


def test_an_unreadable_later_checkpoint_does_not_push_out_the_new_one(tmp_path):
    save(tmp_path, 10, groups(1.0), {}, keep=1)
    flip_a_bit(save(tmp_path, 20, groups(2.0), {}, keep=2))
    save(tmp_path, 15, groups(1.5), {}, keep=1)
    assert names(tmp_path) == ["step-00000015"]


def test_the_newest_of_all_attempts_is_taken(tmp_path):
    save(tmp_path / "a", 30, groups(1.0), {}, keep=2)
    save(tmp_path / "b", 20, groups(2.0), {}, keep=2)
    assert newest([tmp_path / "b", tmp_path / "a", tmp_path / "never-began"]).attempt == tmp_path / "a"
    assert newest([]) is None
    assert newest([tmp_path / "never-began"]) is None


def flip_a_bit(folder: Path) -> None:
    path = folder / "optimizer.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def change_the_state(folder: Path) -> None:
    path = folder / "checkpoint.json"
    path.write_text(path.read_text().replace('"seconds": 1', '"seconds": 2'))


def point_outside(folder: Path) -> None:
    """A forged description with a right digest."""
    path = folder / "checkpoint.json"
    shutil.copy(folder / "model.safetensors", folder.parent / "model.safetensors")
    description = json.loads(path.read_text())
    description.pop("sha256")
    description["files"]["../model.safetensors"] = description["files"].pop("model.safetensors")
    digest = hashlib.sha256(canonical(description)).hexdigest()
    path.write_text(json.dumps({**description, "sha256": digest}))


DAMAGE = {
    "bit": (flip_a_bit, "optimizer.safetensors is not what was saved"),
    "state": (change_the_state, "checkpoint.json is not what was saved"),
    "outside": (point_outside, "'../model.safetensors', which is no file of a checkpoint"),
    "file gone": (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors cannot be read"),
    "description gone": (lambda folder: (folder / "checkpoint.json").unlink(), "checkpoint.json cannot be read"),
    "not JSON": (lambda folder: (folder / "checkpoint.json").write_text("{"), "checkpoint.json cannot be read"),
    "a list": (lambda folder: (folder / "checkpoint.json").write_text("[1]"), "checkpoint.json cannot be read"),
    "moved": (lambda folder: folder.rename(folder.with_name("step-00000099")), "checkpoint.json is not what was saved"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_skipped_with_a_warning(tmp_path, caplog, kind):
    damage, reason = DAMAGE[kind]
    save(tmp_path, 10, groups(1.0), {}, keep=2)
    damage(save(tmp_path, 20, groups(2.0), {"seconds": 1}, keep=2))
    with caplog.at_level(logging.WARNING, "rae.train"):
        assert newest([tmp_path]).step == 10
    assert reason in caplog.text


def test_a_damaged_checkpoint_can_be_saved_again_a_valid_one_is_never_replaced(tmp_path):
    folder = save(tmp_path, 20, groups(2.0), {}, keep=2)
    before = (folder / "model.safetensors").stat().st_ino
    save(tmp_path, 20, groups(2.0), {}, keep=2)
    assert (folder / "model.safetensors").stat().st_ino == before
    flip_a_bit(folder)
    with pytest.raises(CorruptData):
        load(folder)
    save(tmp_path, 20, groups(2.0), {}, keep=2)
    assert load(folder).step == 20
    assert names(tmp_path) == ["step-00000020"]


def test_what_a_killed_writer_left_is_neither_believed_nor_kept(tmp_path):
    folder = save(tmp_path, 10, groups(1.0), {}, keep=2)
    shutil.copytree(folder, folder.with_name(".step-00000020.0123456789ab.partial"))
    assert newest([tmp_path]).step == 10
    save(tmp_path, 30, groups(3.0), {}, keep=2)
    assert names(tmp_path) == ["step-00000010", "step-00000030"]


def test_files_are_readable_by_whom_the_umask_lets(tmp_path):
    umask = os.umask(0o027)
    try:
        folder = save(tmp_path, 10, groups(1.0), {}, keep=2)
    finally:
        os.umask(umask)
    assert {path.name: oct(path.stat().st_mode & 0o777) for path in folder.iterdir()} == dict.fromkeys(
        os.listdir(folder), "0o640"
    )


def test_a_disk_that_is_full_when_flushed_leaves_the_previous_checkpoint(tmp_path, monkeypatch):
    save(tmp_path, 10, groups(1.0), {}, keep=1)

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(PartialResult, match=r"disk is full: the checkpoint of step 20 .* earlier ones are intact"):
        save(tmp_path, 20, groups(2.0), {}, keep=1)
    assert names(tmp_path) == ["step-00000010"]
    assert torch.equal(newest([tmp_path]).tensors["model"]["weight"], groups(1.0)["model"]["weight"])


SMALL_DISK = """
import sys, torch
from pathlib import Path
from rae.stages.training.checkpoints import newest, save
from rae.store.errors import PartialResult
attempt = Path(sys.argv[1])
save(attempt, 10, {"model": {"weight": torch.ones(1000)}}, {}, keep=1)
try:
    save(attempt, 20, {"model": {"weight": torch.ones(1000)}, "ema": {"weight": torch.ones(10**6)}}, {}, keep=1)
except PartialResult as error:
    print(error.message)
print(newest([attempt]).step, [path.name for path in (attempt / "checkpoints").iterdir()])
"""


def test_a_disk_that_is_really_full_leaves_the_previous_checkpoint(tmp_path):
    mount = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    tmpfs = f"mount -t tmpfs -o size=1m none '{tmp_path}' && "
    if sys.platform != "linux" or subprocess.run([*mount, tmpfs + "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs Linux user namespaces to mount a small disk")
    command = [*mount, tmpfs + f"'{sys.executable}' -c '{SMALL_DISK}' '{tmp_path}'"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    message, left = done.stdout.splitlines()
    assert message.startswith("the disk is full: the checkpoint of step 20 could not be written below ")
    assert left == "10 ['step-00000010']"
