"""Power-function averages, held against sums over the recorded weights of every step."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from rae.stages.models.power_ema import exponent, find_snapshots, reconstruct
from rae.stages.training.ema import PowerEMAs
from rae.store.errors import MissingInput

STEPS, EVERY = 600, 30


def walk(step: int, model: nn.Linear) -> None:
    """Weights as a training might move them: fast at first, noisy throughout."""
    generator = torch.Generator().manual_seed(step)
    drift = 3 / (1 + step / 50)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * (drift + torch.randn(parameter.shape, generator=generator)))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[nn.Linear]]:
    """The folder of a walk's snapshots, and the model after every step."""
    folder, model = tmp_path_factory.mktemp("walk"), nn.Linear(5, 4)
    averages, after = PowerEMAs(model, (0.05, 0.1), EVERY), []
    for step in range(1, STEPS + 1):
        walk(step, model)
        averages.update(model, step)
        averages.save(folder, step, last=step == STEPS)
        after.append(copy.deepcopy(model))
    return folder, after


def direct(after: list[nn.Linear], sigma_rel: float) -> np.ndarray:
    """The average itself: the weights of step s have the share (s/t)^(g+1) - ((s-1)/t)^(g+1)."""
    ends = np.arange(len(after) + 1) / len(after)
    shares = np.diff(ends ** (exponent(sigma_rel) + 1))
    return np.tensordot(shares, np.stack([model.weight.detach().numpy() for model in after]), 1)


def test_lengths_are_the_papers() -> None:
    assert exponent(0.05) == pytest.approx(16.97, abs=5e-3)
    assert exponent(0.10) == pytest.approx(6.94, abs=5e-3)
    for sigma_rel in (0.02, 0.13, 0.27):
        g = exponent(sigma_rel)
        assert (g + 1) ** 0.5 / (g + 2) / (g + 3) ** 0.5 == pytest.approx(sigma_rel)


@pytest.mark.parametrize(("sigma_rel", "error"), [(0.05, 2e-5), (0.1, 2e-5), (0.07, 2e-3), (0.15, 2e-3), (0.2, 1e-2)])
def test_a_length_chosen_afterwards_is_the_average_over_every_step(
    trained: tuple[Path, list[nn.Linear]], sigma_rel: float, error: float
) -> None:
    folder, after = trained
    assert len(find_snapshots(folder)) == 2 * STEPS // EVERY
    made, expected = reconstruct(folder, sigma_rel)["weight"].numpy(), direct(after, sigma_rel)
    moved = np.abs(after[-1].weight.detach().numpy() - expected).max()
    assert np.abs(made - expected).max() < error * moved


def test_averages_that_are_taken_up_again_are_those_that_went_on(
    trained: tuple[Path, list[nn.Linear]], tmp_path: Path
) -> None:
    folder, after = trained
    (tmp_path / "second").mkdir()
    interrupted = PowerEMAs(nn.Linear(5, 4), (0.05, 0.1), EVERY)
    for step in range(1, 46):
        interrupted.update(after[step - 1], step)
        interrupted.save(tmp_path, step, last=False)
    resumed = PowerEMAs(nn.Linear(5, 4), (0.05, 0.1), EVERY)
    resumed.restore(interrupted.tensors())
    resumed.take_over(tmp_path / "second", tmp_path, 45)
    for step in range(46, STEPS + 1):
        resumed.update(after[step - 1], step)
        resumed.save(tmp_path / "second", step, last=step == STEPS)
    whole = {path.name: path.read_bytes() for path in find_snapshots(folder)}
    assert {path.name: path.read_bytes() for path in find_snapshots(tmp_path / "second")} == whole


def test_a_transformer_without_snapshots_says_so(tmp_path: Path) -> None:
    with pytest.raises(MissingInput, match="keeps no snapshots"):
        reconstruct(tmp_path, 0.1)
