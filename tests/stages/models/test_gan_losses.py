"""The adversarial losses and the adaptive weight, against numbers worked out by hand."""

import math

import pytest
import torch

from rae.stages.models.gan_losses import adaptive_weight, discriminator_loss, generator_loss


def test_hinge_is_half_of_what_lies_inside_the_margins() -> None:
    real, fake = torch.tensor([[2.0, 0.5], [1.0, -1.0]]), torch.tensor([[-3.0, -0.5], [0.0, 1.0]])
    assert discriminator_loss("hinge", real, real=True).item() == pytest.approx((0.5 + 2) / 4 / 2)
    assert discriminator_loss("hinge", fake, real=False).item() == pytest.approx((0.5 + 1 + 2) / 4 / 2)


def test_vanilla_is_half_of_both_cross_entropies() -> None:
    real, fake = torch.tensor([[0.0]]), torch.tensor([[2.0]])
    assert discriminator_loss("vanilla", real, real=True).item() == pytest.approx(math.log(2) / 2)
    assert discriminator_loss("vanilla", fake, real=False).item() == pytest.approx(math.log(1 + math.exp(2)) / 2)


def test_the_generator_wants_large_logits() -> None:
    assert generator_loss(torch.tensor([[1.0, 3.0]])).item() == -2


def test_the_adaptive_weight_makes_both_gradients_count_alike() -> None:
    one, other = torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 2.0]])
    assert adaptive_weight(one, other, 1e4).item() == pytest.approx(2.5, rel=1e-5)
    assert adaptive_weight(one, other, 1.5).item() == 1.5
    assert adaptive_weight(one, torch.zeros(1, 2), 1e4).item() == 1e4
    assert adaptive_weight(torch.zeros(1, 2), torch.zeros(1, 2), 1e4).item() == 0
