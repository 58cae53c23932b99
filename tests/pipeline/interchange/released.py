"""Files as the official release has them, of tiny models."""

import json
from pathlib import Path

import numpy as np
import torch

from rae.stages.models.decoder import DecoderConfig, ViTDecoder, unwhiten
from rae.stages.models.dit import DiTConfig, build_dit
from rae.stages.models.pixels import to_uint8
from rae.stages.models.samplers import sample_ode
from rae.stages.models.transport import create_transport
from rae.stages.training.randomness import normal

SHAPE = (768, 16, 16)
DECODER = DecoderConfig(
    token_dim=768,
    grid=16,
    hidden_size=16,
    depth=1,
    num_heads=2,
    intermediate_size=24,
    patch_size=16,
    image_mean=(0.485, 0.456, 0.406),
    image_std=(0.229, 0.224, 0.225),
)
DIT = DiTConfig(
    model="DiT-DH",
    in_channels=768,
    input_size=16,
    hidden_size=(16, 32),
    depth=(1, 1),
    num_heads=(2, 4),
    num_classes=3,
)


class Release:
    """Files as the release has them, of tiny models for 768 x 16 x 16 latents: 256 px."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        self.decoder, self.dit = ViTDecoder(DECODER), build_dit(DIT)
        for model in (self.decoder, self.dit):
            for parameter in model.parameters():
                torch.nn.init.normal_(parameter, std=0.05)  # a new transformer's output is zero
        self.mean, self.var = torch.randn(SHAPE), torch.rand(SHAPE) + 0.5
        names = ("model.pt", "config.json", "stat.pt", "ep-0000080.pt")
        self.model, self.config, self.stat, self.checkpoint = (folder / name for name in names)
        torch.save(self.decoder.state_dict(), self.model)
        self.config.write_text(json.dumps({"decoder_num_attention_heads": 2, "layer_norm_eps": 1e-12}))
        torch.save({"mean": self.mean, "var": self.var}, self.stat)
        ema = self.dit.state_dict()
        model = {name: tensor + 1 for name, tensor in ema.items()}
        torch.save(
            {"step": 9, "epoch": 80, "model": model, "ema": ema, "optimizer": {}, "scheduler": None}, self.checkpoint
        )

    def images(self, labels: list[int], seed: int, num_steps: int) -> np.ndarray:
        """What the tensors make of noise, written out: Euler steps, unwhitening, decoding."""
        noise = normal(SHAPE, seed, "sample", 0, np.arange(len(labels)), torch.device("cpu"))
        transport = create_transport(time_dist_shift=float(np.sqrt(np.prod(SHAPE) / 4096)))
        with torch.inference_mode():
            x = sample_ode(
                self.dit, noise, torch.tensor(labels), transport=transport, num_steps=num_steps, null_label=3
            )
            return to_uint8(self.decoder(unwhiten(x, self.mean, self.var)).clamp(0, 1))
