"""Steps whose loss or gradients are not finite: they come to nothing, are counted, and too many are the end."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from rae.stages.job import Job
from rae.stages.training.adversarial import AdversarialLearner
from rae.stages.training.learner import Learner, NonFinite
from rae.stages.training.loop import train
from rae.stages.training.metrics_log import read
from rae.stages.training.ranks import Ranks
from rae.stages.training.section import TrainingSection
from rae.stages.training.sections import TrainDecoderSection, TrainDitSection
from tests.conftest import Rae
from tests.stages.training import small_gan
from tests.stages.training.test_loop import PAYLOAD, ROWS, SECTION, Points, assert_same, learner_of, loss, points

PATIENT = SECTION.model_copy(update={"max_skipped_steps": 2, "log_every": 1})
Spoil = Callable[[Tensor], Tensor]


def nan_loss(value: Tensor) -> Tensor:
    return value * math.nan


def nan_gradient(value: Tensor) -> Tensor:
    """Finite itself, and with an infinite derivative."""
    return value + (0 * value).sqrt()


def spoiled(steps: set[int], how: Spoil) -> Any:
    """The loss of `points`, spoilt at these steps, counted from 1."""
    at = {tuple(points(SECTION)(*divmod(step - 1, 3)).inputs.flatten().tolist()) for step in steps}

    def spoilt(forward: nn.Module, batch: Points) -> tuple[Tensor, dict[str, Tensor]]:
        value, parts = loss(forward, batch)
        return (how(value) if tuple(batch.inputs.flatten().tolist()) in at else value), parts

    return spoilt


def run(section: TrainingSection, job: Job, loss: Any) -> tuple[Learner[Points], dict[str, Any]]:
    learner = learner_of(section, loss)
    result = train(learner, points(section), section, PAYLOAD, rows=ROWS, job=job, ranks=Ranks())
    return learner, result.metrics


def snapshot(learner: Any) -> dict[str, dict[str, Tensor]]:
    return {
        group: {name: tensor.clone() for name, tensor in tensors.items()}
        for group, tensors in learner.tensors().items()
    }


def differing(before: dict[str, dict[str, Tensor]], learner: Any) -> set[str]:
    """The groups of which some tensor is not what it was, to the bit."""
    after = learner.tensors()
    return {
        group
        for group, tensors in before.items()
        if any(not torch.equal(tensor, after[group][name]) for name, tensor in tensors.items())
    }


@pytest.mark.parametrize("how", [nan_loss, nan_gradient])
def test_a_skipped_step_leaves_everything_as_it_was(how: Spoil) -> None:
    learner = learner_of(PATIENT, spoiled({3}, how))
    batch = points(PATIENT)
    for step in range(2):
        learner.step(batch(0, step), step)
    before = snapshot(learner)
    with pytest.raises(NonFinite):
        learner.step(batch(0, 2), 2)
    assert differing(before, learner) == set()
    learner.step(batch(1, 0), 3)
    assert differing(before, learner) == {"model", "ema", "optimizer"}
    assert all(tensor.isfinite().all() for group in learner.tensors().values() for tensor in group.values())


@pytest.mark.parametrize("how", [nan_loss, nan_gradient])
def test_skipped_steps_are_counted_and_training_goes_on(how: Spoil, tmp_path: Path) -> None:
    _, metrics = run(PATIENT, Job(tmp_path), spoiled({4, 8}, how))
    assert (metrics["steps"], metrics["skipped_steps"]) == (9, 2)
    lines = read(tmp_path / "metrics.jsonl")
    told = [line for line in lines if "skipped" in line]
    assert [(line["step"], line["skipped_steps"]) for line in told] == [(4, 1), (8, 2)]
    assert "became nan at step 4, on samples point-" in told[0]["skipped"]
    # Means are of the steps that were learnt from; where there was none, the last ones hold.
    learnt = {line["step"]: line["loss"] for line in lines if "loss" in line}
    assert learnt[4] == learnt[3] != learnt[5]
    assert all(math.isfinite(value) for value in learnt.values())


def test_a_mean_is_over_what_was_learnt_from(tmp_path: Path) -> None:
    section = PATIENT.model_copy(update={"log_every": 3})
    run(section, Job(tmp_path / "skipped"), spoiled({2}, nan_loss))
    run(PATIENT, Job(tmp_path / "each"), spoiled({2}, nan_loss))
    first = next(line for line in read(tmp_path / "skipped" / "metrics.jsonl") if "loss" in line)
    each = {line["step"]: line["loss"] for line in read(tmp_path / "each" / "metrics.jsonl") if "loss" in line}
    assert first["loss"] == pytest.approx((each[1] + each[3]) / 2)


def test_one_more_than_the_limit_stops_with_all_of_them_named(tmp_path: Path) -> None:
    with pytest.raises(NonFinite, match=r"at step 7, .*`max_skipped_steps` is 2, .* came to nothing before: 2, 4$"):
        run(PATIENT, Job(tmp_path), spoiled({2, 4, 7}, nan_loss))
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == ["step-00000004", "step-00000006"]


def test_by_default_the_first_is_the_end(tmp_path: Path) -> None:
    with pytest.raises(NonFinite, match=r"the loss became nan at step 4, on samples (point-., )+point-.$"):
        run(SECTION, Job(tmp_path), spoiled({4}, nan_loss))


@pytest.mark.parametrize("killed_at", [2, 4, 5, 6])
def test_a_resumed_run_counts_as_the_uninterrupted_one(killed_at: int, tmp_path: Path) -> None:
    spoilt = spoiled({2, 5}, nan_gradient)
    whole, metrics = run(PATIENT, Job(tmp_path / "whole"), spoilt)
    calls = iter(range(1, 100))

    def killing(forward: nn.Module, batch: Points) -> Any:
        if next(calls) == killed_at:
            raise KeyboardInterrupt
        return spoilt(forward, batch)

    with pytest.raises(KeyboardInterrupt):
        run(PATIENT, Job(tmp_path / "killed"), killing)
    resumed, again = run(PATIENT, Job(tmp_path / "resumed", earlier=(tmp_path / "killed",)), spoilt)
    assert_same(whole, resumed)
    assert again["skipped_steps"] == metrics["skipped_steps"] == 2
    told = [
        [(line["step"], line["skipped"]) for line in read(tmp_path / run / "metrics.jsonl") if "skipped" in line]
        for run in ("whole", "resumed")
    ]
    assert told[0] == told[1]


def test_the_count_goes_on_over_a_resume(tmp_path: Path) -> None:
    run(PATIENT.model_copy(update={"steps": 6}), Job(tmp_path / "first"), spoiled({2, 5}, nan_loss))
    with pytest.raises(NonFinite, match=r"before: 2, 5$"):
        run(PATIENT, Job(tmp_path / "second", earlier=(tmp_path / "first",)), spoiled({2, 5, 8}, nan_loss))


class TestAdversarial:
    """A decoder's loss, its gradients, and the discriminator's."""

    def at_step_3(self, spoil: Callable[[AdversarialLearner[small_gan.Batch]], None]) -> tuple[Any, set[str], str]:
        """A learner after three steps that was spoilt for the fourth; what that changed, and why it raised."""
        learner = small_gan.learner_of(small_gan.SECTION)
        for step in range(3):
            learner.step(small_gan.batch_for(*divmod(step, 2)), step)
        before = snapshot(learner)
        spoil(learner)
        with pytest.raises(NonFinite) as raised:
            learner.step(small_gan.batch_for(1, 1), 3)
        return learner, differing(before, learner), raised.value.message

    @pytest.mark.parametrize("how", [nan_loss, nan_gradient])
    def test_of_the_decoder_leaves_both_as_they_were(self, how: Spoil) -> None:
        def spoil(learner: Any) -> None:
            def spoilt(made: Tensor, batch: small_gan.Batch) -> Any:
                value, parts = small_gan.reconstruction(made, batch)
                return how(value), parts

            learner.reconstruction = spoilt

        assert self.at_step_3(spoil)[1] == set()

    @pytest.mark.parametrize("how", [nan_loss, nan_gradient])
    def test_of_the_discriminator_leaves_the_discriminator_as_it_was(
        self, how: Spoil, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from rae.stages.training import adversarial

        of_both = adversarial.discriminator_loss

        def spoil(learner: Any) -> None:
            monkeypatch.setattr(adversarial, "discriminator_loss", lambda *given: how(of_both(*given)))

        learner, changed, told = self.at_step_3(spoil)
        assert changed == {"model", "ema", "optimizer"}
        assert "disc" in told
        monkeypatch.undo()
        before = snapshot(learner)
        learner.step(small_gan.batch_for(2, 0), 4)
        assert {"heads", "disc_optimizer"} <= differing(before, learner)


@pytest.mark.parametrize("section", [TrainDecoderSection(steps=1), TrainDitSection(steps=1)])
def test_patience_stands_in_a_recipe_if_there_is_any(section: TrainingSection) -> None:
    assert "max_skipped_steps" not in section.in_recipe()
    patient = section.model_copy(update={"max_skipped_steps": 3})
    assert patient.in_recipe() == section.in_recipe() | {"max_skipped_steps": 3}


@pytest.mark.parametrize(("verb", "kind"), [("train-decoder", "decoder"), ("train-dit", "dit")])
def test_a_trainer_skips_as_its_section_says(
    verb: str, kind: str, rae_with: Callable[..., Rae], monkeypatch: pytest.MonkeyPatch
) -> None:
    from rae.stages.training import learner

    steps = iter(range(1, 100))
    descend = learner.descend

    def spoilt(optimizer: Any, model: nn.Module, *given: Any) -> float:
        if next(steps) in (2, 3):
            next(model.parameters()).grad = torch.full_like(next(model.parameters()), math.inf)
        return descend(optimizer, model, *given)

    monkeypatch.setattr(learner, "descend", spoilt)
    section = verb.replace("-", "_")
    rae = rae_with("shards", "latents")
    ran = rae.verb(verb, "-s", f"{section}.max_skipped_steps=2").succeeded()
    assert "skipped a step, 2 of at most 2: the grad_norm became" in ran.err
    made = rae.artifact(f"{kind}/tiny")
    assert made["metrics"]["skipped_steps"] == 2
    assert made["recipe"]["config"][section]["max_skipped_steps"] == 2
    (folder,) = rae.workspace.glob(f"objects/{kind}/*/attempts/*")
    assert all(tensor.isfinite().all() for tensor in load_file(folder / "ema.safetensors").values())
    steps = iter(range(1, 100))
    rae_with("shards", "latents").verb(verb).refused(1, "the grad_norm became", "at step 2, on samples")
