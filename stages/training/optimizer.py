"""AdamW and the learning rate schedules of the official recipe."""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from rae.stages.training.parallel import laid_as, whole
from rae.stages.training.section import TrainingSection
from rae.store import order
from rae.store.errors import ConfigError, StaleInput

_STATE = ("step", "exp_avg", "exp_avg_sq")


def steps_per_epoch(section: TrainingSection, rows: int) -> int:
    """Whole batches in an epoch of `rows` samples; `ConfigError` if there is none."""
    steps = order.steps_per_epoch(rows, section.batch_size)
    if not steps:
        raise ConfigError(f"`batch_size` {section.batch_size} is larger than the {rows} training samples")
    return steps


def total_steps(section: TrainingSection, rows: int) -> int:
    """Length of the training in optimizer steps."""
    if section.steps is not None:
        return section.steps
    assert section.epochs is not None  # the section is validated: one of the two is given
    return max(1, round(section.epochs * steps_per_epoch(section, rows)))


def learning_rate(section: TrainingSection, step: int, steps_per_epoch: int, total_steps: int) -> float:
    """The rate of optimizer step `step`, counted from 0.

    Warm-up climbs linearly, `lr / warmup_steps` for step 0 and `lr` for its last step; `lr` is then held until
    `decay_start_epoch` and decays to `final_lr` at `decay_end_epoch` (default: the end of training), where it stays.
    The official schedules are these two: cosine with a warm-up and no hold (decoder), linear with a hold and no
    warm-up (DiT; there the hold is called warm-up).
    """
    warmup = section.warmup_steps or round(section.warmup_epochs * steps_per_epoch)
    if step < warmup:
        return section.lr * (step + 1) / warmup
    if section.schedule == "constant":
        return section.lr
    start = max(warmup, round(section.decay_start_epoch * steps_per_epoch))
    end = total_steps if section.decay_end_epoch is None else round(section.decay_end_epoch * steps_per_epoch)
    if step < start:
        return section.lr
    if step >= end:
        return section.final_lr
    remaining = 1 - (step - start) / (end - start)
    if section.schedule == "cosine":
        remaining = 0.5 * (1 - math.cos(math.pi * remaining))
    return section.final_lr + (section.lr - section.final_lr) * remaining


def build_optimizer(model: nn.Module, section: TrainingSection) -> torch.optim.AdamW:
    """AdamW over the trainable parameters, in one fused kernel where the device has one."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    fused = all(parameter.device.type in ("cpu", "cuda") for parameter in parameters)
    return torch.optim.AdamW(
        parameters,
        lr=section.lr,
        betas=section.betas,
        weight_decay=section.weight_decay,
        fused=fused,
        foreach=not fused,
    )


def clip_gradients(model: nn.Module, max_norm: float) -> Tensor:
    """Scale the gradients down to the total norm `max_norm` (0: leave them); returns the norm before, 0-dim."""
    if max_norm:
        return whole(nn.utils.clip_grad_norm_(model.parameters(), max_norm))
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return whole(nn.utils.get_total_norm(gradients))


def descend(
    optimizer: torch.optim.Optimizer, model: nn.Module, rate: float, clip_grad: float, check: Callable[[float], object]
) -> float:
    """Take one step of `optimizer` at a learning rate, gradients clipped first; returns their norm before.

    `check` sees the norm before anything moves, and may raise.
    """
    for group in optimizer.param_groups:
        group["lr"] = rate
    norm = clip_gradients(model, clip_grad).item()
    check(norm)
    optimizer.step()
    return norm


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """AdamW's state as `NAME.step`, `NAME.exp_avg`, `NAME.exp_avg_sq` for every trained parameter NAME of `model`.

    A parameter that no gradient has reached yet has the zeros from which AdamW would begin.
    """
    tensors = {}
    for name, parameter in _trained(optimizer, model).items():
        state = optimizer.state.get(parameter, {})
        zeros = (torch.zeros(()), torch.zeros_like(parameter), torch.zeros_like(parameter))
        for key, zero in zip(_STATE, zeros, strict=True):
            tensors[f"{name}.{key}"] = state.get(key, zero).detach()
    return tensors


def load_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give the optimizer the state that `optimizer_tensors` took; the learning rate is the schedule's matter.

    Raises `StaleInput` unless names and shapes are exactly those of the parameters trained now.
    """
    trained = _trained(optimizer, model)
    asked = {f"{name}.{key}" for name in trained for key in _STATE}
    if differing := sorted(asked ^ tensors.keys()):
        raise StaleInput(f"the optimizer state is of another model: {differing[0]} is not in both")
    state = {}
    for index, (name, parameter) in enumerate(trained.items()):
        given = {key: tensors[f"{name}.{key}"].clone() for key in _STATE}
        if (found := given["exp_avg"].shape) != parameter.shape:
            raise StaleInput(f"the optimizer state of {name} has shape {list(found)}, asked {list(parameter.shape)}")
        state[index] = laid_as(given, dict.fromkeys(_STATE[1:], parameter))
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def _trained(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, nn.Parameter]:
    """The optimizer's parameters by name, in the optimizer's order."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {names[parameter]: parameter for group in optimizer.param_groups for parameter in group["params"]}
