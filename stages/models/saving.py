"""Weights on the disk: safetensors only, strict on loading, with a digest over names and bytes."""

import difflib
import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rae.store.errors import CorruptData

_SHOWN_FAULTS = 5


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
    state = read_tensors(path)
    check_weights(state, own, str(path))
    return state


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, whatever they are; `CorruptData` if it can't be read."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CorruptData(f"{path} is not a readable safetensors file ({error})") from error


def check_weights(state: Mapping[str, Tensor], own: Mapping[str, Tensor], where: str, what: str = "this model") -> None:
    """`CorruptData` unless `state` has the names and shapes of `own`: it names what differs, and what was meant."""
    missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    faults = [f"has the unknown `{name}`{_meant(name, missing)}" for name in unknown[:_SHOWN_FAULTS]]
    faults += unknown[_SHOWN_FAULTS:]  # only counted: looking for what each was meant to be takes long
    for name in sorted(own.keys() & state.keys()):
        if own[name].shape != state[name].shape:
            faults.append(f"holds `{name}` as {list(state[name].shape)} where {list(own[name].shape)} is needed")
    faults += [f"lacks `{name}`" for name in missing]
    if faults:
        more = [f"and {len(faults) - _SHOWN_FAULTS} more"] if len(faults) > _SHOWN_FAULTS else []
        raise CorruptData(f"{where} does not fit {what}: it {'; '.join([*faults[:_SHOWN_FAULTS], *more])}")


def _meant(name: str, missing: list[str]) -> str:
    close = difflib.get_close_matches(name, missing, n=1)
    return f" (did you mean `{close[0]}`?)" if close else ""


def digest_weights(state: Mapping[str, Tensor]) -> str:
    """sha256 over the tensors' names, types, shapes and bytes, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())  # numpy has no bfloat16
    return digest.hexdigest()
