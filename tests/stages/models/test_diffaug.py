"""DiffAug: what it changes of an image, by hand, and that neighbours have no part in it."""

import pytest
import torch
from torch import Tensor

from rae.stages.models.diffaug import DRAWS, diff_augment

STILL = {"translate": 1.0, "down": 0.5, "across": 0.5, "colour": 1.0, "brightness": 0.5, "saturation": 0.5}


def images(count: int = 3) -> Tensor:
    return 2 * torch.rand(count, 3, 16, 24, generator=torch.Generator().manual_seed(0)) - 1


def draws(count: int = 3, **chosen: float) -> Tensor:
    """Numbers that change nothing at probability 0.5, but for those chosen."""
    return torch.tensor([[{**STILL, "contrast": 0.5, **chosen}[name] for name in DRAWS]]).repeat(count, 1)


def drawn(count: int = 3) -> Tensor:
    return torch.rand(count, len(DRAWS), generator=torch.Generator().manual_seed(1))


def test_probability_zero_changes_nothing_and_one_everything() -> None:
    assert torch.equal(diff_augment(images(), drawn(), 0.0), images())
    assert torch.equal(diff_augment(images(), draws(), 0.5), images())
    changed = diff_augment(images(), torch.full((3, 7), 0.999), 1.0)
    assert all((new != old).any() for new, old in zip(changed, images(), strict=True))


@pytest.mark.parametrize(("draw", "shift"), [(0.0, 2), (0.21, 1), (0.5, 0), (0.999, -2)])
def test_it_moves_by_up_to_an_eighth_and_fills_with_zeros(draw: float, shift: int) -> None:
    moved = diff_augment(images(), draws(translate=0.4, down=draw), 0.5)
    expected = torch.zeros_like(images())
    height = expected.shape[2]
    expected[:, :, max(shift, 0) : height + min(shift, 0)] = images()[:, :, max(-shift, 0) : height - max(shift, 0)]
    assert torch.equal(moved, expected)
    across = diff_augment(images(), draws(translate=0.4, across=0.0), 0.5)
    assert torch.equal(across[..., 3:], images()[..., :-3])  # an eighth of 24
    assert not across[..., :3].any()


def test_colours_change_by_the_published_formulas() -> None:
    x = images()
    brighter = diff_augment(x, draws(colour=0.4, brightness=0.9), 0.5)
    torch.testing.assert_close(brighter, x + 0.4)
    grey = diff_augment(x, draws(colour=0.4, saturation=0.0), 0.5)
    torch.testing.assert_close(grey, x.mean(dim=1, keepdim=True).expand_as(x))
    vivid = diff_augment(x, draws(colour=0.4, saturation=0.75), 0.5)
    torch.testing.assert_close(vivid, 1.5 * x - 0.5 * x.mean(dim=1, keepdim=True))
    harder = diff_augment(x, draws(colour=0.4, contrast=0.75), 0.5)
    torch.testing.assert_close(harder, 1.25 * x - 0.25 * x.mean(dim=(1, 2, 3), keepdim=True))


def test_an_image_is_augmented_alike_in_any_batch() -> None:
    together = diff_augment(images(), drawn(), 0.7)
    for row in range(3):
        alone = diff_augment(images()[row : row + 1], drawn()[row : row + 1], 0.7)
        assert torch.equal(alone, together[row : row + 1])


def test_gradients_reach_the_image() -> None:
    batch = images().requires_grad_()
    diff_augment(batch, drawn(), 1.0).square().sum().backward()
    assert batch.grad is not None
    assert (batch.grad != 0).float().mean() > 0.7
