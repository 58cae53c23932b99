"""`rae evaluate --make-reference`: real images' features, made once, and refused where another is asked for."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rae.stages.scoring.frechet import Moments, frechet_distance
from rae.stages.scoring.references import Reference
from rae.store.artifacts import Workspace
from rae.store.errors import CorruptData
from tests.conftest import TINY, Rae


@pytest.fixture(scope="module")
def known(finished: Rae, tmp_path_factory: pytest.TempPathFactory) -> Rae:
    """The small pipeline with references of its training and of its held-out images."""
    rae = finished.copy(tmp_path_factory.mktemp("known"), "shards", "latents", "decoder", "dit", "samples")
    for split in ("train", "val"):
        rae.verb("evaluate", "--make-reference", split).succeeded()
    return rae


def reference(rae: Rae, name: str) -> Reference:
    return Reference.load(Workspace(rae.workspace).resolve(name, "reference"))


def scores(rae: Rae, *overrides: str) -> tuple[Any, dict[str, float]]:
    made = rae.verb("evaluate", "--json", *(word for one in overrides for word in ("-s", one))).succeeded().json
    (path,) = Path(made["path"]).rglob("scores.json")
    return json.loads(path.read_text()), made["metrics"]


def test_scores_against_a_reference_of_the_held_out_images_are_those_against_the_images(known: Rae) -> None:
    directly, metrics = scores(known)
    found, by_reference = scores(known, "evaluate.reference=tiny-val")
    del by_reference["seconds"], metrics["seconds"]
    assert by_reference == pytest.approx(metrics, rel=1e-6)
    card = found["protocol"]["reference"]
    assert (card["split"], card["rows"], card["image_size"], card["asserted"]) == ("val", 20, 32, False)
    assert card["digest"] == known.artifact("reference/tiny-val")["content"]
    assert directly["protocol"]["reference"] == {"images": "held out", "split": "val"}
    assert found["protocol"]["sample"]["time_dist_shift"] > 0


def test_a_reference_holds_features_and_their_exact_moments(known: Rae) -> None:
    found = reference(known, "tiny-train")
    assert found.features is not None
    features = found.features.take(np.arange(100))
    assert features.shape == (100, 1280)
    np.testing.assert_allclose(found.moments.mean, features.mean(axis=0, dtype=np.float64), rtol=1e-12)
    np.testing.assert_allclose(found.moments.cov, Moments.of(features).cov, rtol=1e-9, atol=1e-15)


def test_the_same_images_make_the_same_reference_once(known: Rae) -> None:
    made = known.verb("evaluate", "--make-reference", "train", "--name", "other", "--json").succeeded().json
    assert made["reused"]
    planned = known.verb("evaluate", "--make-reference", "train", "--dry-run").succeeded().out
    assert planned == f"reference/tiny-train: already done, reference/{made['id']}\n"
    smaller = ("-s", "evaluate.extractor_input_size=64")
    planned = known.verb("evaluate", "--make-reference", "train", "--dry-run", *smaller).succeeded().out
    assert planned == "reference/tiny-train: would be made\n"
    assert made["id"] == known.artifact("reference/other")["id"] == known.artifact("tiny-train")["id"]


def test_a_reference_of_something_else_is_refused_with_the_fields(known: Rae) -> None:
    def evaluate(*overrides: str) -> Any:
        return known.verb("evaluate", *(word for one in overrides for word in ("-s", one)))

    evaluate("evaluate.reference=tiny-train").refused(
        4, 'the reference `tiny-train` is not what these scores are to be taken against (split: found "train", asked'
    )
    evaluate("evaluate.reference=tiny-val", "evaluate.reference_split=train").refused(4, 'split: found "val", asked')
    evaluate("evaluate.reference=tiny-val", "evaluate.extractor_input_size=64").refused(
        4, "extractor.input_size: found 32, asked 64"
    )
    evaluate("evaluate.reference_split=train").refused(2, "rae evaluate CONFIG --make-reference train")
    evaluate("evaluate.reference=nowhere").refused(3, "no reference `nowhere`")
    known.verb("plan", "-s", "evaluate.reference=tiny-train", "-s", "evaluate.seed=1").refused(4, "split: found")


def test_against_training_images_the_row_of_real_ones_is_held_out(known: Rae) -> None:
    against = ("evaluate.reference=tiny-train", "evaluate.reference_split=train")
    found, _ = scores(known, *against)
    held_out, training = reference(known, "tiny-val"), reference(known, "tiny-train")
    assert found["protocol"]["reference"]["split"] == "train"
    direct, _ = scores(known)
    expected = frechet_distance(training.moments, held_out.moments)
    assert found["generation"]["real"]["frechet_distance"] == pytest.approx(expected, rel=1e-4)
    assert found["generation"]["real"] != direct["generation"]["real"]
    known("compare", "tiny", "tiny", "-w", known.workspace).succeeded()


def test_a_folder_of_images_and_a_file_of_them_make_the_same_moments(
    rae_with: Callable[..., Rae], tmp_path: Path
) -> None:
    rae = rae_with()
    images = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
    (tmp_path / "images").mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"images/{number:03d}.png")
    np.savez_compressed(tmp_path / "images.npz", arr_0=images)
    words = ("evaluate", "--make-reference", "train", "--images")
    rae.verb(*words, tmp_path / "images", "--name", "folder").succeeded()
    rae.verb(*words, tmp_path / "images.npz", "--name", "file").succeeded()
    assert not list(rae.workspace.glob("objects/shards/*"))  # nothing that the configuration names is needed
    folder, file = reference(rae, "folder"), reference(rae, "file")
    np.testing.assert_array_equal(folder.moments.cov, file.moments.cov)
    assert folder.about.rows == file.about.rows == 20
    rae.verb(*words, tmp_path / "none.npz").refused(3, "none.npz")
    rae.verb(*words, tmp_path / "none").refused(3, "none")
    rae.verb("evaluate", "--name", "x").refused(2, "-s name=NAME")
    np.savez(tmp_path / "small.npz", arr_0=images[:, :16, :16])
    rae.verb(*words, tmp_path / "small.npz").refused(
        4, "these images have 16 x 16 pixels, and the reference is to be of 32"
    )


def test_a_reference_is_of_the_images_of_one_size(tmp_path: Path) -> None:
    sizeless = Rae(tmp_path, {"evaluate": TINY["evaluate"]})
    sizeless.verb("evaluate", "--make-reference", "train", "--images", "x").refused(
        2, "does not say how large images are", "-s encode.image_size=256"
    )


def test_a_damaged_reference_is_named(known: Rae, tmp_path: Path) -> None:
    rae = known.copy(tmp_path / "damaged", "reference")
    artifact = Workspace(rae.workspace).resolve("tiny-val", "reference")
    moments = artifact.payload / "moments.npz"
    with np.load(moments) as arrays:
        mean, cov = arrays["mean"], arrays["cov"]
    for broken in ({"cov": cov[:, :5]}, {"mean": mean * np.nan}, {"cov": -cov}, {"cov": np.triu(cov)}):
        np.savez(moments, **({"mean": mean, "cov": cov} | broken))
        with pytest.raises(CorruptData, match=r"moments.npz holds"):
            Reference.load(artifact)
    np.savez(moments, mean=mean, cov=cov)
    described = artifact.payload / "reference.json"
    for rows in (7, 1000):
        described.write_text(described.read_text().replace('"rows": 20', f'"rows": {rows}'))
        with pytest.raises(CorruptData, match=f"features of 20 images, and not of {rows}"):
            Reference.load(artifact)
        described.write_text(described.read_text().replace(f'"rows": {rows}', '"rows": 20'))
    np.savez(moments, mean=mean[:5], cov=cov[:5, :5])
    with pytest.raises(CorruptData, match="does not hold 5 features an image"):
        Reference.load(artifact)
    np.savez(moments, mean=mean, cov=np.triu(cov))
    described.write_text("{}")
    with pytest.raises(CorruptData, match="does not describe a reference"):
        Reference.load(artifact)
    rae("verify", "reference/tiny-val", "-w", rae.workspace).refused(5, "2 problem(s)")


def test_reconstructions_against_the_reference_of_generation_are_warned_about_by_name(
    known: Rae,
) -> None:
    def reconstructions(*overrides: str) -> tuple[float, Any, str]:
        words = ("reconstructions=20", "reconstruction_distance=true", *overrides)
        made = known.verb("evaluate", "--json", *(word for one in words for word in ("-s", f"evaluate.{one}")))
        (path,) = Path(made.succeeded().json["path"]).rglob("scores.json")
        found = json.loads(path.read_text())
        return found["reconstruction"]["frechet_distance"], found["protocol"]["reconstruction_reference"], made.err

    to_originals, card, said = reconstructions()
    assert card == {"images": "held out", "split": "val"}
    assert "tiny-" not in said
    to_held_out, card, said = reconstructions("reconstruction_reference=tiny-val")
    assert to_held_out == pytest.approx(to_originals, rel=1e-6)
    assert card["split"] == "val"
    assert "are scored against" not in said
    to_training, card, said = reconstructions("reconstruction_reference=tiny-train")
    assert to_training != pytest.approx(to_originals, rel=0.01)
    assert card["split"] == "train"
    assert "reconstructions are scored against `tiny-train`, which is of training images, for generation" in said
    known.verb("evaluate", "-s", "evaluate.reconstruction_reference=tiny-val").refused(
        2, "reconstruction_distance: true"
    )
    known.verb("evaluate", "-s", "sample=null", "-s", "evaluate.reference=tiny-val").refused(
        2, "`evaluate.reference` is what samples are scored against, and `tiny` draws none"
    )
