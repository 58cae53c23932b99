"""Losses, paths, drifts, scores and shifted times of the transport."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from parity.fixture import close, read
from rae.stages.models.transport import create_transport, gvp_path, linear_path, shift_time, vp_path
from rae.store.errors import ConfigError

INPUTS = {"x1", "x0", "t", "model_output"}


def check_transport(path: Path) -> None:
    _, fixture = read(path)
    outputs = fixture.keys() - INPUTS
    assert outputs
    for key in sorted(outputs):
        check_output(fixture, *key.split("/"))


def check_output(fixture: dict[str, Tensor], what: str, *names: str) -> None:
    """One output of the fixture, by the parts of its key."""
    x1, noise, t, output = (fixture[key] for key in ("x1", "x0", "t", "model_output"))
    key = "/".join([what, *names])
    official = fixture[key]
    match what:
        case "loss":
            path_type, prediction, weight = names
            check_loss(fixture, path_type, prediction, None if weight == "None" else weight)
        case "xt" | "ut":
            close(create_transport(*names).path(x1, noise, t)[what == "ut"], official, key)
        case "score":
            close(create_transport(*names).score(output, fixture[f"xt/{names[0]}"], t), official, key)
        case "ode_drift":
            check_drift(fixture, *names)
        case "shifted_time":
            times, shift = torch.linspace(0, 1 - 1e-3, len(official)), float(names[0])
            close(shift_time(times, shift), official, key)
            close(create_transport(time_dist_shift=shift).sample_times(times / times[-1]), official, key)
        case _:
            raise AssertionError(f"unknown output {key}")


def check_loss(fixture: dict[str, Tensor], path_type: str, prediction: str, weight: str | None) -> None:
    official, t, output = fixture[f"loss/{path_type}/{prediction}/{weight}"], fixture["t"], fixture["model_output"]
    if prediction == "velocity" and weight == "likelihood":
        # The official code leaves the weight out without a word; here it stands, or is refused where it is infinite.
        if path_type != "VP":
            with pytest.raises(ConfigError, match="infinite"):
                create_transport(path_type, prediction, weight)
        weight = None
    transport = create_transport(path_type, prediction, weight)
    ours = transport.training_losses(lambda *_: output, fixture["x1"], t, t=t, noise=fixture["x0"])
    if weight is not None and prediction != "velocity":
        half, sigma = official_half_diffusion(path_type, t), transport.coefficients(t).sigma
        official_weight = (half / sigma) ** 2 if weight == "velocity" else half / sigma**2
        if weight == "velocity" and path_type != "VP":
            close(transport.weight(t), official_weight)
        ours = ours / transport.weight(t) * official_weight
    close(ours, official)


def check_drift(fixture: dict[str, Tensor], path_type: str, prediction: str) -> None:
    official, t, output = fixture[f"ode_drift/{path_type}/{prediction}"], fixture["t"], fixture["model_output"]
    transport, x = create_transport(path_type, prediction), fixture[f"xt/{path_type}"]
    ours = transport.velocity(output, x, t)
    if path_type == "VP" and prediction != "velocity":
        # The official ODE is beta / 2 (x + score): the exact one, -(sigma / alpha)^2 beta / 2 (x + score), misscaled.
        at = transport.coefficients(t, x)
        ours = -ours * (at.alpha / at.sigma) ** 2
    close(ours, official)


def official_half_diffusion(path_type: str, t: Tensor) -> Tensor:
    """What the official code puts for g^2 / 2: of the other sign on Linear and GVP, of another process on VP."""
    if path_type == "VP":
        at = vp_path(t)
        return at.d_sigma / at.sigma
    at = linear_path(t) if path_type == "Linear" else gvp_path(t)
    return -at.sigma * at.determinant / at.alpha
