"""`rae`: train image generators on representation autoencoders, from latents that are encoded once.

Everything public stands here and loads when it is first used, so that `import rae` costs nothing.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rae.pipeline.api import (
        encode,
        load_autoencoder,
        load_decoder,
        load_dit,
        open_latents,
        run,
        sample,
        torch_dataset,
    )
    from rae.stages.models.transport import create_transport

_HOME = {
    "create_transport": "rae.stages.models.transport",
    "encode": "rae.pipeline.api",
    "load_autoencoder": "rae.pipeline.api",
    "load_decoder": "rae.pipeline.api",
    "load_dit": "rae.pipeline.api",
    "open_latents": "rae.pipeline.api",
    "run": "rae.pipeline.api",
    "sample": "rae.pipeline.api",
    "torch_dataset": "rae.pipeline.api",
}

__version__ = version("rae-pipeline")
__all__ = [
    "create_transport",
    "encode",
    "load_autoencoder",
    "load_decoder",
    "load_dit",
    "open_latents",
    "run",
    "sample",
    "torch_dataset",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'rae' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
