"""`--profile N`: where the time of N training steps goes, as PyTorch's profiler sees it."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from rae.stages.job import Observed
from rae.stages.training.ranks import Ranks

_WARM_UP = 2  # steps that allocate, compile and choose kernels

logger = logging.getLogger("rae.train")


class Profile:
    """A trace of `steps` steps, 0 for none, once the first two are done; written when they are, or by `end`."""

    def __init__(self, steps: int, folder: Path, ranks: Ranks, device: torch.device) -> None:
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
        self._steps, self._folder, self._ranks = steps, folder, ranks
        self._profile = profile(activities=activities, record_shapes=True)
        self._warm_up, self._traced = _WARM_UP if steps else 0, range(0)
        self._running = False

    def step(self, done: int) -> None:
        """Step `done`, counted from 1, has ended."""
        if self._warm_up:
            self._warm_up -= 1
            if not self._warm_up:
                self._profile.start()
                self._running, self._traced = True, range(done + 1, done + 1)
        elif self._running:
            self._traced = range(self._traced.start, done + 1)
            if len(self._traced) == self._steps:
                self.end()

    def end(self) -> None:
        """Write what was seen, if it is not written yet."""
        if not self._running:
            return
        self._profile.stop()
        self._running = False
        if not self._traced:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        steps = f"steps-{self._traced[0]}-{self._traced[-1]}"
        path = self._folder / f"{steps}-rank{self._ranks.rank}.json.gz"
        self._profile.export_chrome_trace(str(path))
        if self._ranks.is_main:
            logger.info("a profile for https://ui.perfetto.dev: %s", path)


@contextmanager
def profiled(observed: Observed | None, ranks: Ranks, device: torch.device) -> Iterator[Profile]:
    """A profile of the training in the block, of as many steps as are asked for."""
    folder = observed.folder / "profiles" / observed.name.replace("/", "-") if observed is not None else Path()
    made = Profile(observed.profile_steps if observed is not None else 0, folder, ranks, device)
    try:
        yield made
    finally:
        made.end()
