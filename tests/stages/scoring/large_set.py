"""All scores of COUNT images of 64 pixels from the file NPZ: `python large_set.py NPZ COUNT FOLDER` prints peak MB.

A process of its own, since a peak never falls.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from rae.stages.job import Job
from rae.stages.peak_memory import peak_memory_bytes
from rae.stages.scoring.extractors import Extractor, Preprocessing
from rae.stages.scoring.npz_images import NpzImages
from rae.stages.scoring.scores import GenerationScores
from rae.stages.sections import EvaluateSection


class Drawn:
    """Images of 64 pixels, each drawn from its row."""

    def __init__(self, count: int, seed: int) -> None:
        self.labels = np.arange(count) % 4
        self.seed = seed
        self.digest = f"{count} {seed}"

    def read(self, rows: Sequence[int] | range) -> tuple[np.ndarray, np.ndarray]:
        drawn = [np.random.default_rng((self.seed, row)).bytes(64 * 64 * 3) for row in rows]
        return np.frombuffer(b"".join(drawn), np.uint8).reshape(-1, 64, 64, 3), np.ones(len(rows), np.bool_)


class Pooled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)


def main(npz: Path, count: int, folder: Path) -> None:
    extractor = Extractor(
        "pooled", Pooled(), Preprocessing("bicubic-clamped", 64), dim=12, digest="", head=np.eye(12, dtype=np.float32)
    )
    config = EvaluateSection(classifier="none", baselines=False, kid_subset_size=100)
    scores = GenerationScores(NpzImages(npz), Drawn(count, 0), Drawn(count, 1), extractor, config, Job(folder)).rows()
    assert scores["samples"].keys() == scores["real"].keys()
    print(peak_memory_bytes() / 2**20)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
