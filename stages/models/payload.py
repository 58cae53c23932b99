"""What an artifact of a trained model holds besides its weights, and how both are written."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from rae.stages.models.saving import digest_weights, link_file, save_weights
from rae.store.manifest import Json, canonical
from rae.store.publish import write_durably


@dataclass(frozen=True)
class Payload:
    """What lies beside a trained model's weights: what it is, as JSON, and what whitens its latents, if it knows."""

    file: str
    about: Json
    stats: tuple[Tensor, Tensor] | None = None
    metrics: Json = field(default_factory=dict)  # numbers for the manifest that hold at any step

    def describe(self, folder: Path) -> list[Path]:
        """Write it; returns its files. With `ema.safetensors` beside them, the model can be loaded."""
        files = [folder / self.file]
        write_durably(files[0], json.dumps(self.about, indent=1, sort_keys=True).encode())
        if self.stats is not None:
            files.append(folder / "latent_stats.safetensors")
            save_weights(files[-1], self._named_stats())
        return files

    def save(
        self, folder: Path, model: Mapping[str, Tensor] | None, ema: Mapping[str, Tensor], stored: Path | None = None
    ) -> tuple[tuple[Path, ...], str]:
        """Write it with its weights; returns the files, and one digest over the description and all tensors.

        `stored` is a folder that may hold files of these very weights already, by the same names: they are linked.
        """
        groups = {"ema": ema} if model is None else {"model": model, "ema": ema}
        files = self.describe(folder)
        digests: Json = {"about": self.about}
        for group, tensors in groups.items():
            files.append(folder / f"{group}.safetensors")
            if stored is None or not link_file(stored / files[-1].name, files[-1]):
                save_weights(files[-1], tensors)
            digests[group] = digest_weights(tensors)
        if self.stats is not None:
            digests["latent_stats"] = digest_weights(self._named_stats())
        return tuple(files), hashlib.sha256(canonical(digests)).hexdigest()

    def _named_stats(self) -> dict[str, Tensor]:
        assert self.stats is not None
        return dict(zip(("mean", "var"), self.stats, strict=True))
