"""A latent store of given latents, as `rae encode` would have written it."""

from pathlib import Path
from typing import Any

import numpy as np

from rae.store.latents_finish import finish
from rae.store.latents_writer import PartWriter
from rae.store.layout import LatentLayout, plan_parts


def write_store(folder: Path, latents: np.ndarray, rows_per_part: int) -> None:
    """Write latents [N, C, H, W] of float16, one view each, in parts of `rows_per_part`."""
    layout = LatentLayout(1, *latents.shape[1:], rows_per_part=rows_per_part)
    parts = plan_parts([len(latents)], rows_per_part)
    for part in parts:
        with PartWriter(folder, layout, part) as writer:
            for row in range(part.count):
                entry: Any = {"key": f"{row:06d}", "label": row % 10, "sha256": None, "width": 256, "height": 256}
                writer.write(row, latents[part.first_sample + row][None], **entry)
            writer.publish()
    finish(folder, layout, parts, ["0" * 64])
