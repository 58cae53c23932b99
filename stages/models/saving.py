"""Weights on the disk: safetensors only, strict on loading, with a digest over names and bytes."""

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rae.store.errors import CorruptData


def save_weights(path: Path, state: Mapping[str, Tensor]) -> None:
    """Write a new safetensors file and flush it to the disk, readable by whom its folder is.

    safetensors itself makes files that their owner alone can read, and reports a full disk as no `OSError`.
    """
    try:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}, path)
    except SafetensorError as error:
        code = re.search(r"\(os error (\d+)\)", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error
    path.chmod(path.parent.stat().st_mode & 0o666)
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def load_weights(model: nn.Module, path: Path) -> None:
    """Fill `model` from a file; `CorruptData` names what is missing, unknown or of another shape."""
    model.load_state_dict(read_weights(path, model.state_dict()))


def read_weights(path: Path, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file, which must have the names and shapes of `own`; else `CorruptData`."""
    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CorruptData(f"{path} is not a readable safetensors file ({error})") from error
    faults = [f"lacks `{name}`" for name in own.keys() - state.keys()]
    faults += [f"has the unknown `{name}`" for name in state.keys() - own.keys()]
    for name in own.keys() & state.keys():
        if own[name].shape != state[name].shape:
            faults.append(f"holds `{name}` as {list(state[name].shape)} where {list(own[name].shape)} is needed")
    if faults:
        shown = "; ".join(sorted(faults)[:5]) + (f"; and {len(faults) - 5} more" if len(faults) > 5 else "")
        raise CorruptData(f"{path} does not fit this model: it {shown}")
    return state


def digest_weights(state: Mapping[str, Tensor]) -> str:
    """sha256 over the tensors' names, types, shapes and bytes, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()
