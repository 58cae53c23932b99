"""The report of a workspace whose artifacts are published as the stages publish them, with made-up payloads."""

import base64
import datetime
import io
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from rae.pipeline import config as configuration
from rae.pipeline.plan import STAGES, Pipeline
from rae.pipeline.report import render, write_report
from rae.pipeline.report_page import prose
from rae.pipeline.report_scores import METRICS, meaning
from rae.store.artifacts import Workspace
from rae.store.errors import CorruptData
from rae.store.manifest import Json, Manifest
from rae.store.shards_writer import ShardWriter

NOW = datetime.datetime(2025, 6, 1, 12, 30, tzinfo=datetime.UTC)
HOSTILE = "<script>alert(1)</script>"
CLASSES = ["zero", HOSTILE, "two & a half", '"three"', "4", "5", "6", "7", "8", "9"]
SECTIONS = ["Reconstructions", "Samples by class", "Training", "Scores", "Cost", "Configuration and lineage"]
SIZE = 32


def digits() -> tuple[np.ndarray, np.ndarray]:
    """Real pictures uint8 [N, 32, 32, 3] and labels [N]."""
    data = load_digits()
    small = (data.images / 16 * 255).round().astype(np.uint8)
    large = small.repeat(SIZE // 8, axis=1).repeat(SIZE // 8, axis=2)
    return np.stack([large] * 3, axis=-1), data.target


class Maker:
    """Publishes a stage's artifact the way the runner does, around a payload that a test writes."""

    def __init__(self, root: Path, overrides: tuple[str, ...] = (), classes: list[str] = CLASSES) -> None:
        settings = configuration.load("quickstart", list(overrides))
        self.workspace = Workspace(root)
        self.pipeline = Pipeline(settings, self.workspace, ["quickstart"])
        self.classes = classes
        self.random = np.random.default_rng(0)
        self.images, self.labels = digits()

    def make(self, *stages: str) -> Pipeline:
        for name in stages:
            getattr(self, f"_{name}")()
        return self.pipeline

    def make_all(self) -> Pipeline:
        return self.make(*STAGES)

    def publish(self, name: str, payload: dict[str, bytes], metrics: Json) -> None:
        task = self.pipeline.task(name)
        inputs = {role: artifact.as_input() for role, artifact in task.inputs.items()}
        work = self.workspace.begin(task.stage.kind, self.pipeline.config.name, task.recipe, inputs)
        files = []
        for relative, data in payload.items():
            path = work.attempt / relative
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            digest = "0" * 64
            files.append({"path": path.relative_to(work.folder).as_posix(), "bytes": len(data), "sha256": digest})
        provenance = {"created": f"2025-06-01T12:0{len(inputs)}:00+00:00", "command": "rae run quickstart"}
        provenance |= {"rae": "0.1.0", "torch": "2.8.0", "python": "3.11.2", "device": "cpu", "threads": 2}
        config = task.recipe["config"]
        manifest = Manifest(
            work.kind, work.name, task.recipe, "c0ffee" * 10, inputs, config, files, metrics, provenance
        )
        self.workspace.publish(work, manifest)

    def _shards(self) -> None:
        folder = self.workspace.root.parent / f"{self.workspace.root.name}-tars"
        folder.mkdir()
        for split, rows in (("train", slice(0, 100)), ("val", slice(100, 160))):
            with ShardWriter(folder, split, classes=self.classes) as writer:
                for row, (image, label) in enumerate(zip(self.images[rows], self.labels[rows], strict=True)):
                    writer.add(f"{split}{row:04d}", png(image), "png", int(label))
        payload = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
        self.publish("shards", payload, {"seconds": 1.31, "rows": 100, "val_rows": 60})

    def _encode(self) -> None:
        metrics = {"seconds": 24.2, "rows": 1437, "invalid_rows": 0, "views": 1, "shape": [112, 4, 4]}
        self.publish("encode", {"encoder.json": b"{}", "parts/000000": bytes(5_100_000)}, metrics)

    def _train_decoder(self) -> None:
        log = curve(np.arange(50, 601, 50), lambda step: 0.05 + 0.3 * np.exp(-step / 120), 2e-3, self.random)
        metrics = {"seconds": 98.4, "steps": 600, "loss": 0.052, "parameters": 1_870_000, "images_per_s": 390.0}
        self.publish("train_decoder", {"metrics.jsonl": log, "ema.safetensors": bytes(7_500_000)}, metrics)

    def _train_dit(self) -> None:
        log = curve(np.arange(10, 2501, 10), lambda step: 0.62 + 0.9 * np.exp(-step / 300), 2e-3, self.random)
        about = json.dumps({"config": {"num_classes": 10}, "classes": self.classes}).encode()
        payload = {"metrics.jsonl": log, "dit.json": about, "ema.safetensors": bytes(9_000_000)}
        metrics = {"seconds": 201.0, "steps": 2500, "loss": 0.63, "parameters": 2_150_000, "images_per_s": 796.0}
        self.publish("train_dit", payload, metrics)

    def _sample(self) -> None:
        labels = np.resize(np.arange(10), 500)
        payload = {}
        for number, first in enumerate(range(0, 500, 64)):
            wanted = labels[first : first + 64]
            pictures = np.stack([self.images[self.random.choice(np.flatnonzero(self.labels == c))] for c in wanted])
            payload[f"images/batch-{number:06d}.npz"] = npz(images=self._blurred(pictures), labels=wanted)
        self.publish("sample", payload, {"seconds": 21.7, "images": 500, "images_per_second": 24.1})

    def _evaluate(self) -> None:
        originals = self.images[100:116]
        pictures = npz(originals=originals, reconstructions=self._blurred(originals))
        payload = {"scores.json": json.dumps(SCORES).encode(), "reconstructions.npz": pictures}
        metrics = {"seconds": 30.8, "reconstruction_psnr_db": 24.61, **SCORES["generation"]["samples"]}
        self.publish("evaluate", payload, metrics)

    def _blurred(self, images: np.ndarray) -> np.ndarray:
        noisy = images + self.random.normal(0, 14, images.shape)
        return noisy.clip(0, 255).astype(np.uint8)


SCORES: Json = {
    "reconstruction": {"psnr_db": 24.61, "ssim": 0.912},
    "generation": {
        "samples": {"class_agreement": 0.972, "transfer_accuracy": 0.913, "precision": 0.742, "recall": 0.518}
        | {"frechet_distance": 41.37},
        "real": {"class_agreement": 0.986, "transfer_accuracy": 0.949, "precision": 0.861, "recall": 0.844}
        | {"frechet_distance": 12.02},
        "class_means": {"class_agreement": 1.0, "transfer_accuracy": 0.806, "precision": 0.9, "recall": 0.0}
        | {"frechet_distance": 612.5},
        "pixel_gaussian": {"class_agreement": 0.948, "transfer_accuracy": 0.919, "precision": 0.101, "recall": 0.377}
        | {"frechet_distance": 188.4},
    },
    "protocol": {
        "held_out_digest": "ab" * 32,
        "held_out_images": 360,
        "image_size": 32,
        "reconstructions": 360,
        "seed": 0,
        "extractor": {"name": "efficientnet-lite0", "digest": "cd" * 32, "input_size": 224, "block_size": 64},
        "images": 500,
        "labels": {str(label): 50 for label in range(10)},
        "classifier": "pixels",
        "transfer_images": 500,
        "nearest_k": 3,
        "sample": {"sampler": "euler", "num_steps": 50, "guidance_scale": 1.0, "guidance_interval": [0.0, 1.0]},
    },
}


def png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def npz(**arrays: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def curve(steps: np.ndarray, mean: object, peak: float, random: np.random.Generator) -> bytes:
    assert callable(mean)
    losses = mean(steps) * np.exp(random.normal(0, 0.04, len(steps)))
    rates = peak * (1 + np.cos(np.pi * steps / steps[-1])) / 2
    lines = [
        json.dumps({"step": int(step), "loss": loss, "lr": rate, "grad_norm": 1.0})
        for step, loss, rate in zip(steps, losses, rates, strict=True)
    ]
    return ("\n".join(lines) + "\n").encode()


class Page(HTMLParser):
    """What a test asks of a page; refuses tags that do not match."""

    _VOID = frozenset({"meta", "img", "br", "wbr"})
    _BLOCKS = frozenset({"p", "td", "th", "dt", "dd", "h2", "h3", "small", "span"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.headings: list[str] = []
        self.text = ""
        self.feed(page)
        self.close()
        assert not self.open
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self._VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        self.text += " " if tag in self._BLOCKS else ""

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)
        if "style" not in self.open:
            self.text += data

    def pictures(self, alt: str) -> list[np.ndarray]:
        """The embedded pictures whose alternative text begins so."""
        sources = [a["src"] for tag, a in self.tags if tag == "img" and str(a["alt"]).startswith(alt)]
        return [picture(str(source)) for source in sources]


def picture(uri: str) -> np.ndarray:
    head, data = uri.split(",")
    assert head == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    """Every stage of the quickstart, done."""
    return Maker(tmp_path_factory.mktemp("full") / "workspace").make_all()


@pytest.fixture(scope="module")
def page(full: Pipeline) -> str:
    return render(full, NOW)


def test_sections_stand_in_order_under_well_formed_markup(page: str) -> None:
    parsed = Page(page)
    assert parsed.headings == SECTIONS
    assert "Missing:" not in parsed.text
    assert "Not all stages are done" not in parsed.text


def test_the_file_is_self_contained(page: str) -> None:
    parsed = Page(page)
    tags = {tag for tag, _ in parsed.tags}
    assert not tags & {"script", "link", "iframe", "object", "embed", "base", "a", "form"}
    assert not re.search(r"https?://|//[a-z]+\.|url\(|@import", page)
    for _, attributes in parsed.tags:
        assert not {"href", "xlink:href", "srcset", "onload", "onerror"} & attributes.keys()
        assert str(attributes.get("src", "data:image/png;base64,")).startswith("data:image/png;base64,")
    assert "default-src 'none'" in page


def test_untrusted_names_are_escaped(tmp_path: Path) -> None:
    hostile = "<img src=x onerror=alert(2)>"
    (tmp_path / hostile).mkdir()
    maker = Maker(tmp_path / hostile / "workspace", (f"description={hostile}",))
    page = render(maker.make(*list(STAGES)[:-1]), NOW)  # one is missing: its message names the workspace
    parsed = Page(page)
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert f"sample 1 of {HOSTILE}" in [attributes.get("alt") for _, attributes in parsed.tags]
    assert parsed.text.count(hostile) > 1
    assert "x" not in [attributes.get("src") for _, attributes in parsed.tags]


def test_messages_become_code_without_becoming_markup() -> None:
    assert prose("run `<b>` & go") == "run <code>&lt;b&gt;</code> &amp; go"
    assert prose("an odd ` backtick <i>") == "an odd ` backtick &lt;i&gt;"


def test_the_same_artifacts_give_the_same_file_but_for_the_date(full: Pipeline, page: str) -> None:
    again = Pipeline(full.config, Workspace(full.workspace.root), full.words)
    assert render(again, NOW) == page
    later = render(again, NOW + datetime.timedelta(days=400))
    assert later != page
    assert later.replace("06 July 2026", "01 June 2025") == page


def test_write_report_leaves_one_whole_file(full: Pipeline) -> None:
    path = write_report(full)
    assert path == full.workspace.root / "reports" / "quickstart.html"
    assert [entry.name for entry in path.parent.iterdir()] == ["quickstart.html"]
    assert Page(path.read_text(encoding="utf-8")).headings == SECTIONS


def test_scores_stand_beside_their_baselines_and_protocol(page: str) -> None:
    text = Page(page).text
    for row in ("samples", "real", "class_means", "pixel_gaussian"):
        assert row in text
        for metric in ("class_agreement", "transfer_accuracy", "precision", "recall", "frechet_distance"):
            value = SCORES["generation"][row][metric]
            assert (f"{value:.4g}" if metric == "frechet_distance" else f"{value:.3f}") in text
    assert "reconstruction_psnr_db" in text
    assert "24.61 dB" in text
    assert text.count("higher is better") == 4
    assert text.count("lower is better") == 1
    assert "at least as well as the samples on class_agreement, transfer_accuracy, precision;" in text
    assert "10 classes, 50 images each" in text
    assert "extractor.name" in text
    assert "sample.guidance_interval" in text


def test_cost_counts_time_disk_and_rate(full: Pipeline, page: str) -> None:
    text = Page(page).text
    assert "train-dit 3 min 21 s 53.3 % 9.03 MB 2,500 steps 12.4 steps/s" in text
    assert "encode 24 s 6.4 % 5.1 MB 1,437 images 59.4 images/s" in text
    assert "all 6 min 17 s" in text
    latents = full.need("encode")
    assert f"latents/{latents.id}" in text
    assert latents.manifest.content in text


def test_pictures_are_the_first_of_each_class_and_true_to_the_pixel(full: Pipeline, page: str) -> None:
    parsed = Page(page)
    samples = sorted(full.need("sample").payload.glob("images/*.npz"))
    first, second = (np.load(path)["images"] for path in samples[:2])
    shown = parsed.pictures("sample ")
    assert len(shown) == 100
    assert np.array_equal(shown[30], first[3])  # the first of class 3
    assert np.array_equal(shown[37], second[73 - 64])  # its eighth
    with np.load(full.need("evaluate").payload / "reconstructions.npz") as pairs:
        assert np.array_equal(parsed.pictures("original")[5], pairs["originals"][5])
        assert np.array_equal(parsed.pictures("its reconstruction")[5], pairs["reconstructions"][5])
    assert len(parsed.pictures("real image")) > 30


@pytest.mark.parametrize("done", range(len(STAGES)))
def test_what_is_missing_is_said_and_the_rest_is_shown(tmp_path: Path, done: int) -> None:
    maker = Maker(tmp_path / "workspace")
    pipeline = maker.make(*list(STAGES)[:done])
    parsed = Page(write_report(pipeline).read_text(encoding="utf-8"))
    assert parsed.headings == SECTIONS
    assert "Not all stages are done" in parsed.text
    for place, stage in enumerate(STAGES.values()):
        row = re.search(rf"{stage.verb} (not done yet|\d)", parsed.text.split("share of time")[1])
        assert row
        assert (row[1] == "not done yet") == (place >= done)
    assert ("Missing: train-dit has not run yet. Next: rae train-dit quickstart" in parsed.text) == (done in (2, 3))
    assert len([tag for tag, _ in parsed.tags if tag == "svg"]) == 2 * max(0, min(done, 4) - 2) + (done > 0)
    assert len(parsed.pictures("sample ")) == (100 if done > 4 else 0)


def test_a_stage_that_the_configuration_leaves_out_is_found_through_lineage(full: Pipeline) -> None:
    settings = configuration.load("quickstart", ["train_dit=null", "sample.dit=dit/quickstart", "name=other"])
    parsed = Page(render(Pipeline(settings, full.workspace, ["other.yaml"]), NOW))
    assert parsed.text.count("Missing:") == 0
    assert "train-dit 3 min 21 s" in parsed.text
    assert "reused from quickstart" in parsed.text


def test_what_was_made_with_other_settings_is_told_apart(full: Pipeline) -> None:
    settings = configuration.load("quickstart", ["sample.num_steps=7"])
    parsed = Page(render(Pipeline(settings, full.workspace, ["quickstart", "-s", "sample.num_steps=7"]), NOW))
    assert "Not all stages are done: sample, evaluate still missing." in parsed.text
    assert "made with others (config.sample.num_steps: found 50, asked 7)" in parsed.text
    assert "Next: rae sample quickstart -s sample.num_steps=7" in parsed.text


def test_without_a_section_there_is_nothing_to_show(tmp_path: Path) -> None:
    maker = Maker(tmp_path / "workspace", ("train_dit=null", "sample=null", "evaluate=null"))
    parsed = Page(render(maker.make("shards", "encode", "train_decoder"), NOW))
    assert "Not all stages are done" not in parsed.text
    assert "Missing: the configuration has no section sample." in parsed.text


@pytest.mark.parametrize("damage", [b"not a zip", npz(originals=np.zeros((2, 8, 8, 3)), reconstructions=np.zeros(3))])
def test_a_damaged_payload_is_named(tmp_path: Path, damage: bytes) -> None:
    pipeline = Maker(tmp_path / "workspace").make_all()
    path = pipeline.need("evaluate").payload / "reconstructions.npz"
    path.write_bytes(damage)
    with pytest.raises(CorruptData, match=r"reconstructions\.npz"):
        render(pipeline, NOW)


def test_pictures_of_other_levels_than_the_scores_are_named(tmp_path: Path) -> None:
    maker = Maker(tmp_path / "workspace")
    pipeline = maker.make_all()
    payload = pipeline.need("evaluate").payload
    noisy = [{"level": level, "psnr_db": 20.0 - level, "ssim": 0.5} for level in (1.0, 0.0)]
    (payload / "scores.json").write_text(json.dumps(SCORES | {"latent_noise": noisy}))
    originals = maker.images[:6]
    pictures = {"originals": originals, "reconstructions": np.stack([originals, originals // 2])}
    (payload / "latent_noise.npz").write_bytes(npz(**pictures))
    page = render(pipeline, NOW)
    parsed = Page(page)
    assert np.array_equal(parsed.pictures("level 0, picture 3")[0], originals[2] // 2)  # sorted by level
    assert page.count("by level of noise</title>") == 1  # no distance was taken
    (payload / "latent_noise.npz").write_bytes(npz(**pictures | {"reconstructions": originals[None]}))
    with pytest.raises(CorruptData, match=r"latent_noise\.npz .* for 2 levels"):
        render(pipeline, NOW)
    (payload / "scores.json").write_text(json.dumps(SCORES | {"latent_noise": [{"level": 1.0}]}))
    with pytest.raises(CorruptData, match=r"scores\.json"):
        render(pipeline, NOW)


def test_the_report_needs_no_torch() -> None:
    code = "import sys, rae.pipeline.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_lineage_is_drawn_with_a_box_for_each_artifact_and_a_line_for_each_input(full: Pipeline, page: str) -> None:
    picture = page[page.index('aria-label="What was made from what"') :].partition("</svg>")[0]
    made = [artifact for artifact in full.workspace.artifacts() if artifact.id in picture]
    refs = {artifact.ref for artifact in made}
    lines = [
        one for artifact in made for one in artifact.manifest.inputs.values() if f"{one['kind']}/{one['id']}" in refs
    ]
    assert picture.count("<rect") == len(made) > 4
    assert picture.count("<path") == len(lines) > 0


def test_a_metric_says_what_it_was_taken_against_and_with() -> None:
    (distance,) = (metric for metric in METRICS if metric.name == "frechet_distance")
    held_out = meaning(distance, {"extractor": {"name": "dinov2-edm2"}, "reference": {"images": "held out"}})
    assert "of the held-out images" in held_out
    assert "no FID of any paper" in held_out
    published = meaning(distance, {"extractor": {"name": "inception"}, "reference": {"digest": "12", "split": "train"}})
    assert "of the reference images" in published
    assert "no FID" not in published
