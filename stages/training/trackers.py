"""TensorBoard, wandb and trackio: who else is told a training's numbers, images and settings.

None of them is a dependency, and none can end a training: one that fails on the way is left out of the rest. They are
told the recipe, which has no paths and no credentials, and neither the environment nor the command line.
"""

import json
import logging
import os
import secrets
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from importlib.util import find_spec
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from rae.stages.job import Job, Observed
from rae.store.errors import ConfigError, MissingInput
from rae.store.publish import replace_bytes

_RUN_FILE = "tracked.json"

logger = logging.getLogger("rae.train")


class Tracker(Protocol):
    """One of them, in the middle of a run."""

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers of a step, by name."""

    def image(self, step: int, name: str, image: NDArray[np.uint8]) -> None:
        """An image, uint8 [H, W, 3]."""

    def close(self) -> None:
        """Write what is not yet written."""


class Trackers:
    """All of a run's trackers, one of which may fail without the others."""

    def __init__(self, trackers: Mapping[str, Tracker]) -> None:
        self._trackers = dict(trackers)

    def __bool__(self) -> bool:
        return bool(self._trackers)

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        """Tell numbers of a step."""
        self._each(lambda tracker: tracker.numbers(step, values))

    def images(self, step: int, name: str, images: NDArray[np.uint8]) -> None:
        """Show images, uint8 [N, S, S, 3], as one: eight in a row."""
        import torch
        from torchvision.utils import make_grid

        sheet = make_grid(torch.from_numpy(images).permute(0, 3, 1, 2), nrow=8).permute(1, 2, 0).numpy()
        self._each(lambda tracker: tracker.image(step, name, sheet))

    def close(self) -> None:
        """Have all write what is not yet written."""
        self._each(lambda tracker: tracker.close())

    def _each(self, tell: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                with redirect_stdout(sys.stderr):  # stdout is what `--json` has it say
                    tell(tracker)
            except Exception as error:  # whatever a library or its network comes up with
                logger.warning("%s gets nothing more of this training: %s", name, error)
                del self._trackers[name]


def check_installed(names: Sequence[str]) -> None:
    """Raise `MissingInput` for the first tracker whose package is not there."""
    for name in names:
        if find_spec(name) is None:
            raise MissingInput(f"`trackers` has {name}, which is not installed", f'pip install "rae-pipeline[{name}]"')


def begin_trackers(names: Sequence[str], job: Job, step: int) -> Trackers:
    """The trackers named, told that this job's training goes on after `step` steps.

    Attempts at the same work are one run. Raises `MissingInput` for a package that is not installed, `ConfigError` if
    a tracker can't begin.
    """
    check_installed(names)
    if not names or job.observed is None:
        return Trackers({})
    run, begun = _run_id(job), dict[str, Tracker]()
    for name in names:
        try:
            with redirect_stdout(sys.stderr):
                begun[name] = _KINDS[name](job.observed, run, step)
        except Exception as error:
            Trackers(begun).close()
            offline = "; WANDB_MODE=offline needs no account" if name == "wandb" else ""
            raise ConfigError(f"{name} can't begin: {error}{offline}") from error
    return Trackers(begun)


def _run_id(job: Job) -> str:
    """Drawn once for all attempts at this work."""
    for folder in (job.folder, *job.earlier):
        if (folder / _RUN_FILE).is_file():
            run = json.loads((folder / _RUN_FILE).read_bytes())["run"]
            break
    else:
        run = secrets.token_hex(4)
    job.folder.mkdir(parents=True, exist_ok=True)
    replace_bytes(job.folder / _RUN_FILE, json.dumps({"run": run}).encode())
    return str(run)


class _TensorBoard:
    def __init__(self, observed: Observed, run: str, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = observed.folder / "tensorboard" / f"{observed.name.replace('/', '-')}-{run}"
        # What an attempt wrote beyond its checkpoint is written again.
        self._writer: Any = SummaryWriter(str(folder), purge_step=step + 1)
        if step == 0:
            self._writer.add_text("settings", f"```\n{json.dumps(observed.settings, indent=1)}\n```", 0)

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def image(self, step: int, name: str, image: NDArray[np.uint8]) -> None:
        self._writer.add_image(name, image, step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, observed: Observed, run: str, step: int) -> None:
        import wandb

        self._image = wandb.Image
        observed.folder.mkdir(parents=True, exist_ok=True)
        # Without the command line, the environment, the code and what is printed.
        quiet = wandb.Settings(console="off", disable_git=True, disable_code=True, x_disable_meta=True)
        project = os.environ.get("WANDB_PROJECT", "rae")
        about: dict[str, Any] = {"name": observed.name, "config": observed.settings, "dir": str(observed.folder)}
        # Its service is a process of its own, which a batch system's SIGUSR1 for all of a job's would end.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
        try:
            self._run = wandb.init(project=project, id=run, resume="allow", settings=quiet, **about)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def image(self, step: int, name: str, image: NDArray[np.uint8]) -> None:
        self._run.log({name: self._image(image)}, step=step)

    def close(self) -> None:
        self._run.finish()


class _Trackio:
    def __init__(self, observed: Observed, run: str, step: int) -> None:
        import trackio

        self._image = trackio.Image
        name = f"{observed.name.replace('/', '-')}-{run}"
        project = os.environ.get("TRACKIO_PROJECT", "rae")
        self._run: Any = trackio.init(project, name=name, config=observed.settings, resume="allow", embed=False)

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def image(self, step: int, name: str, image: NDArray[np.uint8]) -> None:
        self._run.log({name: self._image(image)}, step=step)

    def close(self) -> None:
        self._run.finish()


_KINDS: dict[str, Callable[[Observed, str, int], Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": _Wandb,
    "trackio": _Trackio,
}
