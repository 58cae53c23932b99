"""Released models' state dicts by key and shape. Sizes are read from the shapes, as `rae import official` does."""

from pathlib import Path

import torch

from parity.drawn import shapes_of
from parity.fixture import read_shapes
from rae.stages.models.decoder import ViTDecoder
from rae.stages.models.dit import build_dit
from rae.stages.models.official import Checkpoint, infer_decoder, infer_dit
from rae.store.errors import RaeError

ANY_ENCODER = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}


def check_state_dicts(path: Path) -> None:
    for name, official in read_shapes(path).items():
        with torch.device("meta"):
            state = {key: torch.empty(shape) for key, shape in official.items()}
            try:
                if "decoder_embed.weight" in official:
                    decoder = Checkpoint(path, "decoder", state, "ema")
                    model = ViTDecoder(infer_decoder(decoder, ANY_ENCODER, num_heads=1))  # no shape tells the heads
                else:
                    model = build_dit(infer_dit(Checkpoint(path, "dit", state, "ema")))
            except RaeError as error:
                raise AssertionError(f"{name}: {error}") from error
        assert shapes_of(model) == official, name
