"""`rae sample`: an image depends on (seed, index, class) alone."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import rae as api
from rae.stages import sample
from rae.stages.job import Job
from rae.stages.models.compatible import check_compatible, check_guide
from rae.stages.models.decoder import DecoderConfig, ViTDecoder
from rae.stages.models.dit import DiTConfig, build_dit
from rae.stages.models.trained import Decoder, Dit, DitDescription, save_decoder, save_dit
from rae.stages.sample import choose_labels, draw, draw_all, run
from rae.stages.sections import SampleSection
from rae.stages.training import randomness
from rae.store.errors import ConfigError, CorruptData, StaleInput
from rae.store.samples import read_batches

ENCODER = {"digest": "d", "feature_index": 3, "input_size": 64, "token_dim": 8, "grid": [2, 2]}
SECTION = SampleSection(num_images=6, num_steps=5, batch_size=6)


@pytest.fixture(scope="module")
def models() -> tuple[Dit, Decoder]:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": (16, 16), "depth": (1, 1), "num_heads": (1, 1)}
    config = DiTConfig(model="DiT-DH", in_channels=8, input_size=2, num_classes=3, **sizes)
    model = build_dit(config)
    for parameter in model.parameters():  # adaLN-zero makes a fresh model answer zero
        torch.nn.init.normal_(parameter, std=0.2)
    about = DitDescription(config, {"time_dist_shift": 1.0}, ENCODER)
    dit = Dit(model, about, mean=torch.ones(8, 2, 2), var=torch.full((8, 2, 2), 4.0))
    decoding = DecoderConfig(
        token_dim=8, grid=2, hidden_size=16, depth=1, num_heads=2, intermediate_size=16, patch_size=4,
        image_mean=(0.5, 0.5, 0.5), image_std=(0.5, 0.5, 0.5),
    )  # fmt: skip
    return dit, Decoder(ViTDecoder(decoding), ENCODER)


def test_an_image_of_no_class_needs_labels_that_were_dropped(models: tuple[Dit, Decoder]) -> None:
    dit, decoder = models
    assert api.sample(dit, decoder, [3], num_steps=2).shape == (1, 8, 8, 3)
    config = dataclasses.replace(dit.config, class_dropout_prob=0.0)
    always = Dit(build_dit(config), dataclasses.replace(dit.about, config=config), dit.mean, dit.var)
    assert api.sample(always, decoder, [2], num_steps=2).shape == (1, 8, 8, 3)
    with pytest.raises(ConfigError, match="there is no class 3: of classes the transformer knows 0 to 2"):
        api.sample(always, decoder, [3], num_steps=2)


def test_an_image_that_is_not_finite_is_told_and_not_drawn_black(models: tuple[Dit, Decoder]) -> None:
    dit, decoder = models
    broken = Dit(build_dit(dit.config), dit.about, dit.mean, dit.var)
    with torch.no_grad():
        broken.model.y_embedder.embedding_table.weight[1] = torch.nan
        broken.model.final_layer.linear.bias += 1
        torch.nn.init.normal_(broken.model.final_layer.adaLN_modulation[1].weight)
    with pytest.raises(CorruptData, match="image 2 is not finite"):
        draw_all(broken, decoder, np.array([0, 2, 1, 0]), SECTION)


@pytest.mark.parametrize("sampler", ["euler", "heun", "adaptive", "sde"])
def test_an_image_does_not_depend_on_its_neighbours(models: tuple[Dit, Decoder], sampler: str) -> None:
    points = {} if sampler == "adaptive" else {"num_steps": 6}
    section = SampleSection(num_images=6, sampler=sampler, batch_size=6, **points)
    labels, indices = np.array([0, 1, 2, 0, 1, 2]), np.arange(6)
    whole = draw_all(*models, labels, section)
    assert whole.shape == (6, 8, 8, 3)
    assert whole.dtype == np.uint8
    assert len(np.unique(whole.reshape(6, -1), axis=0)) == 6
    floats = draw(*models, labels, indices, section)
    for batch_size in (1, 7, 64):
        other = section.model_copy(update={"batch_size": batch_size})
        starts = range(0, 6, batch_size)
        batches = [slice(first, first + batch_size) for first in starts]
        split = torch.cat([draw(*models, labels[batch], indices[batch], other) for batch in batches])
        torch.testing.assert_close(split, floats, atol=1e-4, rtol=0)
    changed = draw_all(*models, np.array([0, 1, 2, 0, 1, 0]), section)
    np.testing.assert_array_equal(changed[:5], whole[:5])
    assert not np.array_equal(changed[5], whole[5])
    np.testing.assert_array_equal(draw_all(*models, labels[:2], section), whole[:2])
    np.testing.assert_array_equal(draw_all(*models, labels, section), whole)
    assert not np.array_equal(draw_all(*models, labels, section.model_copy(update={"seed": 1})), whole)


def test_the_sde_draws_other_noise_for_every_image_and_step(
    models: tuple[Dit, Decoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []

    def recorded(shape: Any, seed: int, purpose: str, epoch: int, rows: np.ndarray, device: Any) -> torch.Tensor:
        numbers = randomness.normal(shape, seed, purpose, epoch, rows, device)
        drawn.extend(numbers.flatten(1))
        return numbers

    monkeypatch.setattr(sample, "normal", recorded)
    draw_all(*models, np.array([0, 1, 2]), SampleSection(sampler="sde", num_steps=5, batch_size=3))
    assert len(torch.stack(drawn).unique(dim=0)) == len(drawn) == 3 + 3 * 3  # the start, and all steps but the last


def test_guidance_moves_the_images_only_when_it_is_asked_for(models: tuple[Dit, Decoder]) -> None:
    labels = np.array([0, 1])
    plain = draw_all(*models, labels, SECTION)
    guided = draw_all(*models, labels, SECTION.model_copy(update={"guidance_scale": 3.0}))
    assert not np.array_equal(plain, guided)
    nowhere = {"guidance_scale": 3.0, "guidance_interval": (0.0, 1e-6)}
    np.testing.assert_array_equal(draw_all(*models, labels, SECTION.model_copy(update=nowhere)), plain)


@pytest.mark.parametrize("sampler", ["euler", "adaptive", "sde"])
def test_a_guide_takes_the_place_of_the_unlabelled_prediction(models: tuple[Dit, Decoder], sampler: str) -> None:
    section = SampleSection(sampler=sampler, guidance_scale=2.0, batch_size=2)
    dit, decoder = models
    labels, guide = np.array([0, 1]), weaker(dit)
    guided = draw_all(dit, decoder, labels, section, guide)
    assert not np.array_equal(guided, draw_all(dit, decoder, labels, section))
    # A transformer that is its own guide is not guided.
    plain = draw_all(dit, decoder, labels, section.model_copy(update={"guidance_scale": 1.0}))
    own = draw_all(dit, decoder, labels, section, dit)
    assert np.abs(own.astype(int) - plain.astype(int)).max() <= 1
    assert np.abs(guided.astype(int) - plain.astype(int)).max() > 1


def weaker(dit: Dit, **changes: Any) -> Dit:
    """The transformer with other weights; `changes` are to what it says of itself."""
    stats = {key: changes.pop(key, getattr(dit, key)) for key in ("mean", "var")}
    about = dataclasses.replace(dit.about, **changes)
    model = build_dit(about.config)
    torch.manual_seed(1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return Dit(model, about, **stats)


def test_a_guide_of_other_latents_classes_or_transport_is_refused(models: tuple[Dit, Decoder]) -> None:
    dit = models[0]
    check_guide(dit, weaker(dit, transport={"time_dist_shift": 2.0}, classes=("a", "b", "c")))
    more = dataclasses.replace(dit.config, num_classes=4)
    for changes, field in (
        ({"transport": {"prediction": "data"}}, 'prediction: found "data", asked "velocity"'),
        ({"transport": {"path_type": "GVP"}}, "path_type"),
        ({"mean": torch.zeros(8, 2, 2)}, "latent_stats"),
        ({"config": more}, "num_classes: found 4, asked 3"),
    ):
        with pytest.raises(StaleInput, match=field):
            check_guide(dit, weaker(dit, **changes))
    with pytest.raises(StaleInput, match="classes"):
        check_guide(weaker(dit, classes=("a", "b", "c")), weaker(dit, classes=("a", "c", "b")))


def stored(payload: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of a samples artifact."""
    batches = list(read_batches(payload))
    return np.concatenate([batch.images for batch in batches]), np.concatenate([batch.labels for batch in batches])


def test_images_of_an_unconditional_transformer_are_recorded_without_a_label(
    models: tuple[Dit, Decoder], tmp_path: Path
) -> None:
    """Else scoring would hold them against the real images of class 0."""
    dit, decoder = models
    config = dataclasses.replace(dit.config, num_classes=0)
    weights = build_dit(config).state_dict()
    about, stats = DitDescription(config, {"time_dist_shift": 1.0}, ENCODER), (dit.mean, dit.var)
    for folder in ("dit", "decoder", "samples"):
        (tmp_path / folder).mkdir()
    save_dit(tmp_path / "dit", about, stats, weights, weights)
    save_decoder(tmp_path / "decoder", decoder.model.config, ENCODER, *[decoder.model.state_dict()] * 2)
    seen: list[tuple[int, int]] = []
    job = Job(tmp_path / "samples", progress=lambda done, total, unit, **_: seen.append((done, total)))
    run(SECTION, tmp_path / "dit", tmp_path / "decoder", None, job)
    images, labels = stored(tmp_path / "samples")
    assert images.shape == (6, 8, 8, 3)
    assert labels.tolist() == [-1] * 6
    assert seen == [(1, 6), (3, 6), (4, 6), (6, 6), (6, 6)]  # four steps of six images


def test_a_run_is_guided_by_the_artifact_that_it_is_given(models: tuple[Dit, Decoder], tmp_path: Path) -> None:
    dit, decoder = models
    guide, other = weaker(dit), weaker(dit, mean=torch.zeros(8, 2, 2))
    for name, one in {"dit": dit, "guide": guide, "other": other}.items():
        (tmp_path / name).mkdir()
        save_dit(tmp_path / name, one.about, (one.mean, one.var), None, one.model.state_dict())
    (tmp_path / "decoder").mkdir()
    save_decoder(tmp_path / "decoder", decoder.model.config, ENCODER, None, decoder.model.state_dict())
    section = SampleSection(num_images=6, num_steps=5, batch_size=6, guidance_scale=2.0)
    (tmp_path / "samples").mkdir()
    result = run(section, tmp_path / "dit", tmp_path / "decoder", tmp_path / "guide", Job(tmp_path / "samples"))
    assert result.metrics["time_dist_shift"] == 1.0
    images, labels = stored(tmp_path / "samples")
    np.testing.assert_array_equal(images, draw_all(dit, decoder, labels, section, guide))
    with pytest.raises(StaleInput, match="latent_stats"):
        run(section, tmp_path / "dit", tmp_path / "decoder", tmp_path / "other", Job(tmp_path / "samples"))


def test_labels_are_balanced_or_the_listed_ones_in_turn() -> None:
    assert choose_labels(SECTION, 3).tolist() == [0, 1, 2, 0, 1, 2]
    assert choose_labels(SECTION.model_copy(update={"classes": (2, 0)}), 3).tolist() == [2, 0, 2, 0, 2, 0]
    assert choose_labels(SECTION, 0).tolist() == [0] * 6
    with pytest.raises(ConfigError, match="asks for class 3, and the transformer knows 0 to 2"):
        choose_labels(SECTION.model_copy(update={"classes": (3,)}), 3)
    with pytest.raises(ConfigError, match="unconditional"):
        choose_labels(SECTION.model_copy(update={"classes": (0,)}), 0)


def test_a_decoder_of_other_tokens_is_refused_with_the_fields() -> None:
    check_compatible(ENCODER, dict(ENCODER))
    with pytest.raises(StaleInput, match=r"encoder.grid: found \[4, 4\], asked \[2, 2\]"):
        check_compatible(ENCODER, {**ENCODER, "grid": [4, 4]})
