"""Weights on the disk: safetensors only, strict on loading, with a digest over names and bytes."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rae.store.errors import CorruptData


def save_weights(path: Path, state: Mapping[str, Tensor]) -> None:
    """Write a state dict; tensors are moved to the CPU and made contiguous."""
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}, path)


def load_weights(model: nn.Module, path: Path) -> None:
    """Fill `model` from a file; `CorruptData` names what is missing, unknown or of another shape."""
    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CorruptData(f"{path} is not a readable safetensors file ({error})") from error
    own = model.state_dict()
    faults = [f"lacks `{name}`" for name in own.keys() - state.keys()]
    faults += [f"has the unknown `{name}`" for name in state.keys() - own.keys()]
    for name in own.keys() & state.keys():
        if own[name].shape != state[name].shape:
            faults.append(f"holds `{name}` as {list(state[name].shape)} where {list(own[name].shape)} is needed")
    if faults:
        shown = "; ".join(sorted(faults)[:5]) + (f"; and {len(faults) - 5} more" if len(faults) > 5 else "")
        raise CorruptData(f"{path} does not fit this model: it {shown}")
    model.load_state_dict(state)


def digest_weights(state: Mapping[str, Tensor]) -> str:
    """sha256 over the tensors' names, types, shapes and bytes, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()
