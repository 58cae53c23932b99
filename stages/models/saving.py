"""Weights on the disk: safetensors only, strict on loading, with a digest over names and bytes."""

import difflib
import hashlib
import os
import re
import warnings
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


def link_file(stored: Path, path: Path) -> bool:
    """Give a file that is never changed a second name; False where there is none, or the file system has no links."""
    path.unlink(missing_ok=True)  # whoever wrote into it would change what else it is
    try:
        path.hardlink_to(stored)
    except OSError:
        return False
    return True


def check_room(path: Path, parameters: float) -> None:
    """`CorruptData` unless a weights file can hold so many numbers.

    What stands beside the weights says how large a model is, and is not to be believed before memory is taken for it.
    """
    shards = path.with_suffix("")
    files = [path] if path.exists() or not shards.is_dir() else list(shards.iterdir())
    stored = sum(file.stat().st_size for file in files if file.exists())
    if stored and parameters > stored:
        raise CorruptData(f"{path} has {stored} bytes, and the model described beside it {parameters:.3g} numbers")


def load_weights(model: nn.Module, path: Path) -> None:
    """Fill `model` from a file; `CorruptData` names what is missing, unknown or of another shape."""
    model.load_state_dict(read_weights(path, model.state_dict()))


def read_weights(path: Path, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file, which must have the names and shapes of `own`; else `CorruptData`."""
    state = read_tensors(path)
    check_weights(state, own, str(path))
    return state


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of NAME.safetensors, or of the shards in the folder NAME; `CorruptData` if they can't be read."""
    shards = path.with_suffix("")
    try:
        return _read_shards(shards) if shards.is_dir() else load_file(path)
    except (OSError, SafetensorError) as error:
        raise CorruptData(f"{path} is not a readable safetensors file ({error})") from error


def is_saved(path: Path) -> bool:
    """Whether `read_tensors` finds something there."""
    return path.exists() or path.with_suffix("").is_dir()


def save_shards(folder: Path, state: Mapping[str, Tensor]) -> None:
    """Write what each rank holds of tensors that lie in shards, a safetensors file each, flushed to the disk.

    All ranks call at once, and all raise `OSError` if one of them does. torch's own format for this keeps its index in
    a pickle, which nobody should load from a folder that others can write to; here every file says what it is a slice
    of.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    try:
        save(dict(state), storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))
    except CheckpointException as error:
        for cause, _ in error.failures.values():
            if isinstance(cause, OSError):
                raise OSError(cause.errno, cause.strerror, str(folder)) from error
        raise


def _read_shards(folder: Path) -> dict[str, Tensor]:
    """The whole tensors, from any number of shards."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    found = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    state = {
        name: torch.empty(of.size, dtype=of.properties.dtype)
        for name, of in found.items()
        if isinstance(of, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as it is meant to be
        load(state, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    return state


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
