"""A whole encode against its parts, and its memory: `python tests/bench/bench_encode.py`.

The light encoder, on JPEGs of 256 px: the wall time of the whole against the processor time of decoding, encoding and
writing, each done alone by one thread, shared out over the cores. DINOv2-B (of random weights) at 224 px: the whole
against the encoder alone with all of torch's threads. Medians of interleaved rounds in one process. Peak memory is that
of processes that encode 2,000 and 20,000 images of 32 px. It wants a machine that does nothing else.
"""

import argparse
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rounds import interleaved, table

from rae.stages import encode
from rae.stages.images import center_crop, decode
from rae.stages.job import Job
from rae.stages.models.encoders import load_encoder
from rae.stages.models.pixels import to_unit
from rae.stages.models.weights import EncoderSource, locate_encoder
from rae.stages.peak_memory import peak_memory_bytes
from rae.stages.sections import EncodeSection
from rae.store.latents_takeover import EarlierParts
from rae.store.latents_writer import PartWriter
from rae.store.layout import Part
from rae.store.part_record import IndexRow
from rae.store.shards import Source, open_source
from rae.store.shards_writer import ShardWriter

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
LIGHT = EncodeSection(encoder="efficientnet-lite0", image_size=128, encoder_input_size=128, rows_per_part=64)
DINOV2_B = EncodeSection(image_size=224, encoder_input_size=224, horizontal_flip=False, batch_size=8, rows_per_part=16)
TINY = EncodeSection(
    encoder="efficientnet-lite0", feature_index=3, image_size=32, encoder_input_size=32, horizontal_flip=False
)


def images(folder: Path, count: int, side: int) -> Source:
    """Webdataset shards of JPEGs that compress about as photographs do."""
    folder.mkdir()
    random = np.random.default_rng(0)
    with ShardWriter(folder, "train", samples_per_shard=1000, classes=["one"]) as writer:
        for number in range(count):
            coarse = Image.fromarray(random.integers(0, 256, (side // 8, side // 8, 3), np.uint8))
            buffer = io.BytesIO()
            coarse.resize((side, side), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
            writer.add(f"{number:06d}", buffer.getvalue(), "jpg", 0)
    return open_source(folder / "train-*.tar")


class Work:
    """One set of images through one encoder, whole and by parts."""

    def __init__(self, folder: Path, section: EncodeSection, source: Source, encoder_source: EncoderSource) -> None:
        self.folder, self.section, self.source, self.encoder_source = folder, section, source, encoder_source
        self.encoding = encode.Encoding(section, source, encoder_source, "cpu")
        self.encoder = self.encoding.encoder
        self.pixels = np.stack(
            [center_crop(decode(source.read(row)), section.image_size) for row in range(len(source))]
        )
        self.latents = np.zeros((len(source), *self.encoding.layout.row_shape), np.float16)
        self.encode_alone()

    def whole(self) -> None:
        self._empty()
        Path(self.folder / "latents").mkdir()
        encode.run(self.section, self.source, self.encoder_source, Job(self.folder / "latents"), EarlierParts())

    def load(self) -> None:
        """What the whole does once: negligible for a real set, not for these few images."""
        load_encoder(self.encoder_source, self.encoder.input_size, self.section.feature_index)

    def decode_alone(self) -> None:
        for row in range(len(self.source)):
            center_crop(decode(self.source.read(row)), self.section.image_size)

    @torch.inference_mode()
    def encode_alone(self) -> None:
        size = self.section.batch_size
        for first in range(0, len(self.pixels), size):
            batch = to_unit(self.pixels[first : first + size], "cpu")
            views = [batch, batch.flip(-1)] if self.section.horizontal_flip else [batch]
            tokens = torch.stack([self.encoder(view) for view in views], dim=1)
            self.latents[first : first + size] = tokens.half().numpy()

    def write_alone(self) -> None:
        self._empty()
        for part in self.encoding.parts:
            self._write_part(part)

    def _write_part(self, part: Part) -> None:
        first = self.source.shards[part.source_shard].first + part.first_sample
        with PartWriter(self.folder / "latents", self.encoding.layout, part) as writer:
            for row in range(part.count):
                entry: IndexRow = {"key": f"{row}", "label": 0, "sha256": "0" * 64, "width": 256, "height": 256}
                writer.write(row, self.latents[first + row], **entry)
            writer.publish()

    def _empty(self) -> None:
        shutil.rmtree(self.folder / "latents", ignore_errors=True)


def timed_by_processor(case: Callable[[], None], sums: dict[str, list[float]], name: str) -> Callable[[], None]:
    def run() -> None:
        began = time.process_time()
        case()
        sums.setdefault(name, []).append(time.process_time() - began)

    return run


def against_its_parts(folder: Path, rounds: int) -> str:
    work = Work(folder, LIGHT, images(folder / "shards", 512, 256), locate_encoder(LIGHT.encoder))
    processor: dict[str, list[float]] = {}
    alone = {"load": work.load, "decode": work.decode_alone, "encode": work.encode_alone, "write": work.write_alone}

    def one_thread(case: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            case()
            torch.set_num_threads(threads)

        return run

    cases = {name: timed_by_processor(one_thread(case), processor, name) for name, case in alone.items()}
    cases["whole"] = timed_by_processor(work.whole, processor, "whole")
    wall = interleaved(cases, rounds)
    seconds = {name: float(np.median(values[1:])) for name, values in processor.items()}
    ideal = sum(seconds[name] for name in ("decode", "encode", "write")) / CORES
    rows = [[name, f"{wall[name]:.2f}", f"{seconds[name]:.2f}"] for name in cases]
    ratio = (wall["whole"] - wall["load"]) / ideal
    overhead = (seconds["whole"] - seconds["load"]) / (ideal * CORES)
    summary = f"whole, less loading, against (decode + encode + write) / {CORES} cores: {ratio:.2f} times;"
    summary += f" the processor works {overhead:.2f} times as long\n"
    return table("light encoder, 512 images, two views", ["", "wall s", "processor s"], rows) + "\n\n" + summary


def against_the_encoder(folder: Path, rounds: int) -> str:
    work = Work(folder, DINOV2_B, images(folder / "shards", 32, 256), random_dinov2_b(folder / "dinov2-b"))
    wall = interleaved({"load": work.load, "encoder alone": work.encode_alone, "whole": work.whole}, rounds)
    rows = [[name, f"{seconds:.2f}"] for name, seconds in wall.items()]
    ratio = (wall["whole"] - wall["load"]) / wall["encoder alone"]
    text = table("DINOv2-B at 224 px, 32 images", ["", "wall s"], rows)
    return f"{text}\n\nwhole, less loading, against the encoder alone: {ratio:.2f} times\n"


def random_dinov2_b(folder: Path) -> EncoderSource:
    """A DINOv2-B with registers of the right sizes: what its weights are changes no timing."""
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    config = Dinov2WithRegistersConfig(image_size=518, patch_size=14, num_register_tokens=4)
    Dinov2WithRegistersModel(config).save_pretrained(folder)
    preprocessing = {"crop_size": {"height": 224, "width": 224}, "image_mean": [0.485, 0.456, 0.406]}
    preprocessing |= {"image_std": [0.229, 0.224, 0.225], "size": {"shortest_edge": 256}}
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing))
    return locate_encoder(str(folder))


def peak_memory(folder: Path) -> str:
    peaks = {}
    for count in (2_000, 20_000):
        images(folder / f"shards-{count}", count, 32)
        command = [sys.executable, __file__, "--folder", str(folder), "--peak-of", str(count)]
        peaks[count] = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout) / 1024
    rows = [[f"{count:,}", f"{peak:.0f}"] for count, peak in peaks.items()]
    title = "peak memory, images of 32 px"
    return table(title, ["images", "MB"], rows) + f"\n\nratio: {peaks[20_000] / peaks[2_000]:.3f}\n"


def print_peak(folder: Path, count: int) -> None:
    """Encode in this process, and print the most memory that it ever held, in kB."""
    latents = folder / f"latents-{count}"
    latents.mkdir()
    source = open_source(folder / f"shards-{count}" / "train-*.tar")
    encode.run(TINY, source, locate_encoder(TINY.encoder), Job(latents), EarlierParts())
    print(peak_memory_bytes() // 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--peak-of", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--only", choices=["light", "dinov2", "memory"])
    options = parser.parse_args()
    if options.peak_of:
        print_peak(options.folder, options.peak_of)
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        benches = {
            "light": lambda folder: against_its_parts(folder, options.rounds),
            "dinov2": lambda folder: against_the_encoder(folder, options.rounds),
            "memory": peak_memory,
        }
        for bench in [options.only] if options.only else benches:
            folder = Path(name) / bench
            folder.mkdir()
            print(benches[bench](folder), flush=True)


if __name__ == "__main__":
    main()
