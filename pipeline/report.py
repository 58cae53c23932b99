"""`rae report`: one self-contained HTML file of what is done, written from artifacts alone. Imports no torch."""

import datetime
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from rae.pipeline import report_scores
from rae.pipeline.config import to_yaml
from rae.pipeline.plan import STAGES, Pipeline
from rae.pipeline.report_charts import Floats, level_chart, loss_chart, rate_chart, smoothing_window, uses_log
from rae.pipeline.report_facts import Facts, collect, cost, in_one_unit, lineage, machines, seconds
from rae.pipeline.report_images import PIXELATED_UP_TO, read_gallery, read_noise_grid, read_pairs
from rae.pipeline.report_lineage import lineage_picture
from rae.pipeline.report_page import render_page
from rae.store.errors import RaeError
from rae.store.manifest import Json
from rae.store.publish import replace_bytes
from rae.store.shards import Source


def write_report(pipeline: Pipeline) -> Path:
    """Write WORKSPACE/reports/NAME.html, whole or not at all, and return its path.

    Raises `CorruptData` if an artifact does not hold what its kind promises; a stage that is not done is named in the
    report. The same artifacts give the same file, but for its date.
    """
    page = render(pipeline, datetime.datetime.now(datetime.UTC))
    path = pipeline.workspace.root / "reports" / f"{pipeline.config.name}.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_bytes(path, page.encode())
    return path


def render(pipeline: Pipeline, now: datetime.datetime) -> str:
    """The report as HTML."""
    return render_page("report.html", describe(collect(pipeline)), now)


def describe(facts: Facts) -> Json:
    """Everything that the template shows."""
    config = facts.pipeline.config
    scores = report_scores.read_scores(facts.made["scores"]) if "scores" in facts.made else None
    return {
        "name": config.name,
        "description": config.description,
        "figures": figures(facts, scores),
        "undone": [stage.verb for stage in facts.stages if stage.kind not in facts.made],
        "next_command": facts.pipeline.command("run"),
        "missing": facts.missing,
        "model": model_facts(facts),
        "reconstructions": reconstructions(facts, scores),
        "latent_noise": latent_noise(facts, scores),
        "gallery": gallery(facts),
        "curves": [curve(facts, kind) for kind in ("decoder", "dit")],
        "scores": score_table(scores),
        "cost": cost(facts),
        "machines": machines(facts),
        "yaml": to_yaml(config),
        "lineage": lineage(facts),
        "lineage_picture": lineage_picture([facts.made[one.kind] for one in facts.stages if one.kind in facts.made]),
    }


def figures(facts: Facts, scores: report_scores.Scores | None) -> list[Json]:
    """The headline numbers: value, unit, name, and what to hold it against."""
    shown = _score_figures(scores) if scores is not None else []
    if facts.made:
        done = sum(stage.kind in facts.made for stage in facts.stages)
        stages = f"{done} of {len(facts.stages)} stages" if done < len(facts.stages) else f"all {done} stages"
        value, unit = in_one_unit(sum(map(seconds, facts.made.values())))
        shown.append({"value": value, "unit": unit, "name": "total time", "note": stages})
    return shown


def _score_figures(scores: report_scores.Scores) -> list[Json]:
    """The samples' scores beside real images'; the Fréchet distance only where there are no classes to score."""
    shown = []
    samples, real = (scores.generation.get(row, {}) for row in ("samples", "real"))
    for metric in report_scores.columns(scores):
        if metric.name in samples and (metric.higher_is_better or "class_agreement" not in samples):
            note = f"real images: {real[metric.name]:{metric.digits}}" if metric.name in real else ""
            value = f"{samples[metric.name]:{metric.digits}}"
            shown.append({"value": value, "unit": "", "name": metric.name, "note": note})
    if "psnr_db" in scores.reconstruction:
        value = f"{scores.reconstruction['psnr_db']:.1f}"
        shown.append({"value": value, "unit": "dB", "name": "reconstruction_psnr_db", "note": "held-out images"})
    return shown


def model_facts(facts: Facts) -> Json:
    """Sizes that the opening paragraph names, where they are known."""
    metrics = {kind: artifact.manifest.metrics for kind, artifact in facts.made.items()}
    encode = facts.pipeline.config.encode
    return {
        "encoder": encode.encoder if encode else None,
        "image_size": encode.image_size if encode else None,
        "latent_shape": metrics.get("latents", {}).get("shape"),
        "decoder": _count(metrics.get("decoder", {}).get("parameters")),
        "dit": _count(metrics.get("dit", {}).get("parameters")),
    }


def reconstructions(facts: Facts, scores: report_scores.Scores | None) -> Json | None:
    if scores is None:
        return None
    pairs, image_size = read_pairs(facts.made["scores"])
    psnr_db, ssim = scores.reconstruction.get("psnr_db"), scores.reconstruction.get("ssim")
    return {
        "pairs": pairs,
        "pixelated": image_size <= PIXELATED_UP_TO,
        "image_size": image_size,
        "images": scores.protocol.get("reconstructions", len(pairs)),
        "psnr_db": f"{psnr_db:.2f}" if psnr_db is not None else None,
        "ssim": _three_decimals(ssim),
        "distance": _three_decimals(scores.reconstruction.get("perceptual_distance")),
    }


def latent_noise(facts: Facts, scores: report_scores.Scores | None) -> Json | None:
    """Charts of the scores over the level of noise, and rows of pictures; None where no level was asked for."""
    if scores is None or not scores.latent_noise:
        return None
    originals, *made = read_noise_grid(facts.made["scores"], len(scores.latent_noise))
    ordered = sorted(scores.latent_noise, key=lambda one: one["level"])
    levels = np.array([one["level"] for one in ordered])
    charts = [
        level_chart(levels, np.array([one[key] for one in ordered]), f"{label} by level of noise", label)
        for key, label in (("psnr_db", "PSNR, dB"), ("perceptual_distance", "perceptual distance"))
        if all(key in one for one in ordered)
    ]
    rows = [
        {"level": f"{one['level']:g}", "pictures": pictures, "psnr_db": f"{one['psnr_db']:.2f}"}
        | {"ssim": f"{one['ssim']:.3f}", "distance": _three_decimals(one.get("perceptual_distance"))}
        for one, pictures in zip(scores.latent_noise, made, strict=True)
    ]
    training = facts.made["decoder"].manifest.config.get("train_decoder", {}) if "decoder" in facts.made else {}
    return {
        "originals": originals,
        "rows": sorted(rows, key=lambda row: float(row["level"])),
        "charts": charts,
        "pixelated": scores.protocol.get("image_size", 0) <= PIXELATED_UP_TO,
        "noise_tau": training.get("noise_tau"),
    }


def _three_decimals(value: float | None) -> str | None:
    return None if value is None else f"{value:.3f}"


def gallery(facts: Facts) -> Json | None:
    samples = facts.made.get("samples")
    if samples is None:
        return None
    shown = read_gallery(samples, _class_names(facts), _held_out(facts.pipeline))
    section = samples.manifest.config.get("sample", {})
    settings = {key: section.get(key) for key in ("num_steps", "sampler", "guidance_scale", "seed")}
    settings["guide"] = samples.manifest.inputs.get("guide", {}).get("id")
    return {"shown": shown, "settings": settings, "pixelated": shown.image_size <= PIXELATED_UP_TO}


def curve(facts: Facts, kind: str) -> Json:
    """The loss and the learning rate of a trainer over its steps."""
    title = {"decoder": "Decoder", "dit": "Diffusion transformer"}[kind]
    stage = next(stage for stage in STAGES.values() if stage.kind == kind)
    shown: Json = {"title": title, "kind": kind, "verb": stage.verb}
    if kind not in facts.made:
        return shown | {"loss": None}
    artifact = facts.made[kind]
    log, section = artifact.payload / "metrics.jsonl", artifact.manifest.config.get(stage.name, {})
    steps, loss = read_series(log, "loss")
    if not len(loss):
        return shown | {"loss": None, "empty": True}
    rate = read_series(log, "lr")
    return shown | {
        "loss": loss_chart(steps, loss, f"{title}: loss by step", _loss_name(kind, section)),
        "online": [
            loss_chart(*series, f"{title}: Fréchet distance by step, {words}", f"Fréchet distance, {words}")
            for weights, words in (("ema", "EMA"), ("model", "last weights"))
            if len((series := read_series(log, f"{weights}_frechet_distance"))[0])
        ],
        "lr": rate_chart(*rate, f"{title}: learning rate by step") if len(rate[0]) else Markup(""),
        "smoothed": smoothing_window(len(loss)) > 1,
        "log": uses_log(loss),
        "first": f"{loss[0]:.3g}",
        "last": f"{loss[-1]:.3g}",
        "last_step": f"{steps[-1]:,.0f}",
        **{key: section.get(key) for key in ("batch_size", "prediction", "noise_tau")},
    }


def _loss_name(kind: str, section: Json) -> str:
    if kind == "decoder":
        perceptual = section.get("perceptual_loss", "none")
        return "L1 loss" if perceptual == "none" else "L1 + perceptual loss"
    return f"{section.get('prediction', 'velocity')} loss"


def read_series(path: Path, name: str) -> tuple[Floats, Floats]:
    """Steps [N] and the finite values of `name` [N] in a trainer's log; empty arrays if there are none.

    Tolerant, since a report of everything else is worth more than a log: lines that are not JSON objects with a step
    and this number are left out.
    """
    points = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        try:
            entry = json.loads(line)
            step, value = float(entry["step"]), float(entry[name])
        except (ValueError, KeyError, TypeError):
            continue
        if math.isfinite(step) and math.isfinite(value):
            points[step] = value
    ordered = sorted(points.items())
    return np.array([step for step, _ in ordered]), np.array([value for _, value in ordered])


def score_table(scores: report_scores.Scores | None) -> Json | None:
    if scores is None:
        return None
    columns = report_scores.columns(scores)
    rows = [row for row in report_scores.ROWS if row.name in scores.generation]
    return {
        "columns": [(metric, report_scores.meaning(metric, scores.protocol)) for metric in columns],
        "rows": [(row, [report_scores.cell(scores, row, metric) for metric in columns]) for row in rows],
        "matched": report_scores.matched_by_baselines(scores),
        "protocol": report_scores.protocol_card(scores.protocol),
        "self_test": scores.self_test,
    }


def _class_names(facts: Facts) -> list[str] | None:
    """The names that the transformer knows its classes by."""
    if "dit" not in facts.made:
        return None
    try:
        names = json.loads((facts.made["dit"].payload / "dit.json").read_bytes())["classes"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return [str(name) for name in names] if isinstance(names, list) else None


def _held_out(pipeline: Pipeline) -> Source | None:
    """The held-out images, if they still lie where they lay: a report can do without."""
    try:
        return pipeline.held_out
    except (RaeError, OSError):
        return None


def _count(number: Any) -> str | None:
    """`950 k`, `2.1 M`, `1.2 B` parameters."""
    if not isinstance(number, int | float):
        return None
    for unit, factor in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= factor:
            return f"{number / factor:.3g} {unit}"
    return f"{number:g}"
