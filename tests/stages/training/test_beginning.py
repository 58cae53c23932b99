"""Weights of another model: class tables of other sizes, and everything else that must fit."""

import dataclasses
from pathlib import Path

import pytest
import torch

from rae.stages.models.dit import DiTConfig, DiTDH, LightningDiT, build_dit
from rae.stages.models.trained import DitDescription, save_dit
from rae.stages.training.beginning import begin_dit
from rae.store.errors import MissingInput, StaleInput

CONFIG = DiTConfig(
    model="DiT-DH", in_channels=4, input_size=2, hidden_size=(8, 16), depth=(1, 1), num_heads=(1, 1), num_classes=3
)
TABLE = "y_embedder.embedding_table.weight"


def drawn(seed: int, **changes: object) -> DiTDH | LightningDiT:
    torch.manual_seed(seed)
    return build_dit(dataclasses.replace(CONFIG, **changes))  # type: ignore[arg-type]


def begun(tmp_path: Path, dit: DiTDH | LightningDiT, **changes: object) -> DiTDH | LightningDiT:
    """A new model of `changes` that begins with the weights of `dit`, which lie there as imported ones do."""
    about = DitDescription(dit.config, {"time_dist_shift": 1.0}, {})
    stats = torch.zeros(4, 2, 2), torch.ones(4, 2, 2)
    save_dit(tmp_path, about, stats, None, dit.state_dict())
    made = drawn(1, **changes)
    begin_dit(made, tmp_path, "ema")
    return made


@pytest.mark.parametrize("num_classes", [2, 3, 5])
def test_the_class_table_may_change_size(num_classes: int, tmp_path: Path) -> None:
    dit = drawn(0)
    state, made = dit.state_dict(), begun(tmp_path, dit, num_classes=num_classes).state_dict()
    for name in state.keys() - {TABLE}:
        assert torch.equal(made[name], state[name]), name
    shared, new = min(3, num_classes), drawn(1, num_classes=num_classes).state_dict()[TABLE]
    assert torch.equal(made[TABLE][:shared], state[TABLE][:shared])
    assert torch.equal(made[TABLE][shared:-1], new[shared:-1])
    assert torch.equal(made[TABLE][-1], state[TABLE][-1])  # no label


def test_with_or_without_labels_the_row_of_no_label_is_taken_over(tmp_path: Path) -> None:
    dit = drawn(0, num_classes=0)
    made = begun(tmp_path, dit).state_dict()[TABLE]
    assert torch.equal(made[-1], dit.state_dict()[TABLE][0])
    assert torch.equal(made[:-1], drawn(1).state_dict()[TABLE][:-1])


def test_a_table_without_a_row_of_no_label_keeps_its_own(tmp_path: Path) -> None:
    dit = drawn(0, class_dropout_prob=0.0)
    made = begun(tmp_path, dit, num_classes=4).state_dict()[TABLE]
    assert torch.equal(made[:3], dit.state_dict()[TABLE])
    assert torch.equal(made[3:], drawn(1, num_classes=4).state_dict()[TABLE][3:])


def test_another_shape_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(StaleInput, match=r"init_from` does not fit this model: it .*attn.proj.bias` as \[8\]"):
        begun(tmp_path, drawn(0), hidden_size=(16, 16))


def test_imported_models_have_one_set_of_weights(tmp_path: Path) -> None:
    begun(tmp_path, drawn(0))
    with pytest.raises(MissingInput, match="imported with one set of weights"):
        begin_dit(drawn(1), tmp_path, "model")
