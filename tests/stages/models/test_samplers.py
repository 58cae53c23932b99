"""The samplers bring noise to the data on every path, by every prediction; guidance computes only what counts."""

from collections.abc import Callable, Iterator
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from rae.stages.models import sde
from rae.stages.models.dit import DiTConfig, build_dit
from rae.stages.models.samplers import guided, sample_ode
from rae.stages.models.sde import DiffusionForm, half_diffusion, sample_sde, sde_times
from rae.stages.models.transport import PathType, Prediction, Transport, create_transport
from rae.store.errors import ConfigError

PATHS, PREDICTIONS, FORMS = get_args(PathType), get_args(Prediction), get_args(DiffusionForm)
every_transport = pytest.mark.parametrize(
    "transport",
    [create_transport(path, prediction, time_dist_shift=2.0) for path in PATHS for prediction in PREDICTIONS],
    ids=lambda transport: f"{transport.path_type}-{transport.prediction}",
)
# Data N(MEAN, COVARIANCE) in three dimensions, and standard normal noise; float64 throughout.
MEAN = torch.tensor([1.5, -0.5, 0.3], dtype=torch.float64)
FACTOR = torch.tensor([[0.8, 0, 0], [0.5, 0.4, 0], [-0.3, 0.2, 0.6]], dtype=torch.float64)
COVARIANCE = FACTOR @ FACTOR.T
EYE = torch.eye(3, dtype=torch.float64)
COUNT, STANDARD_ERRORS = 4000, 4
NULL = 10

Model = Callable[[Tensor, Tensor, Tensor], Tensor]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """More of them wait for each other longer than such small matrices take."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def gaussian_model(transport: Transport, mean: Tensor = MEAN, covariance: Tensor = COVARIANCE) -> Model:
    """What a perfect model of a Gaussian predicts: conditional expectations given x_t [B, 3, 1, 1]."""

    def model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        alpha, d_alpha, sigma, d_sigma = transport.coefficients(t[:1])
        offset = (x.flatten(1) - alpha * mean) @ torch.linalg.inv(alpha**2 * covariance + sigma**2 * EYE)
        noise, data = sigma * offset, mean + alpha * offset @ covariance
        velocity = d_alpha * data + d_sigma * noise
        return {"velocity": velocity, "noise": noise, "score": -offset, "data": data}[transport.prediction].view_as(x)

    return model


def normal(seed: int, count: int = COUNT) -> Tensor:
    return torch.randn(count, 3, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def labels(x: Tensor) -> Tensor:
    return torch.zeros(len(x), dtype=torch.int64)


def draw(transport: Transport, model: Model | None = None, **settings: Any) -> Tensor:
    """COUNT samples of the perfect model, or of another, by the ODE or (`diffusion_form` given) the SDE."""
    model, noise = model or gaussian_model(transport), normal(0)
    settings = {"transport": transport, "num_steps": 150, "null_label": NULL} | settings
    if "diffusion_form" in settings:
        return sample_sde(model, noise, labels(noise), step_noise=normal, **settings)
    return sample_ode(model, noise, labels(noise), **settings)


def assert_is_the_gaussian(samples: Tensor) -> None:
    """Mean and covariance within STANDARD_ERRORS of those of COUNT draws, in the data's own scale."""
    rows = torch.linalg.solve_triangular(FACTOR, (samples.flatten(1) - MEAN).T, upper=False)
    tolerance = STANDARD_ERRORS * torch.sqrt((1 + EYE) / len(samples))  # 2/N on the diagonal, 1/N off it
    assert bool((rows.mean(1).abs() <= STANDARD_ERRORS / len(samples) ** 0.5).all()), rows.mean(1)
    assert bool(((rows.cov() - EYE).abs() <= tolerance).all()), rows.cov()


@pytest.mark.parametrize("sampler", ["euler", "heun"])
@every_transport
def test_a_perfect_model_samples_its_gaussian_by_the_ode(transport: Transport, sampler: str) -> None:
    assert_is_the_gaussian(draw(transport, sampler=sampler))


@pytest.mark.parametrize("form", FORMS)
@every_transport
def test_a_perfect_model_samples_its_gaussian_by_every_sde(transport: Transport, form: str) -> None:
    assert_is_the_gaussian(draw(transport, diffusion_form=form, last_step_size=0.01))


@pytest.mark.parametrize("form", ["SBDM", "sigma"])
@pytest.mark.parametrize("last_step", ["Mean", "Tweedie", None])
@pytest.mark.parametrize("path_type", PATHS)
def test_every_last_step_ends_in_the_gaussian(path_type: str, last_step: str | None, form: str) -> None:
    transport = create_transport(path_type, time_dist_shift=2.0)
    assert_is_the_gaussian(draw(transport, diffusion_form=form, last_step=last_step, last_step_size=0.01))


@every_transport
def test_a_perfect_model_samples_its_gaussian_by_the_adaptive_ode(transport: Transport) -> None:
    """Six points of mean 0 and covariance 1: the flow of a Gaussian is affine, so their moments are the Gaussian's."""
    points = 3**0.5 * torch.cat([EYE, -EYE]).view(6, 3, 1, 1)
    settings = {"transport": transport, "sampler": "adaptive", "atol": 1e-8, "rtol": 1e-7, "null_label": NULL}
    samples = sample_ode(gaussian_model(transport), points, labels(points), **settings).flatten(1)
    start, end = (transport.coefficients(time) for time in transport.sampling_times(2).double())
    values, vectors = torch.linalg.eigh(COVARIANCE)
    stretch = torch.sqrt((end.alpha**2 * values + end.sigma**2) / (start.alpha**2 * values + start.sigma**2))
    flow = vectors @ torch.diag(stretch) @ vectors.T
    exact = end.alpha * MEAN + (points.flatten(1) - start.alpha * MEAN) @ flow
    torch.testing.assert_close(samples, exact, rtol=0, atol=1e-5)
    # It starts and ends a margin of 0.001, shifted, from the ends of the path.
    torch.testing.assert_close(samples.mean(0), MEAN, rtol=0, atol=0.01)
    torch.testing.assert_close(samples.T.cov(correction=0), COVARIANCE, rtol=0, atol=0.01)


@pytest.mark.parametrize("prediction", ["noise", "score"])
def test_the_official_vp_drift_misses_the_gaussian(monkeypatch: pytest.MonkeyPatch, prediction: str) -> None:
    exact = Transport.velocity

    def official(self: Transport, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
        at = self.coefficients(t, x)
        return -exact(self, output, x, t) * (at.alpha / at.sigma) ** 2

    monkeypatch.setattr(Transport, "velocity", official)
    with pytest.raises(AssertionError):
        assert_is_the_gaussian(draw(create_transport("VP", prediction, time_dist_shift=2.0)))


@pytest.mark.parametrize("path_type", ["Linear", "GVP"])
def test_the_official_sbdm_diffusion_misses_the_gaussian(monkeypatch: pytest.MonkeyPatch, path_type: str) -> None:
    """It has the other sign: as a variance it is none, and used as a diffusion all the same it samples nothing."""
    exact = half_diffusion
    transport = create_transport(path_type, time_dist_shift=2.0)
    monkeypatch.setattr(sde, "half_diffusion", lambda *given: -exact(*given))
    with pytest.raises(ValueError, match=r"nonnegative|math domain"):
        draw(transport, diffusion_form="SBDM")
    monkeypatch.setattr(sde, "sqrt", lambda value: abs(value) ** 0.5)
    with pytest.raises(AssertionError):
        assert_is_the_gaussian(draw(transport, diffusion_form="SBDM"))


@pytest.mark.parametrize("last_step", ["Mean", "Tweedie", "Euler"])
def test_a_last_step_in_unshifted_time_misses_the_gaussian(monkeypatch: pytest.MonkeyPatch, last_step: str) -> None:
    """The official steps end at the shifted 0.04, which is 0.22 for shift 6.93, and the last one begins at 0.04."""
    transport = create_transport(time_dist_shift=6.93)
    assert_is_the_gaussian(draw(transport, diffusion_form="sigma", last_step=last_step, last_step_size=0.01))
    steps = transport.sampling_times(149, end=6.93 * 0.04 / (1 + 5.93 * 0.04))
    jump = torch.tensor([0.04, 0.0])
    noisy = draw_on(monkeypatch, steps, transport, diffusion_form="sigma", last_step=None)
    model = gaussian_model(transport)
    monkeypatch.setattr(sde, "sde_times", lambda *_: jump)
    ended = sample_sde(
        model, noisy, labels(noisy), transport=transport, step_noise=normal, last_step=last_step, null_label=NULL
    )
    with pytest.raises(AssertionError):
        assert_is_the_gaussian(ended)


def draw_on(monkeypatch: pytest.MonkeyPatch, times: Tensor, transport: Transport, **settings: Any) -> Tensor:
    with monkeypatch.context() as patch:
        patch.setattr(sde, "sde_times", lambda *_: times)
        return draw(transport, **settings)


@pytest.mark.parametrize("form", FORMS)
@every_transport
def test_diffusions_are_finite_variances_on_every_grid(transport: Transport, form: str) -> None:
    for last_step in ("Euler", None):
        times = sde_times(transport, 50, last_step, 0.04)
        halves = [half_diffusion(transport, form, 1.0, time) for time in times[1:]]
        assert all(0 <= half < float("inf") for half in halves)
        assert len(times) == 50
        assert bool((times.diff() < 0).all())


def test_sbdm_is_the_diffusion_of_the_forward_process() -> None:
    """Ornstein-Uhlenbeck, dx = -beta/2 x dt + sqrt(beta) dW, on VP: beta = 0.1 + 19.9 (1 - t), run backwards there."""
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    alpha, d_alpha, sigma, d_sigma = create_transport("VP").coefficients(t)
    forward = d_sigma * sigma - d_alpha / alpha * sigma**2  # half of d sigma^2 / dt - 2 (log alpha)' sigma^2
    halves = [half_diffusion(create_transport("VP"), "SBDM", 2.0, time) / 2 for time in t]
    torch.testing.assert_close(torch.tensor(halves, dtype=torch.float64), forward)


@pytest.mark.parametrize(("sampler", "order"), [("euler", 1), ("heun", 2)])
def test_the_error_falls_with_the_order_of_the_sampler(sampler: str, order: int) -> None:
    transport, noise = create_transport(time_dist_shift=2.0), normal(0, 4)

    def sample(**settings: Any) -> Tensor:
        model = gaussian_model(transport)
        return sample_ode(model, noise, labels(noise), transport=transport, null_label=NULL, **settings)

    exact = sample(sampler="adaptive", atol=1e-10, rtol=1e-9)
    coarse, fine = ((sample(sampler=sampler, num_steps=points) - exact).abs().max() for points in (41, 81))
    assert (coarse / fine).log2().item() == pytest.approx(order, abs=0.3)


# Guidance, by every sampler

SAMPLERS = ["euler", "heun", "adaptive", "sde"]
every_sampler = pytest.mark.parametrize("sampler", SAMPLERS)


class Recorder:
    """A model that remembers at which times and for which labels it was asked."""

    def __init__(self, slope: float) -> None:
        self.slope = slope
        self.calls: list[tuple[float, list[int]]] = []

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        self.calls.append((t[0].item(), y.tolist()))
        return self.slope * x + y.view(-1, 1, 1, 1)


def sample_with(model: Model, sampler: str = "euler", count: int = 2, **settings: Any) -> Tensor:
    settings = {"transport": create_transport(), "num_steps": 11, "null_label": NULL} | settings
    noise, y = torch.ones(count, 1, 1, 1), torch.arange(3, 3 + count)
    if sampler == "sde":
        return sample_sde(model, noise, y, step_noise=lambda step: torch.zeros_like(noise), **settings)
    return sample_ode(model, noise, y, sampler=sampler, **settings)


@every_sampler
def test_the_unconditional_branch_runs_only_inside_the_interval(sampler: str) -> None:
    model = Recorder(0.5)
    sample_with(model, sampler, count=1, guidance_scale=2.0, guidance_interval=(0.25, 0.65))
    conditional = [t for t, asked in model.calls if asked == [3]]
    null = [t for t, asked in model.calls if asked == [NULL]]
    if sampler != "adaptive":
        assert len(conditional) == (20 if sampler == "heun" else 10)
    assert null == [t for t in conditional if 0.25 <= t <= 0.65]
    assert 0 < len(null) < len(conditional)
    assert all(0 < t <= 1 for t in conditional)


@every_sampler
def test_a_guide_is_asked_on_the_same_batch_in_place_of_the_null_label(sampler: str) -> None:
    model, guide = Recorder(0.5), Recorder(0.1)
    sample_with(model, sampler, guidance_scale=1.5, guide=guide)
    assert guide.calls == model.calls
    assert all(NULL not in asked for _, asked in model.calls)


@every_sampler
def test_guiding_any_prediction_is_guiding_the_velocity(sampler: str) -> None:
    """Two Gaussians, a perfect model of each: guided by one another they end at the same place by every prediction."""
    noise, ends = normal(0, 4), {}
    for prediction in PREDICTIONS:
        transport = create_transport("GVP", prediction, time_dist_shift=2.0)
        model, guide = (gaussian_model(transport, mean) for mean in (MEAN, MEAN / 2))
        settings: dict[str, Any] = {"transport": transport, "num_steps": 100, "null_label": NULL}
        settings |= {"guidance_scale": 1.5, "guide": guide, "guidance_interval": (0.1, 0.9)}
        if sampler == "sde":
            step_noise = {"step_noise": lambda step: normal(step, 4)}
            ends[prediction] = sample_sde(model, noise, labels(noise), **step_noise, **settings)
        else:
            ends[prediction] = sample_ode(model, noise, labels(noise), sampler=sampler, rtol=1e-6, **settings)
    unguided = sample_ode(gaussian_model(transport), noise, labels(noise), transport=transport, null_label=NULL)
    assert (ends["velocity"] - unguided).abs().max() > 0.2
    torch.testing.assert_close(ends["data"], ends["velocity"], rtol=0, atol=1e-5)
    torch.testing.assert_close(ends["score"], ends["noise"], rtol=0, atol=1e-5)
    # These two begin their grid a margin later.
    torch.testing.assert_close(ends["noise"], ends["velocity"], rtol=0, atol=0.05)


def test_without_guidance_the_model_runs_once_a_step() -> None:
    for sampler in ("euler", "sde"):
        model = Recorder(0.5)
        sample_with(model, sampler)
        assert len(model.calls) == 10


def test_guidance_extrapolates_from_the_weaker_prediction_with_closed_ends() -> None:
    x, y = torch.full((1, 1, 1, 1), 2.0), torch.tensor([3])
    strong, weak = 0.5 * 2 + 3, 0.5 * 2 + NULL
    for time, expected in ((0.25, weak + 2 * (strong - weak)), (0.5, weak + 2 * (strong - weak)), (0.51, strong)):
        output = guided(Recorder(0.5), x, torch.tensor(time), y, 2.0, (0.25, 0.5), NULL, None)
        assert output.item() == pytest.approx(expected)


def test_guidance_extrapolates_in_the_precision_of_the_latents() -> None:
    """1.01 and 1 are neighbours in bfloat16; what lies 1.42 of their distance from 1 is not one of its numbers."""
    x, outputs = torch.zeros(1, 1, 1, 1), iter((1.0078125, 1.0))
    output = guided(
        lambda x, t, y: torch.full_like(x, next(outputs), dtype=torch.bfloat16),
        x, torch.tensor(0.5), torch.tensor([3]), 1.42, (0.0, 1.0), NULL, None,
    )  # fmt: skip
    assert output.dtype == torch.float32
    assert output.item() == pytest.approx(1 + 1.42 * 0.0078125)


# The adaptive sampler


@pytest.mark.parametrize("guidance", [{}, {"guidance_scale": 2.0, "guidance_interval": (0.1, 0.8)}])
def test_neighbours_change_no_bit_of_an_adaptively_integrated_image(guidance: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = small_dit(5, 0.1)
    for parameter in model.parameters():  # adaLN-zero makes a fresh model answer zero
        torch.nn.init.normal_(parameter, std=0.1)
    noise, y = torch.randn(4, 3, 2, 2), torch.tensor([0, 1, 2, 3])

    def sample(rows: list[int]) -> Tensor:
        settings = {"transport": create_transport(time_dist_shift=2.0), "sampler": "adaptive", "null_label": 5}
        return sample_ode(model, noise[rows], y[rows], **settings, **guidance)

    whole = sample([0, 1, 2, 3])
    assert len(whole.flatten(1).unique(dim=0)) == 4
    for rows in ([2], [3, 2], [2, 2, 0], [1, 0, 3, 2]):
        assert torch.equal(sample(rows), whole[rows])


def test_the_adaptive_sampler_takes_the_steps_that_each_image_needs() -> None:
    """A smooth and a stiff drift beside each other: alone, the smooth one takes fewer steps, and it keeps to them."""
    asked = []

    def model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        asked.append(int(y))
        return torch.sin(40 * y * t).view(-1, 1, 1, 1) * x

    settings: dict[str, Any] = {"transport": create_transport(), "sampler": "adaptive", "null_label": NULL}
    sample_ode(model, torch.ones(2, 1, 1, 1), torch.tensor([0, 1]), **settings)
    assert 0 < 2 * asked.count(0) < asked.count(1)


def test_what_no_step_can_integrate_is_said() -> None:
    with pytest.raises(ConfigError, match="however small, meets `rtol`"):
        sample_with(lambda x, t, y: x / 0, "adaptive")


# Progress and refusals


@every_sampler
def test_progress_counts_the_steps_or_the_images(sampler: str) -> None:
    seen: list[tuple[int, int]] = []
    sample_with(Recorder(0.5), sampler, progress=lambda done, total: seen.append((done, total)))
    total = 2 if sampler == "adaptive" else 10
    assert seen == [(done, total) for done in range(1, total + 1)]


def test_every_step_but_the_last_asks_for_its_noise_once() -> None:
    for last_step, expected in (("Euler", list(range(1, 10))), (None, list(range(1, 11)))):
        steps: list[int] = []

        def noise(step: int, steps: list[int] = steps) -> Tensor:
            steps.append(step)
            return torch.zeros(1, 1, 1, 1)

        sample_sde(
            Recorder(0.5), torch.ones(1, 1, 1, 1), torch.tensor([3]),
            transport=create_transport(), step_noise=noise, num_steps=11, last_step=last_step, null_label=NULL,
        )  # fmt: skip
        assert steps == expected


@pytest.mark.parametrize(
    ("sampler", "settings", "says"),
    [
        ("rk4", {}, "`sampler`"),
        ("euler", {"num_steps": 1}, "`num_steps`"),
        ("euler", {"guidance_scale": 2.0, "guidance_interval": (0.6, 0.6)}, "`guidance_interval`"),
        ("euler", {"guide": Recorder(0.1)}, "no effect"),
        ("sde", {"guide": Recorder(0.1)}, "no effect"),
        ("sde", {"num_steps": 2}, "`num_steps`"),
        ("sde", {"diffusion_form": "cubic"}, "`diffusion_form`"),
        ("sde", {"diffusion_norm": -1.0}, "to be a variance"),
        ("sde", {"last_step": "mean"}, "`last_step`"),
        ("sde", {"last_step_size": 1.0}, "the first time, 1.0000"),
        ("sde", {"last_step_size": 0.0}, "`last_step_size`"),
    ],
)
def test_settings_that_make_no_sense_are_refused(sampler: str, settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        sample_with(Recorder(0.5), sampler, **settings)


def small_dit(num_classes: int, class_dropout_prob: float) -> torch.nn.Module:
    sizes: dict[str, Any] = {"in_channels": 3, "input_size": 2, "hidden_size": (16,), "depth": (1,), "num_heads": (2,)}
    return build_dit(
        DiTConfig(model="LightningDiT", num_classes=num_classes, class_dropout_prob=class_dropout_prob, **sizes)
    )


@pytest.mark.parametrize(("num_classes", "class_dropout_prob", "says"), [(0, 0.1, "uncond"), (5, 0.0, "dropout")])
@every_sampler
def test_a_model_without_a_null_label_is_guided_by_a_guide_alone(
    sampler: str, num_classes: int, class_dropout_prob: float, says: str
) -> None:
    model, guide = (small_dit(num_classes, class_dropout_prob) for _ in range(2))
    noise, y = torch.randn(2, 3, 2, 2), torch.zeros(2, dtype=torch.int64)
    settings: dict[str, Any] = {"transport": create_transport(), "null_label": num_classes, "guidance_scale": 2.0}

    def sample(**more: Any) -> Tensor:
        if sampler == "sde":
            return sample_sde(model, noise, y, step_noise=lambda step: noise, num_steps=3, **settings, **more)
        return sample_ode(model, noise, y, sampler=sampler, num_steps=3, **settings, **more)

    with pytest.raises(ConfigError, match=says):
        sample()
    assert sample(guide=guide).shape == noise.shape
