"""`rae shards`: images of any source to webdataset shards with an index.

Every choice is seeded and class-balanced, and rests on a rank of each sample that depends on (seed, key) alone. Image
files are copied as they are, undecoded: a broken one is kept, and the encoder records why it can't be used.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rae.stages.images import sniff
from rae.stages.job import NOTHING, Job, Result
from rae.stages.parquet import Rows
from rae.stages.sections import ShardsSection
from rae.stages.sources import Images, Split, digest, open_images
from rae.store.errors import ConfigError
from rae.store.shards import check_labels, is_shards
from rae.store.shards_writer import ShardWriter
from rae.store.tar_index import TarIndex

__all__ = ["choose_balanced", "hold_out", "in_place", "is_shards", "run", "seeded_ranks", "source_digest"]


def in_place(config: ShardsSection, split: Split) -> bool:
    """Whether a set is webdataset tars already, and used where it lies: no choice among its images is asked for."""
    spec = config.train if split == "train" else config.val
    chosen_from = split == "train" and bool(config.limit or config.val_fraction)
    return spec is not None and is_shards(spec) and not chosen_from


def source_digest(config: ShardsSection) -> dict[str, str | None]:
    """The identity of both sources for a recipe: files are hashed once, then looked up while they do not change."""
    return {
        "train": digest(config.train, "train", config) if config.train else None,
        "val": digest(config.val, "val", config) if config.val else None,
    }


def run(config: ShardsSection, job: Job) -> Result:
    """Write train-NNNN.tar, val-NNNN.tar, index.json and classes.json into `job.folder`.

    `limit` chooses among the images of `train` before `val_fraction` holds some of them out; `val` is taken whole. A
    set that is in place already is left there. Samples are written in seeded order, those of parquet in their own.
    Metrics: `rows` and `val_rows` written, `classes` counted, `bytes` of the tars, `skipped` samples without an image.
    """
    if os.environ.get("RANK", "0") != "0":
        return NOTHING  # one writer; not `Ranks`, for which torch would be loaded
    sets, classes = _open_sets(config)
    for leftover in _payload(job.folder):  # of a run that was stopped in this same folder
        leftover.unlink()
    done, total = 0, sum(len(chosen.rows) for chosen in sets.values())
    indexes: dict[str, TarIndex] = {}
    for prefix, chosen in sets.items():
        with ShardWriter(job.folder, prefix, config.samples_per_shard, classes) as writer:
            for row, data in zip(chosen.rows.tolist(), chosen.images.read(chosen.rows), strict=True):
                writer.add(chosen.images.keys[row], data, sniff(data) or "jpg", int(chosen.images.labels[row]))
                done += 1
                if done % config.samples_per_shard == 0 or done == total:
                    job.progress(done, total, "images")
                    job.check_stop()
        indexes |= writer.indexes
    if classes is not None:
        (job.folder / "classes.json").write_text(json.dumps(classes, ensure_ascii=False), encoding="utf-8")
    digests = [[name, index.sha256] for name, index in indexes.items()]
    content = json.dumps({"classes": classes, "shards": digests}, sort_keys=True, separators=(",", ":"))
    highest = max((int(chosen.images.labels.max(initial=-1)) for chosen in sets.values()), default=-1)
    metrics = {
        "rows": len(sets["train"].rows) if "train" in sets else 0,
        "val_rows": len(sets["val"].rows) if "val" in sets else 0,
        "classes": len(classes) if classes is not None else highest + 1,
        "bytes": sum(index.size for index in indexes.values()),
        "skipped": sum({id(chosen.images): chosen.images.skipped for chosen in sets.values()}.values()),
    }
    return Result(hashlib.sha256(content.encode()).hexdigest(), metrics, tuple(_payload(job.folder)))


@dataclass(frozen=True)
class _Chosen:
    """The rows of a source that make one set, in the order of writing."""

    images: Images
    rows: Rows


def _open_sets(config: ShardsSection) -> tuple[dict[str, _Chosen], tuple[str, ...] | None]:
    """The sets to be written, by prefix, and the class names that both share."""
    if config.train is None:
        raise ConfigError("`shards.train` names no images: give a folder, parquet, tars or `digits`")
    if in_place(config, "train") and (config.val is None or in_place(config, "val")):
        raise ConfigError(
            f"{config.train} is webdataset tars already: `limit` or `val_fraction` would choose among them"
        )
    train = open_images(config.train, "train", config, config.classes)
    check_labels(train.labels, train.classes, lambda row: f"`{train.keys[row]}` of {config.train}")
    sets = {}
    if not in_place(config, "train"):
        ranks = seeded_ranks(train.keys, config.seed)
        rows = choose_balanced(train.labels, ranks, config.limit)
        held = hold_out(train.labels[rows], ranks[rows], config.val_fraction)
        if config.val_fraction and not held.any():
            raise ConfigError(f"`val_fraction` {config.val_fraction} of {len(rows)} images leaves none to hold out")
        sets["train"] = _Chosen(train, _in_order(train, rows[~held], ranks))
        if held.any():
            sets["val"] = _Chosen(train, _in_order(train, rows[held], ranks))
    if config.val is not None and not in_place(config, "val"):
        val = open_images(config.val, "val", config, train.classes)
        check_labels(val.labels, train.classes, lambda row: f"`{val.keys[row]}` of {config.val}")
        every = np.arange(len(val.labels))
        sets["val"] = _Chosen(val, _in_order(val, every, seeded_ranks(val.keys, config.seed)))
    return sets, train.classes


def seeded_ranks(keys: Sequence[str], seed: int) -> NDArray[np.uint64]:
    """A random number for each key, a function of (seed, key) alone: uint64 [N]."""
    start = f"{seed}:".encode()
    hashes = (hashlib.blake2b(start + key.encode(), digest_size=8).digest() for key in keys)
    return np.frombuffer(b"".join(hashes), "<u8")


def choose_balanced(labels: NDArray[np.int64], ranks: NDArray[np.uint64], limit: int | None) -> Rows:
    """Rows of at most `limit` samples, as evenly over the classes as they allow; all rows without a limit.

    The classes, in seeded order, take turns to give their sample of lowest rank, until the limit is reached. Samples
    without a label come last, unless there are no labels at all.
    """
    if limit is None or limit >= len(labels):
        return np.arange(len(labels))
    order = np.lexsort((ranks, labels))
    found, firsts, group = np.unique(labels[order], return_index=True, return_inverse=True)
    turn = np.arange(len(order)) - firsts[group]
    turn[(labels[order] < 0) & (found[-1] >= 0)] += len(order)
    class_order = np.lexsort((found, ranks[order][firsts]))  # by the lowest rank in each: seeded, as the ranks are
    place = np.empty_like(class_order)
    place[class_order] = np.arange(len(found))
    return np.sort(order[np.lexsort((place[group], turn))[:limit]])


def hold_out(labels: NDArray[np.int64], ranks: NDArray[np.uint64], fraction: float) -> NDArray[np.bool_]:
    """Which samples are held out, bool [N]: of each class the given share of lowest rank, rounded, at least one.

    A class of one sample stays in training, as do samples without a label, unless there are no labels at all.
    """
    held = np.zeros(len(labels), np.bool_)
    labelled = labels.max(initial=-1) >= 0
    for label in np.unique(labels) if fraction else ():
        rows = np.flatnonzero(labels == label)
        if len(rows) > 1 and (label >= 0 or not labelled):
            count = min(max(int(len(rows) * fraction + 0.5), 1), len(rows) - 1)
            held[rows[np.argsort(ranks[rows], kind="stable")[:count]]] = True
    return held


def _in_order(images: Images, rows: Rows, ranks: NDArray[np.uint64]) -> Rows:
    return rows[np.argsort(ranks[rows], kind="stable")] if images.any_order else np.sort(rows)


def _payload(folder: Path) -> list[Path]:
    names = ("train-*.tar", "val-*.tar", "index.json", "classes.json")
    return [path for name in names for path in sorted(folder.glob(name))]
