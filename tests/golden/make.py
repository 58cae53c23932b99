"""Made the golden workspace of version 1: `python make.py` in an empty folder. Never run it over what is committed.

A later version of the formats gets a folder of its own beside `v1`, which stays and is read for ever.
"""

from pathlib import Path

import torch
import yaml

import rae

CONFIG = {
    "name": "golden",
    "shards": {"train": "digits", "limit": 10, "samples_per_shard": 4},
    "encode": {"image_size": 16, "batch_size": 2, "rows_per_part": 4},
    "train_decoder": {
        "steps": 2, "batch_size": 4, "hidden_size": 8, "depth": 1, "num_heads": 1, "intermediate_size": 8,
        "perceptual_loss": "none", "adversarial_loss": "none",
    },
    "train_dit": {"steps": 2, "batch_size": 4, "hidden_size": [8, 8], "depth": [1, 1], "num_heads": [1, 1], "lr": 0.01},
}  # fmt: skip


class Golden(torch.nn.Module):
    """The mean colour of each quarter of an image, and of its mirror image."""

    version = "1"
    mean = std = (0.5, 0.5, 0.5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(images, 2)


if __name__ == "__main__":
    torch.set_num_threads(1)
    Path("golden.yaml").write_text(yaml.safe_dump(CONFIG))
    rae.run("golden.yaml", workspace="v1", encoder=Golden())
