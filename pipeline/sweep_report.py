"""The report of a sweep: its table, its verdicts, its charts and pictures, written from artifacts alone."""

import datetime
from pathlib import Path
from typing import Any

import numpy as np

from rae.pipeline.report import read_series
from rae.pipeline.report_charts import COLOURS, Floats, Spot, lines_chart, spread_chart
from rae.pipeline.report_images import PIXELATED_UP_TO, read_gallery, read_noise_grid, read_pairs
from rae.pipeline.report_page import render_page
from rae.pipeline.report_scores import read_scores
from rae.pipeline.sweep import Run, Sweep
from rae.pipeline.sweep_results import Results, artifacts_of, to_csv, to_text
from rae.store.manifest import Artifact, Json
from rae.store.publish import replace_bytes

_PAIRS, _SAMPLES = 8, 10


def write_report(results: Results) -> Path:
    """Write WORKSPACE/reports/NAME.html, and the numbers beside it as .json and .csv; returns the page's path."""
    folder = results.sweep.workspace.root / "reports"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{results.sweep.name}.html"
    page = render_page("sweep.html", describe(results), datetime.datetime.now(datetime.UTC))
    for target, text in ((".json", to_text(results)), (".csv", to_csv(results)), (".html", page)):
        replace_bytes(path.with_name(path.name.removesuffix(".html") + target), text.encode())
    return path


def describe(results: Results) -> Json:
    """Everything that the template shows."""
    sweep = results.sweep
    made = {run.name: artifacts_of(run) for run in sweep.runs}
    first = {variant: made[sweep.of(variant)[0].name] for variant in sweep.variants}
    return {
        "name": sweep.name,
        "description": sweep.config.description,
        "done": results.done,
        "runs": len(sweep.runs),
        "seeds": list(sweep.section.seeds),
        "command": " ".join(["rae sweep", *sweep.words]),
        "verdicts": results.verdicts(),
        "variants": sweep.variants,
        "table": _table(results),
        "charts": _spreads(results),
        "curves": _curves(sweep, first),
        "pictures": [shown for variant in sweep.variants if (shown := _pictures(variant, first[variant]))],
        "made": [_made(run, made[run.name]) for run in sweep.runs],
    }


def _table(results: Results) -> list[Json]:
    """A row for each measure, and one for each source that published it."""
    rows: list[Json] = []
    variants = results.sweep.variants
    for measure in results.measures:
        cells = [results.cell(variant, measure) for variant in variants]
        rows.append({"name": measure, "cells": ["" if cell is None else str(cell) for cell in cells], "own": True})
        figures = {variant: results.published(variant, measure) for variant in variants}
        for source in dict.fromkeys(whose for found in figures.values() for _, whose in found):
            told = [next((f"{value:.4g}" for value, whose in figures[one] if whose == source), "") for one in variants]
            rows.append({"name": source, "cells": told, "own": False})
    return rows


def _spreads(results: Results) -> list[Any]:
    """A drawing for each measure that any variant has."""
    charts = []
    for measure in results.measures:
        spots = [
            Spot(variant, cell.values, tuple(value for value, _ in results.published(variant, measure)))
            for variant in results.sweep.variants
            if (cell := results.cell(variant, measure)) is not None
        ]
        if spots:
            charts.append(spread_chart(spots, f"{measure} by variant", measure))
    return charts


def _curves(sweep: Sweep, first: dict[str, dict[str, Artifact]]) -> list[Json]:
    """The trainers' losses, and scores over levels of noise, a line for each variant: those of its first seed."""
    shown = []
    for kind, title in (("decoder", "decoder"), ("dit", "diffusion transformer")):
        lines = {
            variant: series
            for variant, made in first.items()
            if kind in made and len((series := read_series(made[kind].payload / "metrics.jsonl", "loss"))[0])
        }
        shown += _lines(lines, "optimizer step", f"loss of the {title}")
    noise = {variant: read_scores(made["scores"]).latent_noise for variant, made in first.items() if "scores" in made}
    for key, label in (("psnr_db", "PSNR, dB"), ("perceptual_distance", "perceptual distance")):
        by_level = {
            variant: _by_level(levels, key)
            for variant, levels in noise.items()
            if levels and all(key in one for one in levels)
        }
        shown += _lines(by_level, "noise on the tokens", label)
    return shown


def _by_level(levels: list[dict[str, float]], key: str) -> tuple[Floats, Floats]:
    ordered = sorted(levels, key=lambda one: one["level"])
    return np.array([one["level"] for one in ordered]), np.array([one[key] for one in ordered])


def _lines(lines: dict[str, tuple[Floats, Floats]], x_label: str, y_label: str) -> list[Json]:
    if not lines:
        return []
    chart = lines_chart(list(lines.values()), f"{y_label} by {x_label}", x_label, y_label)
    return [{"chart": chart, "keys": [(f"s{place % COLOURS}", label) for place, label in enumerate(lines)]}]


def _pictures(variant: str, made: dict[str, Artifact]) -> Json | None:
    """Reconstructions and samples of a variant's first seed: the first ones, by index."""
    if "scores" not in made:
        return None
    pairs, size = read_pairs(made["scores"])
    levels = read_scores(made["scores"]).latent_noise
    originals, *noisy = read_noise_grid(made["scores"], len(levels)) if levels else [[]]
    rows = [(f"noise {one['level']:g}", row) for one, row in zip(levels, noisy, strict=True)]
    if not levels:
        originals = [pair.original for pair in pairs[:_PAIRS]]
        rows = [("reconstruction", [pair.reconstruction for pair in pairs[:_PAIRS]])]
    rows = [("original", originals), *rows]
    if "samples" in made:
        gallery = read_gallery(made["samples"], None, None)
        rows.append(("samples", [picture for row in gallery.rows for picture in row.generated][:: _step(gallery.rows)]))
    return {"variant": variant, "rows": rows, "pixelated": size <= PIXELATED_UP_TO}


def _step(rows: list[Any]) -> int:
    """How far apart the shown samples stand, so that there are about ten of as many classes as there are."""
    return max(1, sum(len(row.generated) for row in rows) // _SAMPLES)


def _made(run: Run, made: dict[str, Artifact]) -> Json:
    return {
        "name": run.name,
        "artifacts": [artifact.ref for artifact in made.values()],
        "seconds": f"{sum(artifact.manifest.metrics.get('seconds', 0) for artifact in made.values()):.0f}",
    }
