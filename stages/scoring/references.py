"""References: what scores are taken against, computed once from real images and kept as an artifact.

    reference.json     which images these are and what took their features: see `ReferenceDescription`
    moments.npz        mean float64 [D], cov float64 [D, D]
    features-*.npz     the features themselves, for precision, recall and the like; an imported reference has none

An imported reference is `asserted`: its moments are taken at the word of whoever made them.
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from rae.stages.job import NOTHING, Job, Result
from rae.stages.scoring.extractors import Extractor
from rae.stages.scoring.features import Features, extract
from rae.stages.scoring.frechet import Moments
from rae.stages.scoring.image_sets import ImageSet, check_size
from rae.stages.scoring.reference_files import REFERENCE_FILE, ReferenceDescription, read_description
from rae.stages.sources import Split
from rae.stages.training.ranks import Ranks
from rae.store.errors import CorruptData
from rae.store.manifest import Artifact, canonical

_MOMENTS = "moments.npz"


@dataclass(frozen=True)
class Reference:
    """A reference as scores take it; `features` is None for an asserted one."""

    about: ReferenceDescription
    moments: Moments
    features: Features | None

    @classmethod
    def load(cls, artifact: Artifact) -> Self:
        """Read what `make_reference` or `save_asserted` wrote; CorruptData for anything else."""
        payload = artifact.payload
        about = read_description(payload)
        mean, cov = _read_moments(payload / _MOMENTS)
        paths = sorted(payload.glob("features-*.npy"))
        features = Features(paths, np.full(about.rows or 0, -1), len(mean)) if paths else None
        count = len(features) if features is not None else None
        return cls(about, Moments.given(mean, cov, count), features)


def make_reference(extractor: Extractor, images: ImageSet, split: Split, image_size: int, job: Job) -> Result:
    """Take the features of every usable image and their moments; features that an earlier attempt took are kept.

    Raises what reading the images raises, StaleInput for images of another size, and CorruptData for features that are
    not finite.
    """
    check_size(images, image_size, "the reference is")
    ranks = Ranks.from_environment()
    features = extract(
        extractor,
        images,
        job.folder,
        earlier=job.earlier,
        ranks=ranks,
        progress=job.progress,
        check_stop=job.check_stop,
    )
    if not ranks.is_main:
        return NOTHING
    moments = Moments.of(features)
    about = ReferenceDescription(extractor.protocol(), split, image_size, len(images.labels), images.digest)
    digest = hashlib.sha256()
    for chunk in features:
        digest.update(np.ascontiguousarray(chunk, "<f4").data)
    written, content = _save(job.folder, about, moments.mean, moments.cov, digest.hexdigest())
    metrics = {"images": len(features), "unusable": len(images.labels) - len(features)}
    return Result(content, metrics, (*written, *features.paths))


def save_asserted(
    folder: Path, about: ReferenceDescription, mean: NDArray[np.float64], cov: NDArray[np.float64], where: str
) -> Result:
    """Write moments that somebody else computed: mean [D] and covariance [D, D].

    Raises CorruptData, naming `where`, if they are no moments.
    """
    check_moments(mean, cov, where)
    files, content = _save(folder, about, mean, cov, "")
    return Result(content, {"dimensions": len(mean)}, files)


def _save(
    folder: Path, about: ReferenceDescription, mean: NDArray[np.float64], cov: NDArray[np.float64], features: str
) -> tuple[tuple[Path, ...], str]:
    described = dataclasses.asdict(about)
    (folder / REFERENCE_FILE).write_text(json.dumps(described, indent=1, sort_keys=True), encoding="utf-8")
    np.savez(folder / _MOMENTS, mean=mean, cov=cov)
    digests = [hashlib.sha256(np.ascontiguousarray(array, "<f8").data).hexdigest() for array in (mean, cov)]
    content = hashlib.sha256(canonical([described, *digests, features])).hexdigest()
    return (folder / REFERENCE_FILE, folder / _MOMENTS), content


def _read_moments(path: Path) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            mean, cov = arrays["mean"], arrays["cov"]
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        raise CorruptData(f"{path} holds no moments of a reference ({error})") from error
    check_moments(mean, cov, str(path))
    return mean, cov


def check_moments(mean: NDArray[Any], cov: NDArray[Any], where: str) -> None:
    """Raises CorruptData, naming `where`, unless these are float64 moments [D] and [D, D] of some distribution."""
    if mean.dtype != np.float64 or cov.dtype != np.float64 or mean.ndim != 1 or cov.shape != (len(mean), len(mean)):
        raise CorruptData(f"{where} holds {mean.dtype} {mean.shape} and {cov.dtype} {cov.shape}, and no moments")
    if not (np.isfinite(mean).all() and np.isfinite(cov).all()):
        raise CorruptData(f"{where} holds moments that are not finite")
    scale = float(np.abs(cov).max(initial=0.0))
    if not np.allclose(cov, cov.T, rtol=0, atol=1e-6 * scale) or bool((np.diag(cov) < 0).any()):
        raise CorruptData(f"{where} holds a covariance that is none: it is not symmetric, or has a negative variance")
