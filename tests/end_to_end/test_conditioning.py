"""Vectors in place of labels: kept beside the latents, learned from, and drawn with."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import rae as api
from rae.store.artifacts import Workspace
from rae.store.latents import LatentStore
from rae.store.samples import read_batches
from tests.conftest import Rae, one_thread

DIM = 5


def words(**values: object) -> list[str]:
    return [word for key, value in values.items() for word in ("-s", f"{key.replace('__', '.')}={value}")]


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    """One for each training image of the small pipeline."""
    return np.random.default_rng(0).normal(size=(100, DIM)).astype(np.float32)


@pytest.fixture(scope="module")
def conditioned(finished: Rae, vectors: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Rae:
    """The small pipeline with vectors, up to the transformer."""
    folder = tmp_path_factory.mktemp("conditioned")
    rae = finished.copy(folder, "shards", "decoder", "latents")
    np.save(folder / "vectors.npy", vectors)
    rae.verb("encode", *words(encode__conditioning=folder / "vectors.npy")).succeeded()
    rae.verb("train-dit", *settings(rae)).succeeded()
    return rae


def settings(rae: Rae, **more: object) -> list[str]:
    given = {"encode__conditioning": rae.folder / "vectors.npy", "train_dit__conditioning": "vectors", **more}
    # Of its last weights, at a high rate: a transformer begins blind to what it is conditioned on.
    return words(**given, train_dit__lr=0.02, sample__weights="model")


def drawn(rae: Rae) -> np.ndarray:
    batches = list(read_batches(Workspace(rae.workspace).resolve("samples/tiny").payload))
    assert {int(label) for batch in batches for label in batch.labels} == {-1}
    return np.concatenate([batch.images for batch in batches])


def test_a_vector_stands_at_the_slot_of_its_image(finished: Rae, conditioned: Rae, vectors: np.ndarray) -> None:
    plain, artifact = finished.artifact("latents/tiny"), conditioned.artifact("latents/tiny")
    assert artifact["id"] != plain["id"]
    assert artifact["content"] == plain["content"]  # the latents are what they were, and were not encoded again
    store = LatentStore(Workspace(conditioned.workspace).resolve("latents/tiny").payload)
    slots = [store.slot_of(row) for row in range(len(store))]
    np.testing.assert_array_equal(store.conditioning[slots], vectors)
    padding = np.setdiff1d(np.arange(store.slots), slots)
    assert len(padding)
    assert np.isnan(store.conditioning[padding]).all()


def test_images_are_of_the_vectors_that_are_asked_for(conditioned: Rae, vectors: np.ndarray, tmp_path: Path) -> None:
    dit, decoder = (
        load("tiny", str(conditioned.workspace), weights=weights)
        for load, weights in ((api.load_dit, "model"), (api.load_decoder, "ema"))
    )
    assert (dit.num_classes, dit.config.conditioning_dim) == (0, DIM)
    np.save(tmp_path / "wanted.npy", 10 * vectors[:7])
    wanted = settings(conditioned, sample__conditioning=tmp_path / "wanted.npy")
    conditioned.verb("sample", *wanted).succeeded()
    images = drawn(conditioned)
    with one_thread():
        asked = 10 * vectors[np.arange(20) % 7]
        np.testing.assert_array_equal(images, api.sample(dit, decoder, asked, num_steps=4, batch_size=8))
        x, t, y = torch.randn(4, *dit.latent_shape), torch.full((4,), 0.5), torch.from_numpy(asked[:4])
        plain = dit(x, t, y)
        for value in (-y[3], torch.full_like(y[3], torch.nan)):
            other = dit(x, t, torch.cat([y[:3], value[None]]))
            assert (other != plain).flatten(1).any(1).tolist() == [False, False, False, True]
    conditioned.verb("sample", *wanted, *words(sample__guidance_scale=3)).succeeded()
    store = Workspace(conditioned.workspace).resolve("latents/tiny").payload
    conditioned.verb("sample", *settings(conditioned, sample__conditioning=store / "conditioning.npy")).succeeded()


def test_what_does_not_fit_is_refused(conditioned: Rae, rae_with: Callable[..., Rae], tmp_path: Path) -> None:
    np.save(tmp_path / "wide.npy", np.zeros((3, DIM + 1)))
    np.save(tmp_path / "words.npy", np.array(["a"]))
    conditioned.verb("sample", *settings(conditioned)).refused(2, f"takes vectors of {DIM} numbers")
    for file, code, said in (("wide.npy", 2, "holds vectors of 6 numbers"), ("words.npy", 2, "takes numbers [N, D]")):
        given = settings(conditioned, sample__conditioning=tmp_path / file)
        conditioned.verb("sample", *given).refused(code, said)
    plain = rae_with("shards", "latents", "decoder", "dit")
    plain.verb("sample", *words(sample__conditioning=tmp_path / "wide.npy")).refused(2, "takes no vectors")
    plain.verb("train-dit", *words(train_dit__conditioning="vectors")).refused(3, "encode with `encode.conditioning`")
    few = words(encode__conditioning=tmp_path / "wide.npy")
    plain.verb("encode", *few).refused(2, "has 3 vectors, and there are 100 images")


def test_a_damaged_vector_is_found(conditioned: Rae, tmp_path: Path) -> None:
    rae = conditioned.copy(tmp_path / "copy", "shards", "latents")
    rae("verify", "latents/tiny", "-w", rae.workspace).succeeded()
    path = Workspace(rae.workspace).resolve("latents/tiny").payload / "conditioning.npy"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    rae("verify", "latents/tiny", "-w", rae.workspace).refused(5, "conditioning.npy")
