"""What a number format of the store costs: `python tests/bench/bench_latent_dtype.py CONFIG -w WORKSPACE`.

Each format encodes, trains and samples the whole configuration, with several seeds of the transformer; the decoder is
shared, since it never sees the store. Reconstructions are of stored latents, against the training images.
"""

import argparse
import json
import statistics
from typing import Any

import numpy as np
import torch
from rounds import table

import rae
from rae.pipeline import config as configuration
from rae.pipeline.plan import Pipeline
from rae.stages.images import center_crop, decode
from rae.stages.models.pixels import to_uint8
from rae.stages.scoring.reconstruction import psnr_db
from rae.stages.sections import EncodeSection
from rae.store.artifacts import Workspace
from rae.store.latents import LatentStore
from rae.store.manifest import Artifact

SCORES = ("frechet_distance", "class_agreement", "transfer_accuracy", "precision", "recall")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config")
    parser.add_argument("-w", "--workspace", default="rae-workspace")
    parser.add_argument("-s", "--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "float16", "bfloat16", "int8"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    lines = []
    for dtype in arguments.dtypes:
        overrides = [*arguments.overrides, f"encode.dtype={dtype}"]
        runs = [
            rae.run(arguments.config, arguments.workspace, [*overrides, f"train_dit.seed={seed}"])
            for seed in arguments.seeds
        ]
        by_kind = {artifact.manifest.kind: artifact for artifact in runs[0]}
        pipeline = Pipeline(configuration.load(arguments.config, overrides), Workspace(arguments.workspace), [])
        psnr = reconstruction_psnr_db(pipeline, by_kind["latents"], by_kind["decoder"])
        scores = [sample_scores(artifacts[-1]) for artifacts in runs]
        print(json.dumps({"dtype": dtype, "psnr_db": psnr, "scores": scores}), flush=True)
        megabytes = by_kind["latents"].manifest.metrics["bytes"] / 1e6
        lines.append([dtype, f"{megabytes:.1f}", f"{psnr:.3f}", *(spread(scores, name) for name in SCORES)])
    print(table(arguments.config, ["dtype", "MB", "reconstruction PSNR, dB", *SCORES], lines))


def sample_scores(scores: Artifact) -> dict[str, float]:
    metrics: dict[str, Any] = scores.manifest.metrics
    return {name: float(metrics[name]) for name in SCORES if name in metrics}


def spread(scores: list[dict[str, float]], name: str) -> str:
    values = [one[name] for one in scores if name in one]
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.3f} ± {deviation:.3f}"


def reconstruction_psnr_db(pipeline: Pipeline, latents: Artifact, decoder: Artifact, limit: int = 1024) -> float:
    """Of the first images that the store holds, decoded from what it holds."""
    store, decode_tokens = LatentStore(latents.folder, raw=True), rae.load_decoder(str(decoder.folder))
    source, size = pipeline.train, pipeline.section("encode", EncodeSection).image_size
    numbers = {key: row for row, key in enumerate(source.keys)}
    values = []
    for first in range(0, min(limit, len(store)), 64):
        rows = np.arange(first, min(first + 64, limit, len(store)))
        originals = [center_crop(decode(source.read(numbers[store.keys[row]])), size) for row in rows]
        with torch.inference_mode():
            made = to_uint8(decode_tokens(torch.from_numpy(store.rows(rows, 0)).float()))
        values += [psnr_db(original[None], one[None]) for original, one in zip(originals, made, strict=True)]
    return statistics.mean(values)


if __name__ == "__main__":
    main()
