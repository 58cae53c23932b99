"""Artifacts and shards that somebody made to do harm: each ends in one sentence and an exit code, or is harmless.

Huge pictures: tests/stages/test_images.py. Paths in manifests: tests/store/test_manifest.py. Names in the report:
tests/pipeline/test_report.py, in a card: test_inspect.py. Code in others' checkpoints: tests/stages/models.
"""

import io
import json
import pickle
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch

import rae as api
from rae.store.errors import CorruptData
from rae.store.shards import open_source
from tests.conftest import Rae

V1 = Path(__file__).parents[1] / "golden" / "v1"


@pytest.fixture
def rae(tmp_path: Path) -> Rae:
    """A workspace of its own with one artifact of each kind."""
    rae = Rae(tmp_path / "rae")
    shutil.copytree(V1, rae.workspace)
    return rae


def folder(rae: Rae, kind: str) -> Path:
    (found,) = (rae.workspace / "objects" / kind).iterdir()
    return found


def payload(rae: Rae, kind: str, name: str) -> Path:
    (found,) = folder(rae, kind).glob(f"attempts/*/{name}")
    return found


def test_a_link_that_leads_out_of_an_artifact_is_neither_read_nor_called_whole(rae: Rae, tmp_path: Path) -> None:
    weights = payload(rae, "dit", "ema.safetensors")
    weights.rename(tmp_path / "outside.safetensors")  # the right bytes, in the wrong place
    weights.symlink_to(tmp_path / "outside.safetensors")
    ran = rae("verify", "dit/golden", "-w", rae.workspace)
    ran.refused(5, "problem(s) in dit/")
    assert "is a link that leads out of the artifact" in ran.out
    with pytest.raises(CorruptData, match="is a link that leads out of the artifact"):
        api.load_dit("golden", workspace=str(rae.workspace))


def test_a_link_in_place_of_latents_is_found(rae: Rae, tmp_path: Path) -> None:
    shard = folder(rae, "latents") / "latents/c/1/0/0/0/0"
    shard.rename(tmp_path / "outside")
    shard.symlink_to(tmp_path / "outside")
    ran = rae("verify", "latents/golden", "-w", rae.workspace, "--quick")
    ran.refused(5)
    assert "is a link that leads out of the store" in ran.out


@pytest.mark.parametrize(
    "shape", [[10**15, 2, 3, 2, 2], [12, 2, 10**9, 2, 2], [12, 2, 3, 10**6, 10**6], [-12, 2, 3, 2, 2]]
)
def test_latents_that_claim_a_huge_shape_are_refused_before_memory_is_taken(shape: list[int], rae: Rae) -> None:
    path = folder(rae, "latents") / "latents" / "zarr.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"shape": shape}))
    with pytest.raises(CorruptData):
        api.open_latents("golden", workspace=str(rae.workspace))
    rae("inspect", "latents/golden", "-w", rae.workspace).refused(5)
    rae("verify", "latents/golden", "-w", rae.workspace).refused(5)


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("dit", {"hidden_size": [4 * 10**8, 8]}),
        ("dit", {"depth": [10**12, 1]}),
        ("dit", {"mlp_ratio": 1e12}),
        ("dit", {"input_size": 10**7}),
        ("dit", {"num_classes": 10**12}),
        ("dit", {"in_channels": 10**12}),
        ("decoder", {"hidden_size": 4 * 10**8}),
        ("decoder", {"depth": 10**12}),
        ("decoder", {"grid": 10**7}),
        ("decoder", {"intermediate_size": 10**12}),
    ],
)
def test_models_that_claim_to_be_huge_are_refused_before_memory_is_taken(
    kind: str, sizes: dict[str, Any], rae: Rae
) -> None:
    path = payload(rae, kind, f"{kind}.json")
    about = json.loads(path.read_text())
    about["config"] |= sizes
    path.write_text(json.dumps(about))
    with pytest.raises(CorruptData, match="the model described beside it"):
        getattr(api, f"load_{kind}")("golden", workspace=str(rae.workspace))


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("kind", ["dit", "decoder"])
def test_a_pickle_in_place_of_safetensors_is_not_run(kind: str, rae: Rae, tmp_path: Path) -> None:
    weights = payload(rae, kind, "ema.safetensors")
    for write in (
        lambda: weights.write_bytes(pickle.dumps(Bomb(tmp_path / "ran")) * 1000),
        lambda: torch.save(Bomb(tmp_path / "ran"), weights),
    ):
        write()
        with weights.open("ab") as file:
            file.write(bytes(100_000))
        with pytest.raises(CorruptData, match="is not a readable safetensors file"):
            getattr(api, f"load_{kind}")("golden", workspace=str(rae.workspace))
    rae("verify", f"{kind}/golden", "-w", rae.workspace).refused(5)
    assert not (tmp_path / "ran").exists()


def test_tar_members_with_absolute_paths_and_links_write_nothing_anywhere(tmp_path: Path) -> None:
    target = tmp_path / "target"
    path = tmp_path / "evil.tar"
    with tarfile.open(path, "w") as tar:
        for name in (f"{target}/evil.png", "../../evil.png"):
            member = tarfile.TarInfo(name)
            member.size = 4
            tar.addfile(member, io.BytesIO(b"evil"))
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    source = open_source(path)
    images = [source.read(row) for row in range(len(source)) if source.reason(row) is None]
    assert set(images) <= {b"evil"}
    rae = Rae(tmp_path / "rae", {"shards": {"train": str(path)}, "encode": Rae(tmp_path / "other").sections["encode"]})
    ran = rae.verb("encode")
    assert "Traceback" not in ran.err
    assert ran.code == 5  # none of them is an image
    assert not target.exists()
    assert not list(tmp_path.rglob("evil.png"))
