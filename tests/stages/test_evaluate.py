"""`rae evaluate`: what its protocol says, and how scores of reconstruction fall with noise on the tokens."""

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from rae.stages.evaluate import drawn_with
from rae.store.manifest import Manifest
from tests.conftest import TINY, Rae


def test_the_protocol_of_samples_names_their_guide_and_the_shift_of_their_times() -> None:
    dit, guide = ({"kind": "dit", "id": digit * 16, "content": ""} for digit in "12")
    settings, metrics = {"sample": {"guidance_scale": 1.5, "batch_size": 64}}, {"images": 4, "time_dist_shift": 6.93}
    plain = Manifest("samples", "x", {}, "", {"dit": dit}, settings, [], metrics)
    assert drawn_with(plain) == {"guidance_scale": 1.5, "time_dist_shift": 6.93}
    guided = dataclasses.replace(plain, inputs={"dit": dit, "guide": guide})
    assert drawn_with(guided) == {"guidance_scale": 1.5, "time_dist_shift": 6.93, "guide": guide["id"]}


LEVELS = [0.5, 0, 1, 2]


@pytest.fixture(scope="module")
def decoder_alone(tmp_path_factory: pytest.TempPathFactory) -> Rae:
    """A decoder that has learned something, in a configuration without a transformer."""
    longer = {"steps": 60, "lr": 3e-3, "ema_decay": 0.9, "noise_tau": 0.0, "checkpoint_every": 60}
    sections: dict[str, Any] = {key: TINY[key] for key in ("shards", "encode")}
    # No extractor is asked for, so that one that is not there is no matter.
    evaluate = {"latent_noise": LEVELS, "extractor_weights": "nowhere.pth", "batch_size": 6}
    rae = Rae(
        tmp_path_factory.mktemp("alone"),
        sections | {"train_decoder": TINY["train_decoder"] | longer, "evaluate": evaluate},
    )
    rae.verb("run").succeeded()
    return rae


def scores(rae: Rae, *words: str) -> Any:
    made = rae.verb("evaluate", "--json", *words).succeeded().json
    (path,) = Path(made["path"]).rglob("scores.json")
    return json.loads(path.read_text()), made["metrics"]


def test_reconstructions_get_worse_with_noise_on_their_tokens(decoder_alone: Rae) -> None:
    found, metrics = scores(decoder_alone)
    by_level = {one["level"]: one for one in found["latent_noise"]}
    assert list(by_level) == LEVELS
    assert by_level[0] == {"level": 0, **found["reconstruction"]}
    rising = [by_level[level] for level in sorted(LEVELS)]
    for before, after in itertools.pairwise(rising):
        assert after["psnr_db"] < before["psnr_db"] - 0.1
        assert after["perceptual_distance"] > before["perceptual_distance"]
    assert metrics["reconstruction_psnr_db_at_noise_0.5"] == by_level[0.5]["psnr_db"]
    assert "efficientnet-lite0" in found["protocol"]["perceptual_distance"]["description"]
    assert "generation" not in found


def test_any_decoder_is_scored_by_its_reference(decoder_alone: Rae, tmp_path: Path) -> None:
    found, metrics = scores(decoder_alone)
    other = Rae(tmp_path, {key: decoder_alone.sections[key] for key in ("shards", "encode", "evaluate")})
    other.workspace = decoder_alone.copy(tmp_path / "copy", "shards", "decoder").workspace
    other.verb("evaluate").refused(2, "no section `train_decoder`")
    alone, again = scores(other, "-s", "evaluate.decoder=decoder/tiny")
    assert alone == found
    assert again["reconstruction_psnr_db_at_noise_0.5"] == metrics["reconstruction_psnr_db_at_noise_0.5"]
    # It is what the configuration that trained the decoder would make.
    assert decoder_alone.content("scores") == other.content("scores")


def test_a_decoder_that_is_scored_by_its_reference_has_no_samples(finished: Rae) -> None:
    named = "-s", "evaluate.decoder=decoder/tiny"
    finished.verb("evaluate", *named).refused(2, "`evaluate.decoder`", "-s sample=null")
    finished.verb("evaluate", "-s", "sample=null", "-s", "evaluate.decoder=decoder/none").refused(3, "decoder/none")
    finished.verb("plan", "-s", "sample=null", "-s", "evaluate.decoder=decoder/none").refused(3, "decoder/none")


def test_noise_is_a_function_of_the_row(decoder_alone: Rae) -> None:
    found, _ = scores(decoder_alone)
    other, _ = scores(decoder_alone, "-s", "evaluate.batch_size=20", "-s", "evaluate.latent_noise=[1]")
    again, _ = scores(decoder_alone, "-s", "evaluate.seed=1")
    assert other["latent_noise"][0] == pytest.approx(found["latent_noise"][2], rel=1e-4)
    assert other["reconstruction"] == pytest.approx(found["reconstruction"], rel=1e-4)
    assert again["latent_noise"][2] != pytest.approx(found["latent_noise"][2], rel=1e-4)
    assert again["latent_noise"][1] == found["latent_noise"][1]


def test_without_levels_or_a_distance_there_is_less_to_say(decoder_alone: Rae) -> None:
    words = ("-s", "evaluate.latent_noise=[]", "-s", "evaluate.perceptual_distance=none")
    found, metrics = scores(decoder_alone, *words)
    assert set(found) == {"reconstruction", "protocol"}
    assert set(found["reconstruction"]) == {"psnr_db", "ssim"}
    assert not [name for name in metrics if "noise" in name]


def test_the_report_shows_pictures_by_level(decoder_alone: Rae) -> None:
    page = (decoder_alone.workspace / "reports/tiny.html").read_text(encoding="utf-8")
    assert "PSNR, dB by level of noise" in page
    assert "perceptual distance by level of noise" in page
    for level in ("0", "0.5", "1", "2"):
        assert page.count(f'alt="level {level}, picture') == 6
    assert page.count(' of the levels"') == 6


def test_lpips_is_asked_for_by_its_own_name(
    decoder_alone: Rae, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    said = decoder_alone.verb("evaluate", "-s", "evaluate.perceptual_distance=lpips")
    said.refused(3, "`evaluate.lpips_weights`", "-s evaluate.perceptual_distance=encoder")
    decoder_alone.verb("evaluate", "-s", "evaluate.lpips_weights=x.pth").refused(2, "has no part in")
    decoder_alone.verb("evaluate", "-s", "evaluate.latent_noise=[1, 1.0]").refused(2, "has a level twice")
