"""`rae evaluate CONFIG --images`: images from elsewhere have the scores that the same images have as samples."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rae.store.artifacts import Workspace
from tests.conftest import TINY, Rae


@pytest.fixture(scope="module")
def known(finished: Rae, tmp_path_factory: pytest.TempPathFactory) -> Rae:
    """The small pipeline with its samples, exported, and a reference of its training images."""
    rae = finished.copy(tmp_path_factory.mktemp("known"), "shards", "latents", "decoder", "dit", "samples", "scores")
    rae("export", "png", "samples/tiny", rae.folder / "png", "-w", rae.workspace).succeeded()
    rae("export", "adm-npz", "samples/tiny", rae.folder / "tiny.npz", "-w", rae.workspace).succeeded()
    rae.verb("evaluate", "--make-reference", "train").succeeded()
    return rae


def scores(made: Any) -> Any:
    (path,) = Path(made.succeeded().json["path"]).rglob("scores.json")
    return json.loads(path.read_text())


def evaluate(rae: Rae, images: Path, *words: str) -> Any:
    return scores(rae.verb("evaluate", "--json", "--images", images, *words))


def without_labels(folder: Path, out: Path) -> Path:
    out.mkdir()
    for path in folder.iterdir():
        shutil.copy(path, out / f"{path.stem.split('_')[0]}.png")
    return out


@pytest.mark.parametrize("exported", ["png", "tiny.npz"])
def test_exported_samples_have_the_scores_of_the_samples(exported: str, known: Rae) -> None:
    samples = scores(known.verb("evaluate", "--json"))
    given = evaluate(known, known.folder / exported)
    assert set(given["generation"]) == {"samples", "real", "class_means", "pixel_gaussian"}
    for row, expected in samples["generation"].items():
        assert given["generation"][row] == pytest.approx(expected, rel=1e-6), row
    assert "class_agreement" in given["generation"]["samples"]
    card = given["protocol"]
    assert card.pop("sample") == "unknown"
    assert card == {name: samples["protocol"].get(name) for name in card}
    compare = ("compare", "tiny", "tiny-images", "-w", known.workspace)
    known(*compare).refused(4, "sample: nothing of tiny, unknown of tiny-images")
    table = known(*compare, "--except", "sample").succeeded().out
    assert "frechet_distance" in table
    assert "psnr" not in table


def test_the_same_images_are_scored_once_and_other_images_anew(known: Rae) -> None:
    words = ("evaluate", "--json", "--images", known.folder / "tiny.npz")
    made = known.verb(*words, "--name", "mine").succeeded().json
    assert known.verb(*words).succeeded().json["reused"]
    of_reconstructions = ("-s", "evaluate.reconstructions=3", "-s", "evaluate.perceptual_distance=none")
    assert known.verb(*words, *of_reconstructions).succeeded().json["reused"]
    assert known.artifact("scores/mine")["id"] == made["id"] == known.artifact("scores/tiny-images")["id"]
    assert "image_size: 32" in known("inspect", "scores/mine", "-w", known.workspace).succeeded().out
    dry = ("evaluate", "--dry-run", "--images")
    planned = known.verb(*dry, known.folder / "tiny.npz").succeeded().out
    assert planned == f"scores/tiny-images: already done, scores/{made['id']}\n"
    with np.load(known.folder / "tiny.npz") as arrays:
        np.savez(known.folder / "other.npz", arr_0=255 - arrays["arr_0"])
    assert known.verb(*dry, known.folder / "other.npz").succeeded().out == "scores/tiny-images: would be made\n"


def test_images_without_labels_have_the_scores_that_need_none(known: Rae, tmp_path: Path) -> None:
    labelled = evaluate(known, known.folder / "png")["generation"]["samples"]
    plain = evaluate(known, without_labels(known.folder / "png", tmp_path / "plain"))["generation"]["samples"]
    assert set(labelled) - set(plain) == {"class_agreement", "transfer_accuracy"}
    assert plain == pytest.approx({name: labelled[name] for name in plain}, rel=1e-6)


def test_class_folders_are_numbered_as_the_training_images_are(known: Rae, tmp_path: Path) -> None:
    for path in (known.folder / "png").iterdir():
        index, label = path.stem.split("_")
        (tmp_path / label).mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / label / f"{index}.png")
    found, expected = evaluate(known, tmp_path), evaluate(known, known.folder / "png")
    assert found["protocol"]["labels"] == expected["protocol"]["labels"]
    for metric in ("class_agreement", "frechet_distance"):
        one, other = (scores["generation"]["samples"][metric] for scores in (found, expected))
        assert one == pytest.approx(other, rel=1e-3)


def test_a_reference_stands_in_for_images_that_are_not_here(known: Rae, tmp_path: Path) -> None:
    against = ("-s", "evaluate.reference=tiny-train", "-s", "evaluate.reference_split=train")
    alone = Rae(tmp_path, {"encode": TINY["encode"], "evaluate": TINY["evaluate"]})
    alone.workspace = known.copy(tmp_path / "copy", "reference").workspace
    given = evaluate(alone, known.folder / "tiny.npz", *against)
    with_images = evaluate(known, known.folder / "tiny.npz", *against)
    metrics = given["generation"]["samples"]
    assert list(given["generation"]) == ["samples"]
    assert set(metrics) == {"frechet_distance", "precision", "recall", "density", "coverage"}
    expected = with_images["generation"]["samples"]
    assert metrics == pytest.approx({name: expected[name] for name in metrics}, rel=1e-6)
    assert "held_out_digest" not in given["protocol"]
    alone.verb("evaluate", "--images", known.folder / "tiny.npz").refused(3, "holds no images out to score against")


def test_images_that_cannot_be_scored_are_told_in_a_sentence(known: Rae, tmp_path: Path) -> None:
    def refused(code: int, *words: str) -> None:
        known.verb("evaluate", "--restart", "--images", tmp_path / "bad").refused(code, *words)
        shutil.rmtree(tmp_path / "bad", ignore_errors=True)

    refused(3, "bad")
    images = np.zeros((4, 32, 32, 4), np.uint8)
    for mode, told in (("RGBA", "RGB with transparency"), ("L", "grayscale")):
        (tmp_path / "bad").mkdir()
        Image.fromarray(images[0]).convert(mode).save(tmp_path / "bad/0.png")
        refused(4, told, "convert it first")
    (tmp_path / "bad").mkdir()
    Image.fromarray(images[0, :16, :16, :3]).save(tmp_path / "bad/0.png")
    refused(4, "these images have 16 x 16 pixels, and these scores are to be of 32")
    (tmp_path / "bad").mkdir()
    for number, side in enumerate((32, 31)):
        Image.fromarray(images[0, :side, :side, :3]).save(tmp_path / f"bad/{number}.png")
    refused(4, "`0` has 32 x 32 pixels, and `1` has 31 x 31")
    (tmp_path / "bad").mkdir()
    for number in range(3):
        Image.fromarray(images[0, ..., :3]).save(tmp_path / f"bad/{number}.png")
    refused(2, "need at least 4 images in each set, got 3 generated ones")
    (tmp_path / "broken.npz").write_bytes((known.folder / "tiny.npz").read_bytes()[:2000])
    known.verb("evaluate", "--restart", "--images", tmp_path / "broken.npz").refused(5, "broken.npz")
    no_class = np.full(4, 77)
    np.savez(tmp_path / "77.npz", images[..., :3], no_class)
    known.verb("evaluate", "--restart", "--images", tmp_path / "77.npz").refused(2, "class 77")


def test_unfinished_scores_and_references_say_how_they_go_on(known: Rae, tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    for words, kind in (("evaluate --images", "scores"), ("evaluate --make-reference", "reference")):
        workspace.begin(kind, "mine", {"kind": kind, "stage": {"name": words, "version": 1}}, {})
    said = known("status", "-w", tmp_path).succeeded().out
    for words in ("--images", "--make-reference"):
        assert f"continue with: rae evaluate {words}, with the same arguments and --name mine" in said
