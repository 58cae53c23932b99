"""The transport's formulas against what defines them: derivatives by autograd, Gaussians by hand."""

import math
from collections.abc import Callable
from typing import get_args

import pytest
import torch
from torch import Tensor

from rae.stages.models.transport import (
    LossWeight,
    PathType,
    Prediction,
    Transport,
    auto_shift,
    create_transport,
    shift_time,
)
from rae.store.errors import ConfigError

PATHS, PREDICTIONS, WEIGHTS = get_args(PathType), get_args(Prediction), get_args(LossWeight)
TIMES = torch.tensor([0.05, 0.3, 0.7, 0.95], dtype=torch.float64)
# Data N(MEAN, STD^2)
MEAN, STD = 1.3, 0.6


def alpha_sigma(path_type: str, t: Tensor) -> tuple[Tensor, Tensor]:
    """The paths by their definitions, written apart from the code under test."""
    if path_type == "Linear":
        return 1 - t, t
    if path_type == "GVP":
        return torch.cos(math.pi / 2 * t), torch.sin(math.pi / 2 * t)
    integral_of_beta = 0.1 * (1 - t) + 0.5 * 19.9 * (1 - t) ** 2
    return torch.sqrt(1 - torch.exp(-integral_of_beta)), torch.exp(-0.5 * integral_of_beta)


def derivative(function: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    t = t.clone().requires_grad_()
    return torch.autograd.grad(function(t).sum(), t)[0]


def gaussian_predictions(path_type: str, x: Tensor, t: Tensor) -> dict[str, Tensor]:
    """The conditional expectations of data and noise given x_t, and the score and velocity of the marginals."""

    def mean(t: Tensor) -> Tensor:
        return alpha_sigma(path_type, t)[0] * MEAN

    def std(t: Tensor) -> Tensor:
        alpha, sigma = alpha_sigma(path_type, t)
        return torch.sqrt((alpha * STD) ** 2 + sigma**2)

    alpha, sigma = alpha_sigma(path_type, t)
    offset = (x - mean(t)) / std(t) ** 2
    return {
        "data": MEAN + alpha * STD**2 * offset,
        "noise": sigma * offset,
        "score": -offset,
        # x_t = mean(t) + std(t) z with z fixed is the flow between the marginals; it is the probability-flow ODE's.
        "velocity": derivative(mean, t) + derivative(std, t) * (x - mean(t)) / std(t),
    }


def pair(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x1, noise = torch.randn(2, len(TIMES), 3, 2, 2, generator=generator, dtype=torch.float64)
    return x1, noise


@pytest.mark.parametrize("path_type", PATHS)
def test_the_velocity_is_the_derivative_of_the_path(path_type: str) -> None:
    x1, noise = pair()
    transport = create_transport(path_type)
    x_t, velocity = transport.path(x1, noise, TIMES)
    alpha, sigma = (c.view(-1, 1, 1, 1) for c in alpha_sigma(path_type, TIMES))
    torch.testing.assert_close(x_t, alpha * x1 + sigma * noise)
    d_alpha, d_sigma = (
        derivative(lambda t, i=i: alpha_sigma(path_type, t)[i], TIMES).view(-1, 1, 1, 1) for i in (0, 1)
    )
    torch.testing.assert_close(velocity, d_alpha * x1 + d_sigma * noise)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("path_type", PATHS)
def test_drift_and_score_of_a_gaussian_are_exact(path_type: str, prediction: str) -> None:
    """On VP the official noise and score drifts have the other sign, and 1.5 times the size at t = 0.7."""
    transport = create_transport(path_type, prediction)
    x = torch.linspace(-2, 2, len(TIMES), dtype=torch.float64)
    exact = gaussian_predictions(path_type, x, TIMES)
    torch.testing.assert_close(transport.velocity(exact[prediction], x, TIMES), exact["velocity"])
    torch.testing.assert_close(transport.score(exact[prediction], x, TIMES), exact["score"])


def implied(transport: Transport, prediction: str, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """The output under another prediction that means the same."""
    at = transport.coefficients(t, x)
    score = transport.score(output, x, t)
    noise = -at.sigma * score
    data = (x - at.sigma * noise) / at.alpha
    return {
        "velocity": at.d_alpha * data + at.d_sigma * noise,
        "noise": noise,
        "score": score,
        "data": data,
    }[prediction]


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("path_type", PATHS)
def test_a_weighted_loss_does_not_depend_on_what_is_predicted(path_type: str, weight: str) -> None:
    x1, noise = pair()
    sigma = alpha_sigma(path_type, TIMES)[1]
    d_log_alpha = derivative(lambda t: alpha_sigma(path_type, t)[0].log(), TIMES)
    g_squared = derivative(lambda t: alpha_sigma(path_type, t)[1] ** 2, TIMES) - 2 * d_log_alpha * sigma**2
    output = torch.randn(x1.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    by_score = create_transport(path_type, "score")
    x_t, velocity = by_score.path(x1, noise, TIMES)
    if weight == "velocity":
        error = by_score.velocity(output, x_t, TIMES) - velocity
        expected = error.square().mean((1, 2, 3))
    else:
        error = output + noise / sigma.view(-1, 1, 1, 1)
        expected = g_squared / 2 * error.square().mean((1, 2, 3))
    assert bool((g_squared > 0).all())
    for prediction in PREDICTIONS:
        if (weight, prediction) == ("likelihood", "velocity") and path_type != "VP":
            continue
        transport = create_transport(path_type, prediction, weight)
        same = implied(by_score, prediction, output, x_t, TIMES)
        losses = transport.training_losses(lambda x, t, y, same=same: same, x1, TIMES, t=TIMES, noise=noise)
        torch.testing.assert_close(losses, expected, rtol=1e-4, atol=0, check_dtype=False)


@pytest.mark.parametrize("path_type", ["Linear", "GVP"])
def test_a_weight_that_is_infinite_in_training_is_refused(path_type: str) -> None:
    with pytest.raises(ConfigError, match="infinite at t = 0"):
        create_transport(path_type, "velocity", "likelihood")


@pytest.mark.parametrize(
    "wrong",
    [
        {"path_type": "linear"},
        {"prediction": "x0"},
        {"loss_weight": "none"},
        {"time_dist_type": "lognormal"},
        {"time_dist_shift": 0.0},
        {"time_dist_shift": math.nan},
    ],
)
def test_unknown_names_and_impossible_shifts_are_refused(wrong: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        create_transport(**wrong)


@pytest.mark.parametrize("weight", [None, "velocity"])
def test_a_loss_is_the_mean_square_error_of_each_sample(weight: str | None) -> None:
    x1, noise = (part.float() for part in pair())
    losses = create_transport(loss_weight=weight).training_losses(
        lambda x, t, y: torch.zeros_like(x), x1, torch.zeros(4), t=TIMES.float(), noise=noise
    )
    torch.testing.assert_close(losses, (noise - x1).square().mean((1, 2, 3)))


def test_draws_that_are_not_given_come_from_the_generator() -> None:
    x1 = pair()[0].float()
    seen = []

    def model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        seen.append((x, t))
        return x

    transport = create_transport(time_dist_type="logit-normal", time_dist_shift=3.0)
    for seed in (5, 5, 6):
        transport.training_losses(model, x1, torch.zeros(4), generator=torch.Generator().manual_seed(seed))
    (x_a, t_a), (x_b, t_b), (x_c, t_c) = seen
    assert torch.equal(x_a, x_b)
    assert torch.equal(t_a, t_b)
    assert not torch.equal(x_a, x_c)
    assert not torch.equal(t_a, t_c)


def test_losses_are_float32_under_autocast() -> None:
    layer = torch.nn.Conv2d(3, 3, 1)
    x1, noise = (part.float() for part in pair())
    with torch.autocast("cpu", torch.bfloat16):
        losses = create_transport().training_losses(
            lambda x, t, y: layer(x), x1, torch.zeros(4), t=TIMES.float(), noise=noise
        )
    assert losses.dtype == torch.float32


def test_uniform_times_fill_the_interval() -> None:
    u = torch.linspace(0, 1, 11)
    torch.testing.assert_close(create_transport().sample_times(u), u * 0.999)
    low, high = create_transport("Linear", "noise").training_interval
    assert (low, high) == (1e-3, 0.999)
    shifted = create_transport(time_dist_shift=4.0).sample_times(u)
    assert shifted[5] == pytest.approx(4 * 0.4995 / (1 + 3 * 0.4995))


def test_logit_normal_times_have_a_standard_normal_logit() -> None:
    transport = create_transport(time_dist_type="logit-normal")
    u = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    logits = torch.logit(transport.sample_times(u))
    assert logits.mean().item() == pytest.approx(0, abs=1e-3)
    assert logits.std().item() == pytest.approx(1, abs=1e-3)
    normal = torch.tensor([-1.0, 0.0, 2.0])
    torch.testing.assert_close(transport.sample_times(torch.zeros(3), normal), torch.sigmoid(normal))
    ends = transport.sample_times(torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(ends, torch.tensor([0.0, 0.999]))


def test_the_official_name_of_the_logit_normal_is_understood() -> None:
    assert create_transport(time_dist_type="logit-normal_0_1") == create_transport(time_dist_type="logit-normal")


def test_the_sampling_grid_ends_where_the_official_one_does() -> None:
    times = create_transport(time_dist_shift=auto_shift(768, 16, 16)).sampling_times(50)
    assert len(times) == 50
    assert times[0] == 1
    assert times[-1].item() == pytest.approx(0.0069, abs=5e-5)
    assert bool((times.diff() < 0).all())


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("path_type", PATHS)
def test_drifts_are_finite_on_the_whole_sampling_grid(path_type: str, prediction: str) -> None:
    transport = create_transport(path_type, prediction, time_dist_shift=7.0)
    times = transport.sampling_times(20)
    ones = torch.ones(20)
    assert bool(torch.isfinite(transport.velocity(ones, ones, times)).all())


def test_shifts() -> None:
    assert auto_shift(768, 16, 16) == pytest.approx(6.93, abs=5e-3)
    assert auto_shift(768, 32, 32) == pytest.approx(13.86, abs=5e-3)
    assert auto_shift(4, 16, 16) == 1.0
    t = torch.linspace(0, 1, 5)
    torch.testing.assert_close(shift_time(t, 1.0), t)
    torch.testing.assert_close(shift_time(shift_time(t, 6.0), 1 / 6.0), t)
