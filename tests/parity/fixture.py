"""Fixtures in a folder: outputs of the official release (`bytetriper/RAE`, commit a4d18c4) on CPU in float32."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

SUFFIXES = (".safetensors", ".npz", ".json")


def fixtures(folder: Path) -> list[Path]:
    """Every file below `folder` that holds numbers; a folder with `parity.safetensors` is one fixture, an encoder's.

    Without any it is the folder itself, which fails the walk.
    """
    return list(_below(folder)) or [folder]


def _below(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if (path / "parity.safetensors").is_file():
            yield path
        elif path.is_dir():
            yield from _below(path)
        elif path.suffix in SUFFIXES:
            yield path


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata() or {}


def read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """A safetensors file's metadata and tensors."""
    with safe_open(path, "pt") as file:
        return file.metadata() or {}, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def read_shapes(path: Path) -> dict[str, dict[str, list[int]]]:
    """A JSON file's state dicts: name -> key -> shape."""
    return json.loads(path.read_text(encoding="utf-8"))


def below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose key begins with `prefix`, by the rest of the key."""
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def close(ours: Tensor, official: Tensor, what: str = "") -> None:
    """1e-4 absolute and relative, the tolerance of float32 outputs."""
    message = (lambda text: f"{what}: {text}") if what else None
    torch.testing.assert_close(ours, official, atol=1e-4, rtol=1e-4, msg=message)


def close_after_training(
    ours: Mapping[str, Tensor], official: Mapping[str, Tensor], initial: Mapping[str, Tensor]
) -> None:
    """Every tensor ends within 1e-3 of the distance that the official one travelled from its initial value."""
    assert ours.keys() == official.keys()
    for key, weight in ours.items():
        travelled = (official[key] - initial[key]).norm()
        assert (weight - official[key]).norm() <= 1e-3 * travelled + 1e-6, key
