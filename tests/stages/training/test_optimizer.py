import pytest
import torch
from torch import nn

from rae.stages.training.optimizer import (
    build_optimizer,
    clip_gradients,
    learning_rate,
    load_optimizer,
    optimizer_tensors,
    steps_per_epoch,
    total_steps,
)
from rae.stages.training.section import TrainingSection
from rae.store.errors import ConfigError, StaleInput

# The rate of each step of the official recipes, from `parity/dit_training.safetensors` (io/lrs) and
# `parity/decoder_training.safetensors` (io/log/lr).
OFFICIAL_LINEAR = [0.002] * 5 + [0.00185, 0.0017, 0.0015500000000000002, 0.0014, 0.00125, 0.0011, 0.00095, 0.0008]
OFFICIAL_LINEAR += [0.00065, 0.0005, 0.0003500000000000001] + [0.0002] * 4
OFFICIAL_COSINE = [0.0003333333333333333, 0.0006666666666666666, 0.001, 0.001, 0.0009140576474687263]
OFFICIAL_COSINE += [0.0006890576474687264, 0.0004109423525312738, 0.00018594235253127373]


def rates(section: TrainingSection, rows: int) -> list[float]:
    steps = steps_per_epoch(section, rows), total_steps(section, rows)
    return [learning_rate(section, step, *steps) for step in range(steps[1])]


def test_linear_schedule_is_the_official_one():
    section = TrainingSection(
        epochs=5, batch_size=4, lr=2e-3, final_lr=2e-4, schedule="linear", decay_start_epoch=1, decay_end_epoch=4
    )
    assert rates(section, rows=19) == pytest.approx(OFFICIAL_LINEAR, rel=1e-12)


def test_cosine_schedule_is_the_official_one():
    section = TrainingSection(steps=8, batch_size=4, lr=1e-3, final_lr=1e-4, schedule="cosine", warmup_steps=3)
    assert rates(section, rows=100) == pytest.approx(OFFICIAL_COSINE, rel=1e-12)


def test_warm_up_in_epochs_holds_then_decays_to_the_end():
    section = TrainingSection(
        epochs=3, batch_size=2, lr=1.0, final_lr=0.1, schedule="linear", warmup_epochs=0.5, decay_start_epoch=1
    )
    assert rates(section, rows=8) == pytest.approx([0.5, 1, 1, 1] + [1 - 0.9 * step / 8 for step in range(8)])


def test_constant_schedule_only_warms_up():
    section = TrainingSection(steps=5, batch_size=2, lr=1.0, warmup_steps=2)
    assert rates(section, rows=4) == [0.5, 1, 1, 1, 1]


def test_length_in_epochs_counts_whole_batches():
    assert total_steps(TrainingSection(epochs=2.5, batch_size=4), rows=19) == 10
    assert total_steps(TrainingSection(epochs=0.001, batch_size=4), rows=19) == 1
    assert total_steps(TrainingSection(steps=7, batch_size=4), rows=19) == 7


def test_a_batch_larger_than_the_data_is_refused():
    with pytest.raises(ConfigError, match="`batch_size` 8 is larger than the 7 training samples"):
        steps_per_epoch(TrainingSection(steps=1, batch_size=8), rows=7)


def model_with_frozen_part() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(2, 2))
    model[1].requires_grad_(False)
    return model


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int, count: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        optimizer.zero_grad()
        model(torch.randn(5, 3, generator=generator)).square().mean().backward()
        optimizer.step()


def test_adamw_follows_its_definition():
    section = TrainingSection(steps=1, lr=0.1, betas=(0.8, 0.9), weight_decay=0.5)
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 2.0)
    optimizer = build_optimizer(model, section)
    mean = variance = 0.0
    weight = 2.0
    for step, gradient in enumerate([3.0, -1.0, 0.5], start=1):
        model.weight.grad = torch.tensor([[gradient]])
        optimizer.step()
        mean, variance = 0.8 * mean + 0.2 * gradient, 0.9 * variance + 0.1 * gradient**2
        step_size = 0.1 * (mean / (1 - 0.8**step)) / ((variance / (1 - 0.9**step)) ** 0.5 + 1e-8)
        weight = weight * (1 - 0.1 * 0.5) - step_size
        assert model.weight.item() == pytest.approx(weight, rel=1e-5)


def test_optimizer_state_continues_to_the_bit():
    section = TrainingSection(steps=1, lr=0.1)
    model = model_with_frozen_part()
    optimizer = build_optimizer(model, section)
    steps(model, optimizer, seed=1, count=3)
    state = {name: tensor.clone() for name, tensor in optimizer_tensors(optimizer, model).items()}
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert set(state) == {
        f"{layer}.{kind}.{key}"
        for layer in (0, 2)
        for kind in ("weight", "bias")
        for key in ("step", "exp_avg", "exp_avg_sq")
    }
    steps(model, optimizer, seed=2, count=2)

    other = model_with_frozen_part()
    other.load_state_dict(weights)
    resumed = build_optimizer(other, section)
    load_optimizer(resumed, other, state)
    steps(other, resumed, seed=2, count=2)
    for name, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor)


def test_state_of_an_optimizer_that_has_not_begun_is_where_it_begins():
    section = TrainingSection(steps=1, lr=0.1)
    model, other = model_with_frozen_part(), model_with_frozen_part()
    resumed = build_optimizer(other, section)
    load_optimizer(resumed, other, optimizer_tensors(build_optimizer(other, section), other))
    steps(model, build_optimizer(model, section), seed=1, count=2)
    steps(other, resumed, seed=1, count=2)
    assert torch.equal(model[0].weight, other[0].weight)


def test_optimizer_state_of_another_model_is_refused():
    section = TrainingSection(steps=1)
    model = model_with_frozen_part()
    optimizer = build_optimizer(model, section)
    steps(model, optimizer, seed=1, count=1)
    state = optimizer_tensors(optimizer, model)
    with pytest.raises(StaleInput, match=r"0\.bias\.exp_avg is not in both"):
        load_optimizer(optimizer, model, {key: state[key] for key in state if key != "0.bias.exp_avg"})
    with pytest.raises(StaleInput, match=r"1\.weight\.step is not in both"):
        load_optimizer(optimizer, model, {**state, "1.weight.step": torch.zeros(())})
    with pytest.raises(StaleInput, match=r"of 0\.bias has shape \[5\], asked \[4\]"):
        load_optimizer(optimizer, model, {**state, "0.bias.exp_avg": torch.zeros(5)})


def test_gradients_are_clipped_to_their_total_norm():
    model = nn.Linear(2, 1)
    model.weight.grad, model.bias.grad = torch.tensor([[3.0, 0.0]]), torch.tensor([4.0])
    assert clip_gradients(model, 0.0).item() == 5.0
    assert model.weight.grad[0, 0] == 3.0
    assert clip_gradients(model, 10.0).item() == 5.0
    assert model.weight.grad[0, 0] == 3.0
    assert clip_gradients(model, 1.0).item() == 5.0
    assert torch.allclose(torch.cat([model.weight.grad[0], model.bias.grad]), torch.tensor([0.6, 0.0, 0.8]))
