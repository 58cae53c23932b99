"""`rae sample`: an image depends on (seed, index, class) alone."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rae.stages.evaluate import load_samples
from rae.stages.job import Job
from rae.stages.models.decoder import DecoderConfig, ViTDecoder
from rae.stages.models.dit import DiTConfig, build_dit
from rae.stages.models.trained import Decoder, Dit, DitDescription, check_compatible, save_decoder, save_dit
from rae.stages.sample import choose_labels, draw_all, run
from rae.stages.sections import SampleSection
from rae.store.artifacts import Artifact
from rae.store.errors import ConfigError, StaleInput
from rae.store.manifest import Manifest

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


def test_an_image_does_not_depend_on_its_neighbours(models: tuple[Dit, Decoder]) -> None:
    labels = np.array([0, 1, 2, 0, 1, 2])
    whole = draw_all(*models, labels, SECTION)
    assert whole.shape == (6, 8, 8, 3)
    assert whole.dtype == np.uint8
    assert len(np.unique(whole.reshape(6, -1), axis=0)) == 6
    for batch_size in (1, 4):
        split = draw_all(*models, labels, SECTION.model_copy(update={"batch_size": batch_size}))
        assert np.abs(split.astype(int) - whole.astype(int)).max() <= 1
    changed = draw_all(*models, np.array([0, 1, 2, 0, 1, 0]), SECTION)
    np.testing.assert_array_equal(changed[:5], whole[:5])
    assert not np.array_equal(changed[5], whole[5])
    np.testing.assert_array_equal(draw_all(*models, labels, SECTION), whole)
    assert not np.array_equal(draw_all(*models, labels, SECTION.model_copy(update={"seed": 1})), whole)


def test_guidance_moves_the_images_only_when_it_is_asked_for(models: tuple[Dit, Decoder]) -> None:
    labels = np.array([0, 1])
    plain = draw_all(*models, labels, SECTION)
    guided = draw_all(*models, labels, SECTION.model_copy(update={"guidance_scale": 3.0}))
    assert not np.array_equal(plain, guided)
    nowhere = {"guidance_scale": 3.0, "guidance_interval": (0.0, 1e-6)}
    np.testing.assert_array_equal(draw_all(*models, labels, SECTION.model_copy(update=nowhere)), plain)


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
    inputs = [Artifact(tmp_path / kind, Manifest(kind, kind, {}, "", {}, {}, [], {})) for kind in ("dit", "decoder")]
    run(SECTION, *inputs, Job(tmp_path / "samples"))
    images, labels = load_samples(Artifact(tmp_path / "samples", inputs[0].manifest))
    assert images.shape == (6, 8, 8, 3)
    assert labels.tolist() == [-1] * 6


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
