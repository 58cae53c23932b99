"""What sections refuse, and what stays out of recipes."""

import pytest

from rae.stages.sections import EncodeSection, TrainDecoderSection, TrainDitSection
from rae.store.errors import ConfigError


def test_a_transformer_narrower_than_a_token_is_refused() -> None:
    head = TrainDitSection(steps=1, hidden_size=(16, 32), depth=(1, 1), num_heads=(2, 2))
    head.check_width(32)
    with pytest.raises(ConfigError, match=r"the head is 32 wide and a token has 33 channels.*Theorem 1.*allow_narrow"):
        head.check_width(33)
    plain = TrainDitSection(model="LightningDiT", steps=1, hidden_size=(32,), depth=(1,), num_heads=(2,))
    with pytest.raises(ConfigError, match="the transformer is 32 wide"):
        plain.check_width(36)
    plain.model_copy(update={"allow_narrow": True}).check_width(36)


def test_what_does_not_change_the_result_stays_out_of_the_recipe() -> None:
    one = EncodeSection(encoder="here/dinov2", workers=1)
    other = EncodeSection(encoder="there/dinov2", workers=8, weights="/data/x.pth")
    assert one.in_recipe() == other.in_recipe()
    assert one.in_recipe() != EncodeSection(encoder="here/dinov2", workers=1, batch_size=7).in_recipe()
    log_often = TrainDecoderSection(steps=5, log_every=1, checkpoint_every=1)
    assert log_often.in_recipe() == TrainDecoderSection(steps=5).in_recipe()


def test_one_and_one_point_zero_are_one_recipe() -> None:
    assert TrainDecoderSection(steps=5, lr=1).in_recipe() == TrainDecoderSection(steps=5, lr=1.0).in_recipe()
    assert '"lr":1.0' in TrainDecoderSection(steps=5, lr=1).model_dump_json()
