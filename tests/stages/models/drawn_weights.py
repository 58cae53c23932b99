"""Weights that are drawn, for models whose published ones lie on few machines."""

from pathlib import Path

import torch
from torch import nn
from torchvision.models import vgg16


def vgg_features() -> nn.Sequential:
    """VGG-16's convolutions."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        with torch.device("meta"):
            layers: nn.Sequential = vgg16(weights=None, init_weights=False).features
        layers = layers.to_empty(device="cpu")
        for layer in layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight)
                nn.init.normal_(layer.bias, std=0.1)
    return layers.requires_grad_(False)


def write_vgg(folder: Path) -> Path:
    """The same as torchvision saves them."""
    path = folder / "drawn.pth"
    torch.save({f"features.{key}": value for key, value in vgg_features().state_dict().items()}, path)
    return path
