"""Exponential moving average of the weights: the model that is published."""

import copy

import torch
from torch import Tensor, nn


class EMA:
    """`model` follows the trained one: ema <- decay * ema + (1 - decay) * weight after every step.

    It starts as a copy, in eval mode and without gradients. Buffers (tables, counters) are copied, not averaged.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move one step towards `model`, which has the same parameters and buffers."""
        averages: list[Tensor] = list(self.model.parameters())
        weights: list[Tensor] = list(model.parameters())
        torch._foreach_lerp_(averages, weights, 1 - self.decay)
        for copied, buffer in zip(self.model.buffers(), model.buffers(), strict=True):
            copied.copy_(buffer)
