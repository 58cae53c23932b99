"""The samplers reach the data from noise on every path, by every prediction; guidance computes only what counts."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rae.stages.models.dit import DiTConfig, build_dit
from rae.stages.models.samplers import guided, sample_ode
from rae.stages.models.transport import Transport, create_transport
from rae.store.errors import ConfigError

MEAN, STD = torch.tensor([1.5, -0.5]).view(1, 2, 1, 1), 0.6
NULL = 10


def gaussian_model(transport: Transport) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """What a perfect model of N(MEAN, STD^2 I) predicts: conditional expectations given x_t."""

    def model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        alpha, d_alpha, sigma, d_sigma = transport.coefficients(t, x)
        score = -(x - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2)
        noise, data = -sigma * score, MEAN - alpha * STD**2 * score
        velocity = d_alpha * data + d_sigma * noise
        return {"velocity": velocity, "noise": noise, "score": score, "data": data}[transport.prediction]

    return model


@pytest.mark.parametrize("sampler", ["euler", "heun"])
@pytest.mark.parametrize("prediction", ["velocity", "noise", "score", "data"])
@pytest.mark.parametrize("path_type", ["Linear", "GVP", "VP"])
def test_a_perfect_model_of_a_gaussian_samples_that_gaussian(path_type: str, prediction: str, sampler: str) -> None:
    count = 5_000
    transport = create_transport(path_type, prediction, time_dist_shift=2.0)
    noise = torch.randn(count, 2, 1, 1, generator=torch.Generator().manual_seed(0))
    samples = sample_ode(
        gaussian_model(transport),
        noise,
        torch.zeros(count, dtype=torch.int64),
        transport=transport,
        sampler=sampler,
        num_steps=200,
        null_label=NULL,
    )
    rows = samples.flatten(1)
    # Four standard errors; ending at t = 0.002 and 199 steps of finite size cost less than one of them.
    torch.testing.assert_close(rows.mean(0), MEAN.flatten(), rtol=0, atol=4 * STD / count**0.5)
    torch.testing.assert_close(rows.T.cov(), STD**2 * torch.eye(2), rtol=0, atol=4 * STD**2 * (2 / count) ** 0.5)


@pytest.mark.parametrize(("sampler", "order"), [("euler", 1), ("heun", 2)])
def test_the_error_falls_with_the_order_of_the_sampler(sampler: str, order: int) -> None:
    transport = create_transport(time_dist_shift=2.0)
    noise = torch.linspace(-2, 2, 6, dtype=torch.float64).view(3, 2, 1, 1)

    def sample(num_steps: int) -> Tensor:
        y = torch.zeros(3, dtype=torch.int64)
        return sample_ode(
            gaussian_model(transport),
            noise,
            y,
            transport=transport,
            sampler=sampler,
            num_steps=num_steps,
            null_label=NULL,
        )

    # The exact flow moves every point with the mean and the deviation of its marginal.
    start, end = (transport.coefficients(t) for t in transport.sampling_times(2).double())
    z = (noise - start.alpha * MEAN) / torch.sqrt((start.alpha * STD) ** 2 + start.sigma**2)
    exact = end.alpha * MEAN + torch.sqrt((end.alpha * STD) ** 2 + end.sigma**2) * z
    coarse, fine = ((sample(num_steps) - exact).abs().max() for num_steps in (41, 81))
    assert (coarse / fine).log2().item() == pytest.approx(order, abs=0.3)


class Recorder:
    """A model that remembers at which times and for which labels it was asked."""

    def __init__(self, slope: float) -> None:
        self.slope = slope
        self.calls: list[tuple[float, list[int]]] = []

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        self.calls.append((t[0].item(), y.tolist()))
        return self.slope * x + y.view(-1, 1, 1, 1)


def sample_with(model: Recorder, **settings: object) -> Tensor:
    return sample_ode(
        model,
        torch.ones(2, 1, 1, 1),
        torch.tensor([3, 4]),
        transport=create_transport(),
        num_steps=11,
        null_label=NULL,
        **settings,  # type: ignore[arg-type]
    )


def test_the_unconditional_branch_runs_only_inside_the_interval() -> None:
    model = Recorder(0.5)
    sample_with(model, guidance_scale=2.0, guidance_interval=(0.25, 0.65))
    conditional = [t for t, labels in model.calls if labels == [3, 4]]
    null = [t for t, labels in model.calls if labels == [NULL, NULL]]
    assert len(conditional) == 10
    assert null == [t for t in conditional if 0.25 <= t <= 0.65]
    assert 0 < len(null) < 10


def test_without_guidance_the_model_runs_once_a_step() -> None:
    for settings in ({}, {"guide": Recorder(0.1)}):
        model = Recorder(0.5)
        sample_with(model, **settings)
        assert len(model.calls) == 10


def test_a_guide_is_asked_on_the_same_batch_in_place_of_the_null_label() -> None:
    model, guide = Recorder(0.5), Recorder(0.1)
    sample_with(model, guidance_scale=1.5, guide=guide)
    assert guide.calls == model.calls
    assert all(labels == [3, 4] for _, labels in model.calls)


def test_guidance_extrapolates_from_the_weaker_prediction_with_closed_ends() -> None:
    x, y = torch.full((1, 1, 1, 1), 2.0), torch.tensor([3])
    strong, weak = 0.5 * 2 + 3, 0.5 * 2 + NULL
    for time, expected in ((0.25, weak + 2 * (strong - weak)), (0.5, weak + 2 * (strong - weak)), (0.51, strong)):
        output = guided(Recorder(0.5), x, torch.tensor(time), y, 2.0, (0.25, 0.5), NULL, None)
        assert output.item() == pytest.approx(expected)


def test_progress_counts_the_steps() -> None:
    seen: list[tuple[int, int]] = []
    sample_with(Recorder(0.5), progress=lambda done, total: seen.append((done, total)))
    assert seen == [(done, 10) for done in range(1, 11)]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"sampler": "rk4"}, "`sampler`"),
        ({"num_steps": 1}, "`num_steps`"),
        ({"guidance_scale": 2.0, "guidance_interval": (0.6, 0.6)}, "`guidance_interval`"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        sample_ode(
            Recorder(0.5),
            torch.ones(1, 1, 1, 1),
            torch.tensor([0]),
            transport=create_transport(),
            null_label=NULL,
            **settings,  # type: ignore[arg-type]
        )


@pytest.mark.parametrize(("num_classes", "class_dropout_prob", "says"), [(0, 0.1, "uncond"), (5, 0.0, "dropout")])
def test_a_model_without_a_null_label_is_guided_by_a_guide_alone(
    num_classes: int, class_dropout_prob: float, says: str
) -> None:
    config = DiTConfig(
        model="LightningDiT",
        in_channels=3,
        input_size=2,
        hidden_size=(16,),
        depth=(1,),
        num_heads=(2,),
        num_classes=num_classes,
        class_dropout_prob=class_dropout_prob,
    )
    model, noise, y = build_dit(config), torch.randn(2, 3, 2, 2), torch.zeros(2, dtype=torch.int64)
    settings = {"transport": create_transport(), "num_steps": 3, "null_label": num_classes, "guidance_scale": 2.0}
    with pytest.raises(ConfigError, match=says):
        sample_ode(model, noise, y, **settings)
    assert sample_ode(model, noise, y, guide=build_dit(config), **settings).shape == noise.shape
