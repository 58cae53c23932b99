"""What version 1 of the formats wrote is read for ever: manifests, latents, models, checkpoints, with these values."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import rae as api
from rae.stages.training.checkpoints import load
from rae.store.artifacts import Workspace
from tests.conftest import Rae

V1 = Path(__file__).parent / "v1"
IDS = {
    "shards": "5c81faf18769f3fb",
    "latents": "c104bf3efd56c63b",
    "decoder": "0ae9d017016b8189",
    "dit": "36d2fd9c917b8ccf",
}


def test_every_artifact_is_found_by_name_and_id_with_its_lineage() -> None:
    workspace = Workspace(V1)
    assert {artifact.kind: artifact.id for artifact in workspace.artifacts()} == IDS
    assert workspace.names() == {f"{kind}/golden": f"{kind}/{id}" for kind, id in IDS.items()}
    dit = workspace.resolve("dit/golden").manifest
    assert dit.inputs["latents"]["id"] == IDS["latents"]
    assert (dit.schema, dit.metrics["steps"], dit.metrics["loss"]) == (1, 2, pytest.approx(1.71318519115448))
    assert dit.config["train_dit"]["hidden_size"] == [8, 8]


@pytest.mark.parametrize("kind", IDS)
def test_every_artifact_is_what_its_digests_say(kind: str, tmp_path: Path) -> None:
    Rae(tmp_path)("verify", f"{kind}/golden", "-w", V1).succeeded()


def test_latents_have_these_values() -> None:
    latents = api.open_latents("golden", workspace=str(V1))
    assert (len(latents), latents.shape, latents[3]["key"], latents[3]["label"]) == (10, (3, 2, 2), "1791", 4)
    channel = [[0.13907278, -0.32952714], [0.60906583, 0.909175]]
    np.testing.assert_allclose(latents[3]["latent"], [channel] * 3, rtol=1e-6)
    np.testing.assert_allclose(latents.stats.mean.ravel()[:4], [0.29815674, 0.29815674, 0.33078003, 0.33078003], 1e-7)
    assert latents.stats.count == 20  # both views


def test_models_compute_these_values() -> None:
    tokens = torch.arange(12.0).reshape(1, 3, 2, 2) / 12
    with torch.no_grad():
        velocity = api.load_dit("golden", workspace=str(V1))(tokens, torch.tensor([0.5]), torch.tensor([1]))
        image = api.load_decoder("golden", workspace=str(V1))(tokens)
    expected = [-7.508670e-05, -7.690751e-05, -7.787732e-05, -7.836938e-05]
    np.testing.assert_allclose(velocity.ravel()[:4].numpy(), expected, rtol=1e-3)
    assert image.shape == (1, 3, 16, 16)
    np.testing.assert_allclose(image.ravel()[1:5].numpy(), [0.5515605, 0.7895821, 0.6660959, 0.4893142], rtol=1e-5)


def test_checkpoints_load_whole() -> None:
    (folder,) = V1.glob("objects/dit/*/attempts/*/checkpoints/step-00000002")
    checkpoint = load(folder)
    assert checkpoint.step == 2
    assert {group: len(tensors) for group, tensors in checkpoint.tensors.items()} == {
        "ema": 44,
        "latent_stats": 2,
        "model": 44,
        "optimizer": 114,
    }


def test_a_run_of_version_1_goes_on(tmp_path: Path) -> None:
    section = Workspace(V1).resolve("dit/golden").manifest.config["train_dit"] | {"latents": "golden"}
    rae = Rae(tmp_path, {"train_dit": section | {"steps": 3, "epochs": None, "continue_from": f"dit/{IDS['dit']}"}})
    shutil.copytree(V1, rae.workspace)
    rae.verb("train-dit").succeeded()
    assert rae.artifact("dit/tiny")["metrics"]["steps"] == 3
