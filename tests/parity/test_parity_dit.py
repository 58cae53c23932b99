"""The transformers, the transport and twenty training steps give the official release's numbers.

Fixtures are outputs of `bytetriper/RAE` (commit a4d18c4) on CPU in float32. `RAE_PARITY_DIR` names another folder of
them; each file is checked by the function for its metadata's `kind`, else for its name.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from rae.stages.models.dit import DiTConfig, build_dit
from rae.stages.models.samplers import guided, sample_ode
from rae.stages.models.transport import create_transport, gvp_path, linear_path, shift_time, vp_path
from rae.store.errors import ConfigError

FOLDER = Path(os.environ.get("RAE_PARITY_DIR", Path(__file__).parent))
TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}
# Keys of the official configuration that are no choice here, with the only value that the release uses.
FIXED = {
    "use_swiglu": True,
    "use_rope": True,
    "use_rmsnorm": True,
    "use_pos_embed": True,
    "use_gembed": True,
    "wo_shift": False,
    "learn_sigma": False,
}
CONSTANT = ("pos_embed", "rope")


def close(ours: Tensor, official: Tensor) -> None:
    torch.testing.assert_close(ours, official, **TOLERANCE)


def read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    with safe_open(path, "pt") as file:
        return file.metadata() or {}, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def config_from_official(text: str) -> DiTConfig:
    official = json.loads(text)
    for key, value in FIXED.items():
        assert official.pop(key, value) == value
    paired = isinstance(official["hidden_size"], list)
    for key in ("hidden_size", "depth", "num_heads"):
        official[key] = official[key] if isinstance(official[key], list) else [official[key]] * (1 + paired)
    return DiTConfig.from_dict({"model": "DiT-DH" if paired else "LightningDiT", **official})


def check_dit(path: Path) -> None:
    metadata, tensors = read(path)
    weights, io = below(tensors, "weight/"), below(tensors, "io/")
    config = config_from_official(metadata["config"])
    model, guide = build_dit(config), build_dit(config)
    fresh = model.state_dict()
    model.load_state_dict(weights)
    guide.load_state_dict({k: v if any(c in k for c in CONSTANT) else 0.7 * v for k, v in weights.items()})
    for key, table in fresh.items():
        if any(constant in key for constant in CONSTANT):
            torch.testing.assert_close(table, weights[key], atol=1e-6, rtol=0)

    transport = create_transport(time_dist_shift=float(metadata["time_dist_shift"]))
    x, t, y, z = io.pop("x"), io.pop("t"), io.pop("y"), io.pop("z")

    def compute(name: str) -> Tensor:
        """An output by the fixture's name for it: forward, cfg_SCALE_interval_LOW_HIGH, ode_SOLVER_POINTS, ..."""
        null = config.num_classes
        match name.split("_"):
            case ["forward"]:
                return model(x, t, y)
            case ["cfg", scale, "interval", low, high]:
                return by_row(float(scale), (float(low), float(high)), None)
            case ["autoguidance", scale, "all"]:
                return by_row(float(scale), (0.0, 1.0), guide)
            case ["ode", solver, points]:
                return sample_ode(
                    model,
                    z,
                    y.clamp(max=null - 1),  # the fixture draws its samples of classes alone
                    transport=transport,
                    sampler={"heun2": "heun"}.get(solver, solver),
                    num_steps=int(points),
                    null_label=null,
                )
        raise AssertionError(f"unknown output {name} in {path.name}")

    def by_row(scale: float, interval: tuple[float, float], guide: torch.nn.Module | None) -> Tensor:
        rows, null = zip(x.split(1), t, y.split(1), strict=True), config.num_classes
        return torch.cat([guided(model, *row, scale, interval, null, guide) for row in rows])

    assert "forward" in io
    for mode in (model.train, model.eval):
        mode()
        with torch.no_grad():
            for name, official in io.items():
                close(compute(name), official)


def check_dit_training(path: Path) -> None:
    metadata, tensors = read(path)
    io, training = below(tensors, "io/"), json.loads(metadata["training"])
    model, ema = (build_dit(config_from_official(metadata["config"])) for _ in range(2))
    model.load_state_dict(below(tensors, "init/"))
    ema.load_state_dict(below(tensors, "init/"))
    transport, decay = create_transport(), float(metadata["ema_decay"])
    optimizer = torch.optim.AdamW(model.parameters(), **training["optimizer"])
    for step, (x, y, t, noise) in enumerate(zip(io["x"], io["y"], io["t"], io["noise"], strict=True)):
        optimizer.param_groups[0]["lr"] = io["lrs"][step].item()
        loss = transport.training_losses(model, x, y, t=t, noise=noise).mean()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), float(metadata["clip_grad"]))
        optimizer.step()
        with torch.no_grad():
            for ours, new in zip(ema.parameters(), model.parameters(), strict=True):
                ours.lerp_(new, 1 - decay)
        close(loss, io["losses"][step])
        close(norm, io["grad_norms"][step])
    for trained, prefix in ((model, "final/"), (ema, "ema/")):
        for key, weight in trained.state_dict().items():
            official, start = tensors[prefix + key], tensors["init/" + key]
            assert (weight - official).norm() <= 1e-3 * (official - start).norm() + 1e-6, key


def official_half_diffusion(path_type: str, t: Tensor) -> Tensor:
    """What the official code puts for g^2 / 2: of the other sign on Linear and GVP, of another process on VP."""
    if path_type == "VP":
        at = vp_path(t)
        return at.d_sigma / at.sigma
    at = linear_path(t) if path_type == "Linear" else gvp_path(t)
    return -at.sigma * at.determinant / at.alpha


def check_transport(path: Path) -> None:
    _, fixture = read(path)
    x1, noise, t, output = (fixture[key] for key in ("x1", "x0", "t", "model_output"))
    for key, official in fixture.items():
        what, *names = key.split("/")
        if what == "loss":
            path_type, prediction, weight = names
            check_loss(fixture, path_type, prediction, None if weight == "None" else weight)
        elif what in ("xt", "ut"):
            transport = create_transport(names[0])
            close(transport.path(x1, noise, t)[what == "ut"], official)
        elif what == "score":
            close(create_transport(*names).score(output, fixture[f"xt/{names[0]}"], t), official)
        elif what == "ode_drift":
            check_drift(fixture, *names)
        elif what == "shifted_time":
            times = torch.linspace(0, 1 - 1e-3, 11)
            close(shift_time(times, float(names[0])), official)
            close(create_transport(time_dist_shift=float(names[0])).sample_times(times / times[-1]), official)


def check_loss(fixture: dict[str, Tensor], path_type: str, prediction: str, weight: str | None) -> None:
    official, t, output = fixture[f"loss/{path_type}/{prediction}/{weight}"], fixture["t"], fixture["model_output"]
    if prediction == "velocity" and weight == "likelihood":
        # The official code leaves the weight out without a word; here it stands, or is refused where it is infinite.
        if path_type != "VP":
            with pytest.raises(ConfigError, match="infinite"):
                create_transport(path_type, prediction, weight)
            return
        official = official * create_transport(path_type, prediction, weight).weight(t)
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


def check_state_dicts(path: Path) -> None:
    sizes = {"DiTDH-S": ((384, 2048), (12, 2), (6, 16)), "DiTDH-XL": ((1152, 2048), (28, 2), (16, 16))}
    for name, official in json.loads(path.read_text()).items():
        if name not in sizes:
            continue
        hidden_size, depth, num_heads = sizes[name]
        config = DiTConfig(
            model="DiT-DH",
            in_channels=768,
            input_size=16,
            hidden_size=hidden_size,
            depth=depth,
            num_heads=num_heads,
            num_classes=1000,
        )
        with torch.device("meta"):
            state = build_dit(config).state_dict()
        assert {key: list(value.shape) for key, value in state.items()} == official


CHECKS: dict[str, Callable[[Path], None]] = {
    "DiTwDDTHead": check_dit,
    "LightningDiT": check_dit,
    "dit_training": check_dit_training,
    "transport": check_transport,
    "official_state_dicts": check_state_dicts,
}


def kind(path: Path) -> str:
    return path.stem if path.suffix == ".json" else read(path)[0].get("kind", path.stem)


FILES = [path for path in sorted(FOLDER.iterdir()) if path.suffix in (".safetensors", ".json") and kind(path) in CHECKS]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_equals_the_official_release(path: Path) -> None:
    CHECKS[kind(path)](path)
