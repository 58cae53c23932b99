"""The decoder against the discriminator: the straightforward order's numbers, phases, resumes, ranks, the command."""

import itertools
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rae.stages.job import Job
from rae.stages.models.diffaug import diff_augment
from rae.stages.models.discriminator import DinoDiscriminator
from rae.stages.models.payload import Payload
from rae.stages.training.adversarial import AdversarialLearner, augment_draws
from rae.stages.training.checkpoints import load
from rae.stages.training.learner import Learner
from rae.stages.training.loop import train
from rae.stages.training.metrics_log import read
from rae.stages.training.ranks import Ranks
from rae.stages.training.sections import TrainDecoderSection
from rae.store.errors import RaeError
from tests.conftest import Rae
from tests.stages.training.small_gan import (
    ROWS,
    SECTION,
    Batch,
    batch_for,
    batch_of,
    learner_of,
    parts,
    reconstruction,
)

PAYLOAD = Payload("decoder.json", {})
WITH_ALL = SECTION.model_copy(update={"disc_start_step": 0, "gan_start_step": 0, "clip_grad": 0.0})


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(right[name], tensor) for name, tensor in left.items())


def assert_near(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    whole = torch.cat([gradient.flatten() for gradient in theirs.values()]).norm()
    for name, gradient in theirs.items():
        assert (ours[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-7 * whole, name


def straightforward(section: TrainDecoderSection, batch: Batch) -> tuple[dict[str, float], list[dict[str, Tensor]]]:
    """One step as VQGAN takes it: two gradients at the last layer, then the sum backwards; numbers and gradients."""
    decoder, discriminator = parts()
    discriminator.eval()
    made = decoder(batch.noised)
    loss, _ = reconstruction(made, batch)
    judged, for_fake, for_real = batch.augment_draws
    generator = -discriminator(diff_augment(2 * made - 1, judged, section.augment_prob)).mean()
    norms = [torch.autograd.grad(one, decoder.last_layer, retain_graph=True)[0].norm() for one in (loss, generator)]
    weight = (norms[0] / (norms[1] + 1e-6)).clamp(0, section.max_d_weight).detach()
    total = loss + section.disc_weight * weight * generator
    total.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in decoder.named_parameters()}
    learner = learner_of(section)  # for its optimizer: the decoder that the discriminator learns from is the next one
    for name, parameter in learner.model.named_parameters():
        parameter.grad = gradients[name].clone()
    learner.optimizer.param_groups[0]["lr"] = learner.rate(0)
    learner.optimizer.step()
    discriminator.zero_grad()
    discriminator.heads.train()
    with torch.no_grad():
        made = learner.model(batch.clean).clamp(0, 1)
    levels = (made * 255).round() / 255
    fake, real = (
        discriminator(diff_augment(2 * images - 1, draws, section.augment_prob))
        for images, draws in ((levels, for_fake), (batch.images, for_real))
    )
    if section.disc_loss == "hinge":
        disc_loss = ((1 - real).clamp(min=0).mean() + (1 + fake).clamp(min=0).mean()) / 2
    else:
        disc_loss = -(torch.sigmoid(real).log().mean() + (1 - torch.sigmoid(fake)).log().mean()) / 2
    disc_loss.backward()
    heads = {name: parameter.grad for name, parameter in discriminator.heads.named_parameters()}
    numbers = {"loss": total, "gen_loss": generator, "d_weight": weight, "disc_loss": disc_loss}
    return {name: value.item() for name, value in numbers.items()}, [gradients, heads]


@pytest.mark.parametrize("disc_loss", ["hinge", "vanilla"])
@pytest.mark.parametrize("augment_prob", [0.0, 1.0])
def test_losses_and_gradients_are_those_of_the_straightforward_order(disc_loss: str, augment_prob: float) -> None:
    section = WITH_ALL.model_copy(update={"disc_loss": disc_loss, "augment_prob": augment_prob})
    batch = batch_for(0, 0)
    learner = learner_of(section)
    numbers = learner.step(batch, 0)
    expected, (decoder, heads) = straightforward(section, batch)
    for name, value in expected.items():
        assert float(numbers[name]) == pytest.approx(value, rel=1e-5), name
    assert expected["d_weight"] > 0
    assert_near({name: parameter.grad for name, parameter in learner.model.named_parameters()}, decoder)
    assert_near({name: parameter.grad for name, parameter in learner.heads.named_parameters()}, heads)


def test_the_adaptive_weight_has_a_limit() -> None:
    numbers = learner_of(WITH_ALL.model_copy(update={"max_d_weight": 0.01})).step(batch_for(0, 0), 0)
    assert float(numbers["d_weight"]) == pytest.approx(0.01)
    parts_of_it = numbers["l1"] + numbers["edges"] + 0.75 * 0.01 * numbers["gen_loss"]
    assert numbers["loss"] == pytest.approx(float(parts_of_it), rel=1e-6)


def test_until_the_adversary_starts_the_decoder_is_the_plain_one() -> None:
    learner = learner_of(SECTION.model_copy(update={"gan_start_step": 3}))
    heads = {name: value.clone() for name, value in learner.heads.state_dict().items()}
    decoder, _ = parts()

    def loss(forward: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return reconstruction(forward(batch.noised), batch)

    plain = Learner(decoder, loss, SECTION, rows=ROWS, ranks=Ranks(), device=torch.device("cpu"))
    for step in range(4):
        batch = batch_for(*divmod(step, 2))
        numbers, expected = learner.step(batch, step), plain.step(batch, step)
        assert (numbers["loss"] == expected["loss"]) == (step < 3)
        assert same(learner.tensors()["model"], plain.tensors()["model"]) == (step < 3)
        # The discriminator learns from step 1, by its own rate of step 0.
        assert same(heads, learner.tensors()["heads"]) == (step < 1)
        assert (float(numbers["disc_loss"]) == 0) == (step < 1)
        if step:
            assert learner.disc_optimizer.param_groups[0]["lr"] == learner.rate(step - 1)
        assert (float(numbers["d_weight"]), float(numbers["gen_loss"])) == (0, 0) or step >= 3


def test_heads_iterate_their_spectral_norms_in_their_own_step_alone() -> None:
    def vectors(learner: AdversarialLearner[Batch]) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in learner.heads.state_dict().items() if name.endswith("_u")}

    learner = learner_of(WITH_ALL.model_copy(update={"disc_start_step": 1}))
    before = vectors(learner)
    learner.step(batch_for(0, 0), 0)
    assert same(before, vectors(learner))
    learner.step(batch_for(0, 1), 1)
    assert not same(before, vectors(learner))


def test_a_run_resumed_in_any_phase_is_the_whole_one_to_the_bit(tmp_path: Path) -> None:
    learner = learner_of()
    train(learner, batch_for, SECTION, PAYLOAD, rows=ROWS, job=Job(tmp_path), ranks=Ranks())
    checkpoints = [load(folder) for folder in sorted((tmp_path / "checkpoints").iterdir())]
    assert [checkpoint.step for checkpoint in checkpoints] == [1, 2, 3, 4, 5]
    assert {"heads", "disc_optimizer"} < checkpoints[0].tensors.keys()
    for before, after in itertools.pairwise(checkpoints):
        resumed = learner_of()
        resumed.restore(before.tensors)
        resumed.step(batch_for(*divmod(before.step, 2)), before.step)
        for group, tensors in after.tensors.items():
            assert same(tensors, resumed.tensors()[group]), f"{group} after step {after.step}"
    last = read(tmp_path / "metrics.jsonl")[-1]
    assert {"loss", "l1", "gen_loss", "d_weight", "disc_loss", "logits_real", "logits_fake"} < last.keys()
    with pytest.raises(RaeError, match="of another model"):
        learner_of(norm_type="gn", using_spec_norm=False).restore(checkpoints[0].tensors)


@pytest.mark.parametrize("half", [2, 4])
def test_a_run_continued_from_a_finished_one_is_the_long_one_to_the_bit(half: int, tmp_path: Path) -> None:
    """Where the schedules agree: the discriminator, its optimizer and its phase go on, too."""

    def trained(name: str, steps: int, continued: Path | None = None) -> dict[str, dict[str, Tensor]]:
        section = SECTION.model_copy(update={"schedule": "constant", "steps": steps})
        learner = learner_of(section)
        places: dict[str, Any] = {"rows": ROWS, "job": Job(tmp_path / name), "ranks": Ranks()}
        train(learner, batch_for, section, PAYLOAD, continued=continued, **places)
        return learner.tensors()

    long = trained("long", 5)
    trained("half", half)
    continued = trained("continued", 5, tmp_path / f"half/checkpoints/step-{half:08d}")
    assert {"heads", "disc_optimizer"} < continued.keys() == long.keys()
    for group, tensors in long.items():
        assert same(tensors, continued[group]), group


def test_the_heads_learn_to_tell_made_images_from_real_ones() -> None:
    changes = {"lr": 5e-3, "schedule": "constant", "gan_start_step": 99, "augment_prob": 0.0}
    learner = learner_of(WITH_ALL.model_copy(update=changes))
    told = [learner.step(batch_for(step // 2, step % 2), step) for step in range(24)]
    assert float(told[-1]["disc_loss"]) < 0.9 * float(told[0]["disc_loss"])
    assert float(told[-1]["logits_real"]) > float(told[-1]["logits_fake"]) + 0.1


@pytest.mark.parametrize("part", ["edges", "generator", "discriminator"])
def test_a_loss_that_is_not_finite_stops_by_name_and_spares_the_weights(part: str) -> None:
    def ruined(made: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        l1 = (made - batch.images).abs().mean()
        edges = l1 * (math.nan if part == "edges" else 1)
        return l1 + edges, {"l1": l1, "edges": edges}

    learner = learner_of(WITH_ALL, loss=ruined)
    if part != "edges":
        torch.nn.init.constant_(learner.heads[0][2].weight_orig, math.nan)
    if part == "discriminator":
        learner.gan_start = 9
    words = {
        "edges": r"the loss became nan \(l1 0\.\d+, edges nan, gen_loss -?[\d.e-]+\) at step 1, on samples row-",
        "generator": r"the loss became nan \(l1 0\.\d+, edges 0\.\d+, gen_loss nan\) at step 1, on samples row-",
        "discriminator": r"the discriminator's loss became nan at step 1, on samples row-",
    }
    heads = learner.heads[1][2].weight_orig.clone()
    with pytest.raises(RaeError, match=words[part]):
        learner.step(batch_for(0, 0), 0)
    assert torch.equal(heads, learner.heads[1][2].weight_orig)
    if part != "discriminator":
        assert same(learner.model.state_dict(), parts()[0].state_dict())


def test_augmentation_is_a_function_of_seed_epoch_and_row() -> None:
    rows = np.array([3, 1, 7, 5])
    draws = augment_draws(0, 2, rows)
    assert draws.shape == (3, 4, 7)
    assert torch.equal(augment_draws(0, 2, rows[2:3])[:, 0], draws[:, 2])
    assert not torch.equal(augment_draws(0, 3, rows), draws)
    assert not torch.equal(augment_draws(1, 2, rows), draws)
    assert len(draws.flatten().unique()) == draws.numel()  # judged, fake and real images have draws of their own
    images = batch_of(rows, 2).images
    together, alone = (diff_augment(images[part], draws[0, part], 0.5) for part in (slice(None), slice(2, 3)))
    assert torch.equal(together[2:3], alone)


def test_bf16_computes_in_bf16_and_keeps_float32_weights() -> None:
    batch = batch_for(0, 0)
    half = learner_of(WITH_ALL.model_copy(update={"precision": "bf16"}))
    numbers, expected = half.step(batch, 0), learner_of(WITH_ALL).step(batch, 0)
    assert {tensor.dtype for group in half.tensors().values() for tensor in group.values()} == {torch.float32}
    assert numbers["loss"] == pytest.approx(expected["loss"], rel=0.05)
    assert numbers["loss"] != expected["loss"]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_it_learns_the_same_under_the_same_names() -> None:
    plain, compiled = learner_of(WITH_ALL), learner_of(WITH_ALL.model_copy(update={"compile": True}))
    for step in range(2):
        expected, numbers = (learner.step(batch_for(0, step), step) for learner in (plain, compiled))
        assert numbers["loss"] == pytest.approx(expected["loss"], rel=1e-4)
    assert {group: tensors.keys() for group, tensors in plain.tensors().items()} == {
        group: tensors.keys() for group, tensors in compiled.tensors().items()
    }


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: torch.zeros_like(one) if one.grad is None else one.grad for name, one in model.named_parameters()}


@pytest.mark.parametrize("step", [0, 2])
def test_parts_of_a_batch_are_the_batch(step: int) -> None:
    """The adaptive weight and the spectral norms are those of the whole batch."""
    section = SECTION.model_copy(update={"clip_grad": 0.0})
    whole, parts = learner_of(section), learner_of(section.model_copy(update={"grad_accum_steps": 2}))
    # An epoch in which no pixel of a made image lies on the edge of two 8-bit levels, where a last bit would tip it.
    expected, numbers = (learner.step(batch_for(1, 0), step) for learner in (whole, parts))
    assert expected.keys() == numbers.keys()
    for name, value in expected.items():
        assert float(numbers[name]) == pytest.approx(float(value), rel=1e-5, abs=1e-7), name
    begun = [name for name in ("disc_loss", "d_weight") if float(expected[name])]
    assert begun == ["disc_loss", "d_weight"][:step]
    for ours, theirs in ((parts.model, whole.model), (parts.heads, whole.heads)):
        assert_near(gradients_of(ours), gradients_of(theirs))
    vectors = [dict(learner.heads.named_buffers()) for learner in (parts, whole)]
    assert same(*vectors)


def test_any_number_of_ranks_and_parts_is_one_process(tmp_path: Path) -> None:
    script = str(Path(__file__).with_name("gan_ranks.py"))
    scales = {"one": (1, 1), "two": (2, 1), "accumulated": (2, 2), "four": (4, 1)}
    for name, (processes, pieces) in scales.items():
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        done = subprocess.run(
            [sys.executable, *(torchrun if processes > 1 else ()), script, str(tmp_path / name), str(pieces)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
    one = read(tmp_path / "one" / "metrics.jsonl")
    assert len(one) == 5
    for name in scales:
        log = read(tmp_path / name / "metrics.jsonl")
        for key in ("loss", "l1", "gen_loss", "d_weight", "disc_loss", "logits_real", "grad_norm", "disc_grad_norm"):
            wanted = pytest.approx([line[key] for line in one], rel=1e-5, abs=1e-6)
            assert [line[key] for line in log] == wanted, (name, key)


class TestCommand:
    """`rae train-decoder` with every loss: features of the encoder, DINO with drawn weights."""

    SETTINGS: tuple[str, ...] = (
        "train_decoder.perceptual_loss=encoder",
        "train_decoder.perceptual_start_step=1",
        "train_decoder.adversarial_loss=dino",
        "train_decoder.recipe=S_16",
        "train_decoder.disc_start_epoch=0.1",  # step 1 of 48 samples in batches of 2
        "train_decoder.gan_start_step=2",
        "train_decoder.steps=3",
        "train_decoder.batch_size=2",
        "train_decoder.log_every=1",
    )

    @pytest.fixture(scope="class")
    @staticmethod
    def dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
        path = tmp_path_factory.mktemp("dino") / "drawn.pth"
        torch.save(DinoDiscriminator("S_16").backbone.state_dict(), path)
        return path

    def words(self, *more: str) -> list[str]:
        return [word for setting in (*self.SETTINGS, *more) for word in ("-s", setting)]

    def test_trains_with_every_loss(self, rae_with: Callable[..., Rae], dino: Path) -> None:
        rae = rae_with("shards")
        ran = rae.verb("train-decoder", *self.words(f"train_decoder.disc_weights={dino}"), "--json").succeeded()
        metrics = ran.json["metrics"]
        assert metrics["adversarial_loss"] == "DINO S_16"
        log = read(next(rae.workspace.glob("objects/decoder/*/attempts/*/metrics.jsonl")))
        begun = {
            name: [line[name] != 0 for line in log] for name in ("perceptual", "disc_loss", "gen_loss", "d_weight")
        }
        assert begun["perceptual"] == [False, True, True]
        assert begun["gen_loss"] == begun["d_weight"] == [False, False, True]
        recipe = rae.artifact("decoder/tiny")["recipe"]
        assert "dino/S_16" in recipe["weights"]
        assert "disc_weights" not in recipe["config"]["train_decoder"]

    def test_a_run_that_ends_before_the_adversary_says_so(self, rae_with: Callable[..., Rae], dino: Path) -> None:
        words = self.words(f"train_decoder.disc_weights={dino}", "train_decoder.gan_start_step=3")
        ran = rae_with("shards").verb("train-decoder", *words).succeeded()
        assert "the adversarial term would begin at step 3 and training ends at 3" in ran.err

    def test_is_refused_without_the_weights(
        self, rae_with: Callable[..., Rae], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("TORCH_HOME", str(tmp_path))
        refused = rae_with("shards").verb("train-decoder", *self.words())
        refused.refused(3, "dino_vit_small_patch16_224.pth", str(tmp_path), "train_decoder.adversarial_loss=encoder")

    def test_refuses_another_network(self, rae_with: Callable[..., Rae], dino: Path) -> None:
        words = self.words(f"train_decoder.disc_weights={dino}", "train_decoder.recipe=S_8")
        rae_with("shards").verb("train-decoder", *words).refused(5, "does not fit the discriminator's backbone")
