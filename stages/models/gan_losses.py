"""Losses of the decoder's adversarial training, and how much the generator's one counts (VQGAN, Esser et al. 2021).

Shapes: logits [B, K] of any number K per image; larger is more real.
"""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

DiscLoss = Literal["hinge", "vanilla"]


def generator_loss(fake: Tensor) -> Tensor:
    """-mean(logits) of made images, 0-dim."""
    return -fake.mean()


def discriminator_loss(kind: DiscLoss, logits: Tensor, real: bool) -> Tensor:
    """Half of what real images' logits lack, or half of what made ones' exceed; the sum of both is the loss. 0-dim.

    `hinge` (Lim and Ye 2017) stops caring beyond a margin of 1; `vanilla` is the cross-entropy (Goodfellow et al.
    2014).
    """
    wrong = -logits if real else logits
    return 0.5 * (F.relu(1 + wrong) if kind == "hinge" else F.softplus(wrong)).mean()


def adaptive_weight(reconstruction: Tensor, generator: Tensor, max_d_weight: float) -> Tensor:
    """|reconstruction| / (|generator| + 1e-6), at most `max_d_weight` (VQGAN, equation 7); 0-dim.

    The arguments are the gradients of the two losses at one weight, usually the decoder's last; they count alike with
    this factor before the generator's loss.
    """
    ratio: Tensor = reconstruction.norm() / (generator.norm() + 1e-6)
    return ratio.clamp(0, max_d_weight)
