import torch
from torch import nn

from rae.stages.training.ema import EMA


def test_the_average_follows_its_definition():
    model = nn.Linear(2, 2)
    ema = EMA(model, decay=0.9)
    expected = model.weight.detach().clone()
    for value in (1.0, -2.0, 5.0):
        nn.init.constant_(model.weight, value)
        ema.update(model)
        expected = 0.9 * expected + 0.1 * value
    assert torch.allclose(ema.model.weight, expected, atol=1e-6)


def test_buffers_are_copied_and_nothing_is_shared():
    model = nn.BatchNorm1d(3)
    ema = EMA(model, decay=0.99)
    model.running_mean.fill_(4.0)
    model.num_batches_tracked.fill_(7)
    assert not ema.model.running_mean.any()
    ema.update(model)
    assert (ema.model.running_mean == 4.0).all()
    assert ema.model.num_batches_tracked == 7
    assert ema.model.running_mean.data_ptr() != model.running_mean.data_ptr()


def test_the_average_is_for_looking_not_for_training():
    model = nn.Linear(2, 2).train()
    average = EMA(model, decay=0.9).model
    assert not average.training
    assert not any(parameter.requires_grad for parameter in average.parameters())
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
