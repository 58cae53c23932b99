"""Weights that a training begins with: those of another model of the same sizes, whose class table may be another's."""

from pathlib import Path

import torch
from torch import Tensor

from rae.stages.models.decoder import ViTDecoder
from rae.stages.models.dit import DiTConfig, DiTDH, LightningDiT
from rae.stages.models.layers import LabelEmbed
from rae.stages.models.saving import check_weights
from rae.stages.models.trained import Weights, load_weights_of, read_about
from rae.store.errors import CorruptData, StaleInput

_CLASS_TABLE = "y_embedder.embedding_table.weight"


def begin_decoder(decoder: ViTDecoder, folder: Path, weights: Weights) -> None:
    """Give a decoder the weights of the one in `folder`; `StaleInput` names tensors of another shape."""
    _take_over("train_decoder", decoder, load_weights_of(folder, weights))


def begin_dit(dit: DiTDH | LightningDiT, folder: Path, weights: Weights) -> None:
    """Give a transformer the weights of the one in `folder`; `StaleInput` names tensors of another shape.

    Of the class table, rows of classes that both have and the row of no label are taken over; others stay as they were
    initialised.
    """
    known = DiTConfig.from_dict(read_about(folder / "dit.json", "config")["config"])
    state = load_weights_of(folder, weights)
    if _CLASS_TABLE in state and isinstance(dit.y_embedder, LabelEmbed):
        own = dit.y_embedder.embedding_table.weight.detach()
        state[_CLASS_TABLE] = _class_table(own, dit.config, state[_CLASS_TABLE], known)
    _take_over("train_dit", dit, state)


def _class_table(own: Tensor, config: DiTConfig, found: Tensor, known: DiTConfig) -> Tensor:
    """`own` [rows, D] with the rows of `found` [rows', D] that mean the same."""
    if own.shape[1] != found.shape[1] or len(found) != known.num_classes + known.has_null_label:
        return found  # refused with everything else of another shape
    table, shared = own.clone(), min(config.num_classes, known.num_classes)
    table[:shared] = found[:shared]
    if config.has_null_label and known.has_null_label:
        table[-1] = found[-1]
    return table


def _take_over(section: str, model: torch.nn.Module, state: dict[str, Tensor]) -> None:
    try:
        check_weights(state, model.state_dict(), f"`{section}.init_from`")
    except CorruptData as error:
        raise StaleInput(error.message) from error
    model.load_state_dict(state)
