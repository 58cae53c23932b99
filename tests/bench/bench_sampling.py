"""Sampling against the official order of operations: `python tests/bench/bench_sampling.py`.

Ours is the production `sample_ode`; the other is `official_order.py` with the same weights: both branches of guidance
on a doubled batch in every step. 50 points of the time grid, shift 6.93, guidance inside [0.1, 0.7]; autoguidance at
all times by a smaller model, without a doubled batch on either side; no guidance. The latents are shown to be equal
first, within 1e-4 of their largest number. Medians of interleaved rounds, in one process; it wants a machine that does
nothing else.
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import official_order
import torch
from bench_dit import CASES, Case, drawn_dit, matmul_peak
from rounds import interleaved, table
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from rae.stages.models.dit import DiTConfig
from rae.stages.models.samplers import sample_ode
from rae.stages.models.transport import auto_shift, create_transport

SCALE, INTERVAL, WHOLE = 1.5, (0.1, 0.7), (0.0, 1.0)
SHIFT = auto_shift(768, 16, 16)
TARGETS = {"guided": 1.5, "autoguided": 1.0, "unguided": 1.0}


def early(config: DiTConfig) -> DiTConfig:
    """A guide: the same shape of latents, a quarter of the body's blocks."""
    body, head = config.depth
    return DiTConfig(**(config.to_dict() | {"depth": (max(1, body // 4), head)}))


def samplings(case: Case, num_steps: int) -> dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor]]]:
    """By kind of guidance: the official way, and ours."""
    dit, guide = drawn_dit(case.config).eval(), drawn_dit(early(case.config)).eval()
    transport = create_transport(time_dist_shift=SHIFT)
    noise = torch.randn(case.batch_size, *case.shape, generator=torch.Generator().manual_seed(1))
    y = torch.arange(case.batch_size)
    times = transport.sampling_times(num_steps)
    kinds: dict[str, tuple[Any, ...]] = {
        "guided": (SCALE, INTERVAL, None),
        "autoguided": (SCALE, WHOLE, guide),
        "unguided": (1.0, WHOLE, None),
    }
    both = {}
    for kind, (scale, interval, weaker) in kinds.items():
        settings = {"guidance_scale": scale, "guidance_interval": interval, "guide": weaker}
        settings |= {"transport": transport, "num_steps": num_steps, "null_label": case.config.num_classes}
        official = partial(official_order.sample, dit, noise, y, times, scale, interval, weaker)
        both[kind] = official, partial(sample_ode, dit, noise, y, **settings)
    return both


def require_same(official: Tensor, ours: Tensor, kind: str) -> None:
    apart = float((official - ours).abs().max() / official.abs().max())
    assert apart < 1e-4, f"{kind}: the latents differ by {apart:.1e}"
    print(f"{kind}: latents differ by {apart:.0e} of their largest number at most", flush=True)


def flops_of(run: Callable[[], Tensor]) -> float:
    with FlopCounterMode(display=False) as counter:
        run()
    return float(counter.get_total_flops())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--num-steps", type=int, default=50)
    parser.add_argument("--only", choices=CASES)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    for case in [one for name, cases in CASES.items() if options.only in (None, name) for one in cases]:
        both = samplings(case, options.num_steps)
        for kind, (official, ours) in both.items():
            require_same(official(), ours(), f"{case.name}, {kind}")
        runs = {f"{kind} {n}": run for kind, pair in both.items() for n, run in enumerate(pair)}
        seconds = interleaved(runs, options.rounds)
        peak = matmul_peak(torch.float32)
        for kind, (_, ours) in both.items():
            slow, fast = seconds[f"{kind} 0"], seconds[f"{kind} 1"]
            share = f"{flops_of(ours) / fast / peak:.0%}"
            rows.append([case.name, kind, f"{slow:.2f}", f"{fast:.2f}", f"{slow / fast:.2f}", TARGETS[kind], share])
    header = ["model", "guidance", "official s", "ours s", "times faster", "target", "ours / matmul peak"]
    print(table(f"{options.num_steps} points of Euler, {options.threads} thread(s)", header, rows))


if __name__ == "__main__":
    main()
