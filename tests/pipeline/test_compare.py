"""`rae compare`: side by side what was measured alike, and the differing fields of what was not."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from rae.store.artifacts import Workspace
from rae.store.manifest import Manifest
from tests.conftest import Rae

PROTOCOL: dict[str, Any] = {
    "images": 1000,
    "labels": {"0": 500, "1": 500},
    "extractor": {"name": "inception", "digest": "6726825d", "input_size": None},
    "sample": {"sampler": "euler", "num_steps": 50, "guidance_scale": 1.0, "time_dist_shift": 6.93},
}


class Scores(Rae):
    """A workspace of scores that nobody had to take."""

    def publish(self, name: str, distance: float, **changes: Any) -> None:
        """Scores by `PROTOCOL`, but for `changes`; a field of `sample` is given as `sample__num_steps`."""
        protocol = deepcopy(PROTOCOL)
        for key, value in changes.items():
            *way, last = key.split("__")
            place = protocol
            for step in way:
                place = place[step]
            place[last] = value
        workspace = Workspace(self.workspace)
        work = workspace.begin("scores", name, {"kind": "scores", "name": name}, {})
        path = work.attempt / "scores.json"
        metrics = {"frechet_distance": distance, "recall": 0.5}
        path.write_text(json.dumps({"protocol": protocol, "generation": {"samples": metrics}}))
        files = [{"path": path.relative_to(work.folder).as_posix(), "bytes": path.stat().st_size, "sha256": ""}]
        manifest = Manifest("scores", name, work.recipe, "", {}, {}, files, {"seconds": 1.0, **metrics})
        workspace.publish(work, manifest)

    def compare(self, *words: str) -> Any:
        return self("compare", *words, "-w", self.workspace)


@pytest.fixture
def scores(tmp_path: Path) -> Scores:
    return Scores(tmp_path)


def test_scores_of_one_protocol_stand_side_by_side(scores: Scores) -> None:
    for name, distance in (("a", 1.87), ("b", 2.41), ("c", 7.5)):
        scores.publish(name, distance)
    lines = scores.compare("a", "scores/b", "c").succeeded().out.splitlines()
    assert [line.split() for line in lines if "frechet" in line] == [
        ["frechet_distance", "lower", "1.87", "2.41", "7.5"]
    ]
    assert [line.split()[1] for line in lines if "recall" in line] == ["higher"]
    found = scores.compare("a", "b", "--json").succeeded().json
    assert [one["ref"] for one in found["scores"]] == ["a", "b"]
    assert found["scores"][1]["metrics"] == {"frechet_distance": 2.41, "recall": 0.5}
    assert found["protocol"]["sample.time_dist_shift"] == 6.93
    assert found["excepted"] == {}


def test_scores_of_other_protocols_are_refused_with_the_fields_that_differ(scores: Scores) -> None:
    scores.publish("a", 1.87)
    scores.publish("b", 2.41, sample__num_steps=250, extractor__digest="ffff")
    said = scores.compare("a", "b")
    said.refused(4, "sample.num_steps: 50 of a, 250 of b", "extractor.digest: 6726825d of a, ffff of b")
    assert "guidance_scale" not in said.err
    scores.publish("unknown", 1.0, extractor={})
    scores.compare("a", "unknown").refused(4, "extractor.name: inception of a, nothing of unknown")
    scores.publish("unbalanced", 1.0, labels={"0": 999, "1": 1})
    scores.compare("a", "unbalanced").refused(
        4, "labels: 2 classes, 500 images each of a, 2 classes, 1 to 999 images each of unbalanced"
    )


def test_a_field_that_is_what_one_compares_is_excepted_and_shown(scores: Scores) -> None:
    scores.publish("plain", 3.0)
    scores.publish("guided", 1.5, sample__guidance_scale=1.42)
    said = scores.compare("plain", "guided")
    said.refused(4, "rae compare plain guided --except=sample.guidance_scale")
    out = scores.compare("plain", "guided", "--except=sample.guidance_scale").succeeded().out
    assert [line.split() for line in out.splitlines() if "guidance" in line] == [
        ["sample.guidance_scale", "1.0", "1.42"]
    ]
    found = scores.compare("plain", "guided", "--except", "sample", "--json").succeeded().json
    assert found["excepted"] == {"sample.guidance_scale": [1.0, 1.42]}
    assert "sample.guidance_scale" not in found["protocol"]
    assert found["protocol"]["sample.num_steps"] == 50
    scores.compare("plain", "guided", "--except", "guidance_scale").refused(
        2, "no protocol has a field `guidance_scale`; did you mean `sample.guidance_scale`?"
    )


def test_one_of_three_that_differs_is_enough(scores: Scores) -> None:
    scores.publish("a", 1.0)
    scores.publish("b", 2.0)
    scores.publish("c", 3.0, images=999)
    scores.compare("a", "b", "c").refused(4, "images: 1,000 of a, 1,000 of b, 999 of c")


def test_what_cannot_be_compared_is_refused(scores: Scores, finished: Rae) -> None:
    scores.publish("a", 1.0)
    scores.compare("a").refused(2, "two scores or more")
    scores.compare("a", "nowhere").refused(3, "no scores `nowhere`")
    finished("compare", "samples/tiny", "tiny", "-w", finished.workspace).refused(4, "is of kind samples")
    (path,) = scores.workspace.rglob("scores.json")
    path.write_text("{}")
    scores.compare("a", "a").refused(5, "does not hold scores")


def test_real_scores_compare_with_themselves(finished: Rae) -> None:
    found = finished("compare", "tiny", "scores/tiny", "-w", finished.workspace, "--json").succeeded().json
    one, other = (scores["metrics"] for scores in found["scores"])
    assert one == other
    assert {"reconstruction_psnr_db", "frechet_distance"} <= set(one)
    assert "seconds" not in one
