"""A training step of DiT-DH against the official order of operations: `python tests/bench/bench_dit.py`.

Ours is the production `Learner` with the draws of `rae train-dit`; the other is `official_order.py` with the same
weights. Both draw times, noise and dropped labels, go forwards and backwards, clip, take a step of AdamW and move the
EMA. First they are shown to compute the same: losses and weights after three steps on the same draws. Medians of
interleaved rounds, in one process; a float32 product of large matrices on the same threads is the measured peak. It
wants a machine that does nothing else. `--seeds 3` instead trains small models for 200 steps, in float32 and in bf16,
and says whether bf16's losses lie within the noise of the seed.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from official_order import BETAS, CLIP, DECAY, LR, OfficialTraining
from rounds import interleaved, table
from torch import Tensor, nn

from rae.stages.models.dit import DiTConfig, DiTDH
from rae.stages.models.sizes import DIT_SIZES
from rae.stages.models.transport import auto_shift, create_transport
from rae.stages.training.learner import Learner
from rae.stages.training.randomness import normal, uniform
from rae.stages.training.ranks import Ranks
from rae.stages.training.sections import TrainDitSection

NUM_CLASSES = 1000
TARGETS = {"S, float32": 1.0, "small, float32": 1.2, "bf16 against bf16": 1.05, "bf16 against float32": 2.0}


@dataclass(frozen=True)
class Case:
    name: str
    config: DiTConfig
    batch_size: int
    target: str

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.config.in_channels, self.config.input_size, self.config.input_size


def case(name: str, channels: int, grid: int, sizes: dict[str, tuple[int, ...]], batch_size: int, target: str) -> Case:
    sizes = {key: tuple(value) for key, value in sizes.items()}
    config = DiTConfig(model="DiT-DH", in_channels=channels, input_size=grid, num_classes=NUM_CLASSES, **sizes)
    return Case(f"{name}, {grid * grid} tokens, batch {batch_size}", config, batch_size, target)


SMALL = {"hidden_size": (128, 256), "depth": (4, 2), "num_heads": (4, 4)}
CASES = {
    "s": [case("DiTDH-S", 768, 16, DIT_SIZES["DiT-DH"]["S"], 4, "S, float32")],
    "small": [case("128 + 256", 112, grid, SMALL, size, "small, float32") for size in (4, 32) for grid in (4, 8)],
}


@dataclass(frozen=True)
class Batch:
    x: Tensor
    y: Tensor
    t: Tensor
    noise: Tensor
    keys: tuple[str, ...] = ()


class OurTraining:
    """The production step, with the draws that `rae train-dit` makes for a batch."""

    def __init__(self, dit: DiTDH, shift: float, bf16: bool = False) -> None:
        self.transport = create_transport(time_dist_type="logit-normal", time_dist_shift=shift)
        section = TrainDitSection(
            **{key: getattr(dit.config, key) for key in ("hidden_size", "depth", "num_heads")},
            **{"steps": 10**6, "lr": LR, "betas": BETAS, "clip_grad": CLIP, "ema_decay": DECAY},
            precision="bf16" if bf16 else "float32",
        )
        self.learner = Learner(dit, self.loss, section, rows=10**9, ranks=Ranks(), device=torch.device("cpu"))
        self.steps, self.null_label, self.section = 0, dit.config.num_classes, section

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return self.transport.training_losses(model, batch.x, batch.y, t=batch.t, noise=batch.noise).mean(), {}

    def draw(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Labels with some dropped, times, noise."""
        rows = self.steps * len(x) + np.arange(len(x))
        dropped = uniform(0, "label_dropout", 0, rows) < self.section.class_dropout_prob
        t = self.transport.sample_times(uniform(0, "time", 0, rows))
        return torch.where(dropped, self.null_label, y), t, normal(x.shape[1:], 0, "noise", 0, rows)

    def step(self, x: Tensor, y: Tensor, t: Tensor, noise: Tensor) -> float:
        """One step; returns the loss."""
        self.steps += 1
        return float(self.learner.step(Batch(x, y, t, noise), self.steps)["loss"])


def drawn_dit(config: DiTConfig) -> DiTDH:
    """A transformer whose every layer matters: the initial one's blocks are the identity, and its output is zero."""
    torch.manual_seed(0)
    dit = DiTDH(config)
    with torch.no_grad():
        for parameter in dit.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return dit


def data(case: Case) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(case.batch_size, *case.shape, generator=generator)
    return x, torch.randint(NUM_CLASSES, (case.batch_size,), generator=generator)


def require_same(case: Case) -> str:
    """Three steps of both in float32 on the same draws; returns how far they differ, and raises above 1e-4."""
    dit, shift = drawn_dit(case.config), auto_shift(*case.shape)
    official = OfficialTraining(dit, shift)
    ours = OurTraining(dit, shift)
    x, y = data(case)
    losses = []
    for _ in range(3):
        y, t, noise = ours.draw(x, y)
        losses.append((official.step(x, y, t, noise), ours.step(x, y, t, noise)))
    apart = max(abs(one - other) / abs(one) for one, other in losses)
    pairs = zip(official.ema.parameters(), ours.learner.ema.model.parameters(), strict=True)
    weights = max(float((one - other).abs().max()) for one, other in pairs)
    assert max(apart, weights) < 1e-4, f"{case.name}: losses differ by {apart:.1e}, EMA weights by {weights:.1e}"
    return f"{case.name}: losses differ by {apart:.0e} of themselves at most, EMA weights by {weights:.0e}"


def steps_of(case: Case, names: list[str]) -> dict[str, Callable[[], object]]:
    """A whole step of each training, draws included."""
    x, y = data(case)
    cases: dict[str, Callable[[], object]] = {}
    for name in names:
        kind = OfficialTraining if name.startswith("official") else OurTraining
        training = kind(drawn_dit(case.config), auto_shift(*case.shape), bf16=name.endswith("bf16"))

        def step(training: OfficialTraining | OurTraining = training) -> None:
            labels, t, noise = training.draw(x, y)
            training.step(x, labels, t, noise)

        cases[name] = step
    return cases


def step_flops(case: Case) -> float:
    """Arithmetic of the matrix products of a step: forward, and twice that backward."""
    from torch.utils.flop_counter import FlopCounterMode

    dit = DiTDH(case.config)
    x, y = data(case)
    with FlopCounterMode(display=False) as counter:
        dit(x, torch.rand(len(x)), y).sum().backward()
    return float(counter.get_total_flops())


def matmul_peak(dtype: torch.dtype, side: int = 2048) -> float:
    """FLOP/s of a product of large square matrices: the best of ten."""
    left, right = (torch.randn(side, side).to(dtype) for _ in range(2))
    fastest = float("inf")
    for _ in range(10):
        began = time.perf_counter()
        left @ right
        fastest = min(fastest, time.perf_counter() - began)
    return 2 * side**3 / fastest


def has_bf16() -> bool:
    """Whether this processor multiplies in bfloat16."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def measured(case: Case, rounds: int) -> list[list[str]]:
    """Rows: comparison, official ms, ours ms, times faster, target, share of the peak of ours."""
    names = ["official float32", "ours float32"] + (["official bf16", "ours bf16"] if has_bf16() else [])
    seconds = interleaved(steps_of(case, names), rounds)
    flops = step_flops(case)
    comparisons = [("float32", case.target, "official float32", "ours float32")]
    if has_bf16():
        comparisons.append(("bf16", "bf16 against bf16", "official bf16", "ours bf16"))
        comparisons.append(("bf16 against float32", "bf16 against float32", "official float32", "ours bf16"))
    rows = []
    for name, target, official, ours in comparisons:
        peak = matmul_peak(torch.bfloat16 if ours.endswith("bf16") else torch.float32)
        share = f"{flops / seconds[ours] / peak:.0%}"
        ratio = f"{seconds[official] / seconds[ours]:.2f}"
        times = [f"{1e3 * seconds[one]:.1f}" for one in (official, ours)]
        rows.append([case.name, name, *times, ratio, f"{TARGETS[target]}", share])
    return rows


def losses_of(case: Case, bf16: bool, seed: int, steps: int) -> list[float]:
    """Losses of a run on the same latents, those of a mixture of ten directions; `seed` draws weights and batches."""
    torch.manual_seed(seed)
    training = OurTraining(DiTDH(case.config), auto_shift(*case.shape), bf16)
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(10, *case.shape, generator=generator)
    losses = []
    for _ in range(steps):
        y = torch.randint(10, (case.batch_size,))
        x = 0.9 * centres[y] + 0.436 * torch.randn(case.batch_size, *case.shape)
        _, t, _ = training.draw(x, y)
        losses.append(training.step(x, y, t, torch.randn_like(x)))
    return losses


def curves(seeds: int, steps: int) -> str:
    """Mean losses over the quarters of runs, and whether precision matters less than the seed."""
    case = CASES["small"][2]

    def quarters(bf16: bool, seed: int) -> list[float]:
        losses = np.array(losses_of(case, bf16, seed, steps))
        return [float(quarter.mean()) for quarter in np.array_split(losses, 4)]

    names = {False: "float32", True: "bf16"}
    runs = {name: np.array([quarters(bf16, seed) for seed in range(seeds)]) for bf16, name in names.items()}
    rows = [
        [f"{name}, seed {seed}", *(f"{loss:.4f}" for loss in values)]
        for name, means in runs.items()
        for seed, values in enumerate(means)
    ]
    spread = runs["float32"].max(axis=0) - runs["float32"].min(axis=0)
    worst = float((abs(runs["bf16"].mean(axis=0) - runs["float32"].mean(axis=0)) / spread).max())
    within = "within" if worst <= 1 else "OUTSIDE"
    verdict = f"bf16's mean loss lies {within} float32's seed noise: at most {worst:.2f} of its spread away"
    header = ["run", "first quarter", "second", "third", "last"]
    return f"{table(f'Losses of {steps} steps, {case.name}', header, rows)}\n\n{verdict}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", choices=CASES)
    parser.add_argument("--seeds", type=int, default=0, help="compare loss curves with so many seeds instead")
    parser.add_argument("--steps", type=int, default=200, help="of each loss curve")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.seeds:
        print(curves(options.seeds, options.steps))
        return
    if not has_bf16():
        print("NO BF16 COMPARISON: this processor has no bfloat16 arithmetic")
    rows = []
    for case in [one for name, cases in CASES.items() if options.only in (None, name) for one in cases]:
        print(require_same(case), flush=True)
        rows += measured(case, options.rounds)
    header = ["model", "precision", "official ms", "ours ms", "times faster", "target", "ours / matmul peak"]
    print(table(f"A training step, {options.threads} thread(s)", header, rows))


if __name__ == "__main__":
    main()
