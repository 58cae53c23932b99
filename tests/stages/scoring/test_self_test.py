"""`rae evaluate --self-test`: an extractor that makes other features is found, and what cannot be known is said."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest

from rae.stages.models.weights import digest_file
from rae.stages.scoring.extractor_files import ExtractorFiles, locate_extractor
from rae.stages.scoring.extractors import Extractor
from rae.stages.scoring.load_extractor import load_extractor
from rae.stages.scoring.self_test import TOLERANCE, self_test, synthetic_images
from tests.conftest import Rae
from tests.stages.scoring.drawn_inception import write_inception

CARRIED = "efficientnet-lite0"


@pytest.fixture
def carried() -> tuple[Extractor, ExtractorFiles]:
    return load_extractor(CARRIED), locate_extractor(CARRIED)


def test_synthetic_images_are_the_same_everywhere() -> None:
    sums = [int(synthetic_images(side).astype(np.int64).sum()) for side in (64, 320)]
    assert sums == [5531570, 150572916]
    assert synthetic_images(64).std(axis=(1, 2, 3)).min() > 40


def test_the_carried_extractor_makes_the_features_that_timm_alone_made(
    carried: tuple[Extractor, ExtractorFiles],
) -> None:
    found = self_test(*carried)
    assert found.verified is True
    assert found.deviation is not None
    assert found.deviation < TOLERANCE / 10


@pytest.mark.parametrize("resize", ["bicubic", "pillow-bicubic"])
def test_another_resize_is_found_out(carried: tuple[Extractor, ExtractorFiles], resize: str) -> None:
    extractor, files = carried
    right = extractor.preprocessing
    wrong = dataclasses.replace(right, resize=resize, described=right.description)  # type: ignore[arg-type]
    extractor.preprocessing = wrong
    found = self_test(extractor, files)
    assert found.verified is False
    assert found.deviation is not None
    assert found.deviation > 100 * TOLERANCE


def test_values_of_another_protocol_verify_nothing() -> None:
    found = self_test(load_extractor(CARRIED, input_size=128), locate_extractor(CARRIED))
    assert found.verified is None
    assert "not verified on this machine" in found.said
    assert "input_size: found 224, asked 128" in found.said


def test_inception_is_held_against_torch_fidelity_and_not_called_verified(tmp_path: Path) -> None:
    path = write_inception(tmp_path / "drawn.pth")
    digest = digest_file(path)
    extractor = load_extractor("inception", str(path), sha256=digest)
    found = self_test(extractor, locate_extractor("inception", str(path), digest))
    assert found.verified is None
    assert "no values of the true weights are stored" in found.said
    assert re.search(r"equal torch-fidelity's own forward in float64, image by image, to \d", found.said)
    assert digest[:8] in found.said
    assert found.deviation is not None
    assert found.deviation < TOLERANCE


def test_the_command_tells_what_was_verified_and_what_was_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rae = Rae(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    found = {one["extractor"]: one for one in rae("evaluate", "--self-test", "--json").succeeded().json}
    assert found[CARRIED]["verified"] is True
    assert found["inception"]["verified"] is None
    assert "not verified on this machine: the extractor `inception` needs" in found["inception"]["said"]
    out = rae.verb("evaluate", "--self-test", "-s", "evaluate.extractor_input_size=224").succeeded().out
    assert "agree with the stored values" in re.sub(r"\s+", " ", out)
    assert "inception" not in out
    rae("evaluate").refused(2, "rae evaluate CONFIG")


def test_scores_say_whether_their_extractor_was_verified(finished: Rae) -> None:
    provenance = finished.artifact("scores/tiny")["provenance"]
    assert provenance["self_test"]["verified"] is None  # values are stored at 224 pixels, and this scores at 32
    page = (finished.workspace / "reports/tiny.html").read_text(encoding="utf-8")
    assert "Self-test of the extractor: agreement was not verified on this machine: values are stored for" in page
