"""DiT-DH and LightningDiT: forward pass, guidance and ODE samples."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from parity.fixture import below, close, read
from rae.stages.models.dit import DiTConfig, DiTDH, LightningDiT, build_dit
from rae.stages.models.samplers import guided, sample_ode
from rae.stages.models.transport import create_transport

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
OFFICIAL_SOLVERS = {"heun2": "heun"}  # torchdiffeq's name -> ours, where they differ
ALWAYS = (float("-inf"), float("inf"))


def config_from_official(text: str) -> DiTConfig:
    """DiT-DH where `hidden_size` is a pair, else LightningDiT; a single number of a pair is body's and head's."""
    official = json.loads(text)
    for key, value in FIXED.items():
        assert official.pop(key, value) == value, f"{key} is not {value}"
    paired = isinstance(official["hidden_size"], list)
    for key in ("hidden_size", "depth", "num_heads"):
        official[key] = official[key] if isinstance(official[key], list) else [official[key]] * (1 + paired)
    if isinstance(official["patch_size"], list):
        (official["patch_size"],) = set(official["patch_size"])  # officially other pairs than [1, 1] crash
    return DiTConfig.from_dict({"model": "DiT-DH" if paired else "LightningDiT", **official})


def check_dit(path: Path) -> None:
    about, tensors = read(path)
    config, weights, io = config_from_official(about["config"]), below(tensors, "weight/"), below(tensors, "io/")
    model, guide = build_dit(config).eval(), build_dit(config).eval()
    constant = [key for key in weights if "pos_embed" in key or "rope" in key]
    for key in constant:
        close(model.state_dict()[key], weights[key], key)
    model.load_state_dict(weights)
    weaker = guide_factor(about)
    guide.load_state_dict({key: value * (1 if key in constant else weaker) for key, value in weights.items()})

    case = Case(model, guide, float(about.get("time_dist_shift", 1)), *(io.pop(name) for name in ("x", "t", "y", "z")))
    assert "forward" in io
    with torch.no_grad():
        for name, official in io.items():
            close(case.output(name), official, name)


def guide_factor(about: Mapping[str, str]) -> float:
    """The autoguidance model's weights over the model's, as the fixture's note says ("... multiplied by 0.7")."""
    stated = re.search(r"multiplied by ([\d.]+)", about.get("guide", ""))
    return float(stated[1]) if stated else 1.0


@dataclass(frozen=True)
class Case:
    """A model, a weaker one to guide it, and inputs: for the models x, t, y, for samplers the noise z."""

    model: DiTDH | LightningDiT
    guide: DiTDH | LightningDiT
    shift: float
    x: Tensor
    t: Tensor
    y: Tensor
    z: Tensor

    def output(self, name: str) -> Tensor:
        """Our numbers for an output by the fixture's name for it."""
        match name.split("_"):
            case ["forward"]:
                return self.model(self.x, self.t, self.y)
            case ["cfg" | "autoguidance" as kind, scale, *where]:
                guide = self.guide if kind == "autoguidance" else None
                return self.guided(float(scale), interval(where), guide)
            case ["ode", solver, points]:
                return self.sample(OFFICIAL_SOLVERS.get(solver, solver), int(points))
        raise AssertionError(f"unknown output {name}")

    def guided(self, scale: float, interval: tuple[float, float], guide: DiTDH | LightningDiT | None) -> Tensor:
        if isinstance(self.model, LightningDiT) and interval != ALWAYS:
            # Its official interval is where it does not guide, half open, and the first sample's time decides for all.
            scale = 1.0 if interval[0] <= self.t[0] < interval[1] else scale
            interval = ALWAYS
        null = self.model.config.num_classes
        rows = zip(self.x.split(1), self.t, self.y.split(1), strict=True)
        return torch.cat([guided(self.model, *row, scale, interval, null, guide) for row in rows])

    def sample(self, sampler: str, num_steps: int) -> Tensor:
        null = self.model.config.num_classes
        labels = self.y.clamp(max=null - 1)  # fixtures draw their samples of classes alone
        transport = create_transport(time_dist_shift=self.shift)
        settings = {"transport": transport, "sampler": sampler, "num_steps": num_steps, "null_label": null}
        return sample_ode(self.model, self.z, labels, **settings)


def interval(where: list[str]) -> tuple[float, float]:
    """Times at which a fixture's output is guided: `all`, or `interval`, least, greatest."""
    match where:
        case ["all"]:
            return ALWAYS
        case ["interval", low, high]:
            return float(low), float(high)
    raise AssertionError(f"unknown times {where}")
