"""`rae export adm-npz`: samples as the file that ADM's evaluator (guided-diffusion, `evaluations/evaluator.py`) reads.

arr_0    uint8 [N, S, S, 3]   the images, in index order
arr_1    int64 [N]            their labels, where they have some
"""

import itertools
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rae.pipeline.console import Console
from rae.pipeline.interchange.exports import exported
from rae.store.artifacts import Workspace
from rae.store.errors import ConfigError, CorruptData
from rae.store.manifest import Artifact, Json
from rae.store.samples import SampleBatch, read_batches

_UNDATED = (1980, 1, 1, 0, 0, 0)  # equal samples make equal files


def export_adm_npz(ref: str, out: Path, truncate: bool, workspace: Workspace, console: Console) -> Json:
    """Write the samples that `ref` means to the file `out`, a batch in memory at a time; what `--json` prints.

    Args:
        truncate: write floor(255 x), as the official code and ADM's do, in place of the nearest level. It darkens
            images by half a level on average.

    Raises:
        ConfigError: an artifact of another kind, or a file that does not end in .npz.
        StaleInput: another file of this name is there already.
        CorruptData: a batch that cannot be read, or another number of images than the manifest says.
    """
    artifact = workspace.resolve(ref)
    if artifact.kind != "samples":
        raise ConfigError(f"`{ref}` is of kind {artifact.kind}; ADM's evaluator reads samples")
    if out.suffix != ".npz":
        raise ConfigError(f"`{out}` must end in .npz, which is what is written")
    with exported(out.parent, console) as partial, console.progress("export adm-npz") as progress:
        labels: list[NDArray[np.int64]] = []
        count = int(artifact.manifest.metrics["images"])

        def images() -> Iterator[NDArray[np.uint8]]:
            for batch in _checked(artifact, count):
                labels.append(batch.labels)
                yield batch.truncated() if truncate else batch.images
                progress(sum(map(len, labels)), count, "images")

        with zipfile.ZipFile(partial / out.name, "w", allowZip64=True) as archive:
            _write_member(archive, "arr_0", images(), count)
            if min(of.min() for of in labels) >= 0:
                _write_member(archive, "arr_1", labels, count)
    rounding = "truncated" if truncate else "rounded"
    return {"kind": artifact.kind, "id": artifact.id, "files": [str(out)], "images": count, "rounding": rounding}


def _checked(artifact: Artifact, count: int) -> Iterator[SampleBatch]:
    """The batches of an artifact, which must hold as many images as its manifest says."""
    found = 0
    for batch in read_batches(artifact.payload):
        found += len(batch.images)
        yield batch
    if found != count:
        raise CorruptData(
            f"samples/{artifact.id} holds {found} images, and its manifest says {count}",
            f"rae verify samples/{artifact.id}",
        )


def _write_member(archive: zipfile.ZipFile, name: str, pieces: Iterable[NDArray[np.generic]], count: int) -> None:
    """One array of `count` rows, from one piece or more along its first axis."""
    rest = iter(pieces)
    first = next(rest)
    header = {**np.lib.format.header_data_from_array_1_0(first), "shape": (count, *first.shape[1:])}
    with archive.open(zipfile.ZipInfo(f"{name}.npy", _UNDATED), "w", force_zip64=True) as member:
        np.lib.format.write_array_header_1_0(member, header)
        for piece in itertools.chain([first], rest):
            member.write(np.ascontiguousarray(piece).data)
