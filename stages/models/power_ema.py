"""Averages of a training's weights, their length chosen after it: power-function EMA of EDM2, section 3.

Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion Models" (2024). The average at step t gives
the weights of step s a share proportional to s^g, g > 0. `sigma_rel`, the standard deviation of that share as a part of
the training's length, says which: the paper's 0.05 and 0.10 are g = 16.97 and 6.94. A training tracks two or more of
them and keeps snapshots; any other is the combination of snapshots whose share comes nearest to it.

PAYLOAD/ema_snapshots/step-00010000-sigma_rel-0.05.safetensors
"""

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from rae.stages.models.saving import read_tensors, save_weights
from rae.store.errors import CorruptData, MissingInput

FOLDER = "ema_snapshots"
_NAME = re.compile(r"step-(\d{8,})-sigma_rel-([0-9.e-]+)\.safetensors")


def exponent(sigma_rel: float) -> float:
    """The g of a length in (0, 12^-0.5): sigma_rel^2 = (g + 1) / ((g + 2)^2 (g + 3)), solved for g.

    The root g >= 0 of g^3 + 7 g^2 + (16 - u) g + 12 - u, u = sigma_rel^-2.
    """
    inverse = sigma_rel**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


def decay(step: int, g: float) -> float:
    """What the average keeps of itself at step `step`, from 1: (1 - 1/step)^(g + 1)."""
    return float((1 - 1 / step) ** (g + 1))


def snapshot_path(payload: Path, step: int, sigma_rel: float) -> Path:
    """The file of the average of one length at a step."""
    return payload / FOLDER / f"step-{step:08d}-sigma_rel-{sigma_rel:g}.safetensors"


def find_snapshots(payload: Path) -> dict[Path, tuple[int, float]]:
    """Every snapshot's (step, sigma_rel), in the order of their names."""
    found = {path: _NAME.fullmatch(path.name) for path in sorted((payload / FOLDER).glob("*"))}
    return {path: (int(name[1]), float(name[2])) for path, name in found.items() if name is not None}


def combine(
    steps: NDArray[np.integer], sigma_rels: NDArray[np.floating], step: int, sigma_rel: float
) -> NDArray[np.float64]:
    """The factors [N] of snapshots [N] whose sum is nearest to the average of length `sigma_rel` at `step`.

    Least squares between shares as functions of time (appendix C): the inner product of two that end at s and t is
    (g + 1) (h + 1) / (g + h + 1) (s/t)^h / t where s <= t, h being the exponent of the one that ends at t.
    """
    ends, powers = (
        np.append(steps, step).astype(float),
        np.append([exponent(of) for of in sigma_rels], exponent(sigma_rel)),
    )
    first, last = np.minimum.outer(ends, ends), np.maximum.outer(ends, ends)
    later = np.where(ends[:, None] >= ends[None, :], powers[:, None], powers[None, :])
    products = np.multiply.outer(powers + 1, powers + 1) / (np.add.outer(powers, powers) + 1)
    products *= (first / last) ** later / last
    # In units of each one's own norm, so that early snapshots weigh as much in rounding as late ones.
    norms = np.sqrt(np.diag(products))
    scaled = products / np.multiply.outer(norms, norms)
    factors, *_ = np.linalg.lstsq(scaled[:-1, :-1], scaled[:-1, -1], rcond=1e-14)
    return np.asarray(factors * norms[-1] / norms[:-1])


def reconstruct(payload: Path, sigma_rel: float) -> dict[str, Tensor]:
    """The average of length `sigma_rel` at the last snapshot's step: tensors of trained parameters, by name.

    Raises `MissingInput` where no snapshots are, `CorruptData` if they are not of one model.
    """
    found = find_snapshots(payload)
    if not found:
        raise MissingInput(
            f"{payload} keeps no snapshots of averages: `sample.ema_sigma_rel` needs a transformer that was trained"
            " with `train_dit.ema_sigma_rel`, at its end"
        )
    steps, lengths = (np.array(column) for column in zip(*found.values(), strict=True))
    factors = combine(steps, lengths, int(steps.max()), sigma_rel)
    total: dict[str, Tensor] = {}
    for path, factor in zip(found, factors, strict=True):
        tensors = read_tensors(path)
        if total and total.keys() != tensors.keys():
            raise CorruptData(f"{path} is of another model than the snapshots before it")
        for name, tensor in tensors.items():
            part = tensor.double() * factor
            total[name] = total[name].add_(part) if name in total else part
    return {name: tensor.float() for name, tensor in total.items()}


def save_snapshot(payload: Path, step: int, sigma_rel: float, parameters: Mapping[str, Tensor]) -> None:
    """Write the average of one length at a step, unless it is there already."""
    path = snapshot_path(payload, step, sigma_rel)
    path.parent.mkdir(exist_ok=True)
    if not path.exists():
        temporary = path.with_suffix(".partial")
        save_weights(temporary, parameters)
        temporary.rename(path)
