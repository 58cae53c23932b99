"""Evaluation against the libraries, in one process: whole evaluations, and the Fréchet distance alone.

Whole: features of the same images by the same extractor, then their distance; torchmetrics by its documented loop of
`update` and `compute`, ours from the same arrays through files of features, which make it resumable. The extractor is
timm's ResNet-18 with drawn weights at 64 pixels, batches of `BLOCK_SIZE` for both. Distance: 2,048 dimensions, moments
in float64 of 5,000 images each, against torch-fidelity's and torchmetrics' own functions.

`python tests/bench/bench_evaluate.py`; it wants a machine that does nothing else, and minutes. `--dimensions 256
--images 64 --rounds 1` is over in seconds.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import timm
import torch
from rounds import interleaved, table
from torch import Tensor, nn
from torch_fidelity.metric_fid import fid_statistics_to_metric
from torchmetrics.image.fid import FrechetInceptionDistance, _compute_fid

from rae.stages.scoring.extractors import BLOCK_SIZE, Extractor, Preprocessing
from rae.stages.scoring.features import extract
from rae.stages.scoring.frechet import Moments, frechet_distance
from rae.stages.scoring.image_sets import ArrayImages

MEAN, STD, SIDE = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 64


class Normalised(nn.Module):
    """The extractor as torchmetrics takes it: uint8 [B, 3, H, W] to features."""

    num_features = 512

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.preprocessing = Preprocessing("bicubic-clamped", SIDE, MEAN, STD)

    def forward(self, pixels: Tensor) -> Tensor:
        features: Tensor = self.network(self.preprocessing(pixels).contiguous(memory_format=torch.channels_last))
        return features


def whole(count: int, rounds: int) -> str:
    torch.manual_seed(0)
    network = timm.create_model("resnet18", pretrained=False, num_classes=0).eval().requires_grad_(False)
    network.to(memory_format=torch.channels_last)
    rng = np.random.default_rng(0)
    real, made = (rng.integers(0, high, (count, SIDE, SIDE, 3), dtype=np.uint8) for high in (256, 230))
    extractor = Extractor("resnet18", network, Preprocessing("bicubic-clamped", SIDE, MEAN, STD), dim=512, digest="")
    found: dict[str, float] = {}

    @torch.inference_mode()
    def torchmetrics() -> None:
        metric = FrechetInceptionDistance(Normalised(network), input_img_size=(3, SIDE, SIDE))
        for images, is_real in ((real, True), (made, False)):
            for first in range(0, count, BLOCK_SIZE):
                batch = torch.from_numpy(images[first : first + BLOCK_SIZE]).permute(0, 3, 1, 2)
                metric.update(batch, real=is_real)
        found["torchmetrics"] = float(metric.compute())

    def ours() -> None:
        with tempfile.TemporaryDirectory() as folder:
            both = [Moments.of(extract(extractor, ArrayImages(images), Path(folder))) for images in (real, made)]
            found["ours"] = frechet_distance(*both)

    seconds = interleaved({"ours": ours, "torchmetrics": torchmetrics}, rounds)
    ratio = seconds["torchmetrics"] / seconds["ours"]
    rows = [[name, f"{seconds[name]:.3f}", f"{found[name]:.8g}"] for name in ("ours", "torchmetrics")]
    rows.append(
        ["torchmetrics / ours (>= 1.0)", f"{ratio:.2f}", f"apart {apart(found['ours'], found['torchmetrics'])}"]
    )
    return table(f"whole evaluation, {count} images a set", ["", "seconds", "distance"], rows)


def distance(dim: int, rounds: int) -> str:
    rng = np.random.default_rng(0)
    # Variances fall as those of Inception's features do, over some five orders of magnitude.
    scales = np.exp(-np.linspace(0, 11, dim))
    mixing = np.linalg.qr(rng.standard_normal((dim, dim)))[0]
    features = [rng.standard_normal((5000, dim)) * scales**0.5 @ mixing.T, rng.standard_normal((5000, dim)) * 0.1]
    features[1] += features[0][::-1] * 0.9
    ours = [Moments.of(one) for one in features]
    theirs = [{"mu": one.mean, "sigma": one.cov} for one in ours]
    tensors = [torch.from_numpy(array) for one in ours for array in (one.mean, one.cov)]
    found: dict[str, float] = {}
    cases = {
        "ours": lambda: frechet_distance(*ours),
        "torch-fidelity": lambda: fid_statistics_to_metric(*theirs, verbose=False)["frechet_inception_distance"],
        "torchmetrics": lambda: float(_compute_fid(*tensors)),
    }
    seconds = interleaved(
        {name: lambda name=name, case=case: found.update({name: case()}) for name, case in cases.items()}, rounds
    )
    rows = [
        [name, f"{seconds[name]:.3f}", f"{seconds[name] / seconds['ours']:.2f}", apart(found["ours"], found[name])]
        for name in cases
    ]
    header = ["", "seconds", "ours is so many times as fast (>= 1.5)", "relative difference (<= 1e-6)"]
    return table(f"Fréchet distance, {dim} dimensions", header, rows)


def apart(a: float, b: float) -> str:
    return f"{abs(a - b) / abs(b):.1e}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--dimensions", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    print(whole(arguments.images, arguments.rounds))
    print(distance(arguments.dimensions, arguments.rounds))
