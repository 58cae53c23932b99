"""How a model lies on the ranks that train it: whole on each (DDP), or in shards (FSDP2). The only place that knows.

Either way gradients are averaged over ranks, and a training is that of one process but for rounding.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from rae.stages.training.ranks import Ranks
from rae.stages.training.section import Parallel

State = Mapping[str, Tensor]


def spread(
    model: nn.Module, parallel: Parallel, ranks: Ranks, device: torch.device, copies: Sequence[nn.Module] = ()
) -> nn.Module:
    """What to call instead of `model`, so that its gradients are averaged over ranks; alone, `model` itself.

    All ranks must hold the same weights (`agree`). `fsdp2` leaves each of them a slice of the rows of every parameter,
    of `model` and of `copies`, modules of the same build; a block's parameters are whole while it computes.
    """
    if ranks.world_size == 1:
        return model
    if parallel == "ddp":
        device_ids = [device.index] if device.type == "cuda" else None
        return DistributedDataParallel(
            model,
            device_ids=device_ids,
            gradient_as_bucket_view=True,
            init_sync=False,
        )
    mesh = init_device_mesh(device.type, (ranks.world_size,))
    for sharded in (model, *copies):
        lists = [module for module in sharded.modules() if isinstance(module, nn.ModuleList)]
        for block in (block for blocks in lists for block in blocks):
            fully_shard(block, mesh=mesh)
        fully_shard(sharded, mesh=mesh)
    # What a model returns may be a view, and nobody here writes into it.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module")
    return model


def agree(model: nn.Module, ranks: Ranks) -> nn.Module:
    """Give a model that is whole on every rank the first one's weights and buffers; returns it."""
    if ranks.world_size > 1:
        for tensor in (*model.parameters(), *model.buffers()):
            distributed.broadcast(tensor.detach(), 0)
    return model


@contextmanager
def averaging(forward: nn.Module, last: bool) -> Iterator[None]:
    """Around a forward and a backward pass of what `spread` returned: gradients add up on each rank until the `last`.

    Only that one communicates, and makes of the sums their mean over ranks.
    """
    if isinstance(forward, FSDPModule):
        forward.set_requires_gradient_sync(last)
        try:
            yield
        except Exception:
            forward.reshard()  # as the backward pass, which is not to come, would have done
            raise
    elif isinstance(forward, DistributedDataParallel) and not last:
        with forward.no_sync():
            yield
    else:
        yield


def is_sharded(state: State) -> bool:
    """Whether ranks hold slices of these tensors."""
    return any(isinstance(tensor, DTensor) for tensor in state.values())


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, on every rank, whatever `tensor` is; all ranks ask at once."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered(state: State, ranks: Ranks) -> dict[str, Tensor]:
    """The whole tensors of `state`, on rank 0; of sharded ones a copy on the CPU, made one tensor at a time.

    All ranks ask at once; the others get nothing.
    """
    found = {}
    for name, tensor in state.items():
        full = whole(tensor)
        if ranks.is_main:
            found[name] = full.cpu() if isinstance(tensor, DTensor) else full
    return found


def laid_as(state: State, own: State) -> dict[str, Tensor]:
    """Whole tensors, the same on every rank, cut as those of their names in `own` are; others as they were."""
    return {name: _cut(tensor, own[name]) if name in own else tensor for name, tensor in state.items()}


def fill(model: nn.Module, state: State) -> None:
    """Give a model, however it lies, the whole tensors of its state; raises as `load_state_dict`."""
    model.load_state_dict(laid_as(state, model.state_dict()))


def _cut(tensor: Tensor, own: Tensor) -> Tensor:
    if not isinstance(own, DTensor):
        return tensor
    return distribute_tensor(tensor, own.device_mesh, own.placements, src_data_rank=None)
