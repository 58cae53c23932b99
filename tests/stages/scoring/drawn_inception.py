"""A file like torch-fidelity's Inception, with drawn weights."""

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3


def write_inception(path: Path) -> Path:
    nothing = io.BytesIO()
    torch.save({}, nothing)
    nothing.seek(0)
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        network: Any = FeatureExtractorInceptionV3("drawn", ["2048"], nothing)
    torch.save(nn.Module.state_dict(network), path)
    return path
