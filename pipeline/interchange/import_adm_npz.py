"""`rae import adm-npz`: ADM's statistics of real images (guided-diffusion's reference batches) as a reference.

    mu, sigma        [D], [D, D]           moments of Inception's pooled features
    mu_s, sigma_s    [D'], [D', D']        moments of its spatial features, which no score here takes: looked at alone
    arr_0            uint8 [N, S, S, 3]    some of the images, of which the header is read alone

Which extractor and resize made them, and of which images, the file does not say: so they are asserted.
"""

import zipfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from rae.pipeline.interchange.imports import import_artifact
from rae.pipeline.plan import Stage
from rae.pipeline.runner import Options, Outcome
from rae.stages.job import Job, Result
from rae.stages.models.weights import digest_file
from rae.stages.sources import Split
from rae.store.artifacts import Workspace
from rae.store.catalog import check_name
from rae.store.errors import ConfigError, CorruptData, MissingInput
from rae.store.manifest import Json

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_STAGE = Stage("import adm-npz", "reference", version=1)
_EXTRACTOR = "inception"
_MOST_DIMENSIONS = 8192  # a covariance of half a GiB; Inception's has 2048


class _Array(NamedTuple):
    shape: tuple[int, ...]
    dtype: "np.dtype[np.generic]"


def import_adm_npz(file: Path, name: str, split: Split, workspace: Workspace, options: Options) -> Outcome:
    """Import the moments of `file` as `reference/NAME`, asserted; images stay where they are.

    The file is untrusted and may be larger than memory: arrays are judged by their headers, and none is unpickled.

    Raises:
        MissingInput: there is no such file.
        ConfigError: it holds images alone.
        CorruptData: it is no npz, or its arrays are no moments.
    """
    check_name(name)
    if not file.is_file():
        raise MissingInput(f"there is no file {file}")
    try:
        with zipfile.ZipFile(file) as archive:
            arrays = _headers(archive)
            _check(arrays, file)
            mean, cov = (_read(archive, key) for key in ("mu", "sigma"))
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, ValueError, NotImplementedError, RuntimeError) as error:
        raise CorruptData(f"{file} is no npz of ADM's, or is damaged ({error})") from error
    images = arrays.get("arr_0")
    size = images.shape[1] if images is not None else None

    def write(job: Job) -> Result:
        from rae.stages.scoring.reference_files import ReferenceDescription
        from rae.stages.scoring.references import save_asserted

        # How many images the moments are of is not said: `arr_0` may hold fewer.
        about = ReferenceDescription({"name": _EXTRACTOR}, split, size, None, digest_file(file), asserted=True)
        return save_asserted(job.folder, about, mean, cov, str(file))

    settings: Json = {"split": split, "image_size": size}
    made = import_artifact(workspace, _STAGE, name, settings, {"npz": file}, write, options)
    options.console.say(
        f"reference/{name} is taken at its word: which images, which weights of Inception and which resize made its"
        " moments is not in the file"
    )
    if images is not None:
        options.console.say(
            f"precision and recall need features: those of its {images.shape[0]} images are taken by"
            f" `rae evaluate CONFIG --make-reference {split} --images {file}`"
        )
    return made


def _headers(archive: zipfile.ZipFile) -> dict[str, _Array]:
    """Shape and type of every array, none of them read."""
    from numpy.lib import format as npy

    readers = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
    found = {}
    for member in archive.namelist():
        with archive.open(member) as stream:
            version = npy.read_magic(stream)
            if version not in readers:
                raise ValueError(f"`{member}` is of version {version}")
            shape, _, dtype = readers[version](stream)
        found[member.removesuffix(".npy")] = _Array(shape, dtype)
    return found


def _check(arrays: dict[str, _Array], file: Path) -> None:
    """Refuse what cannot be moments, before anything is read."""
    if "mu" not in arrays and "arr_0" in arrays:
        raise ConfigError(
            f"{file} holds images and no moments; a reference is made of them by the extractor of your scores",
            f"rae evaluate CONFIG --make-reference train --images {file}",
        )
    for mean, cov in (("mu", "sigma"), ("mu_s", "sigma_s")):
        if mean == "mu_s" and not {mean, cov} & set(arrays):
            continue
        found = [arrays.get(key) for key in (mean, cov)]
        if None in found:
            raise CorruptData(
                f"{file} holds {', '.join(sorted(arrays)) or 'nothing'}, and `{mean}` and `{cov}` are needed"
            )
        one, two = (array for array in found if array is not None)
        side = one.shape[0] if len(one.shape) == 1 else 0
        if not 0 < side <= _MOST_DIMENSIONS or two.shape != (side, side) or {one.dtype.kind, two.dtype.kind} != {"f"}:
            raise CorruptData(
                f"{file}: `{mean}` {one.dtype} {one.shape} and `{cov}` {two.dtype} {two.shape} are no moments of"
                f" up to {_MOST_DIMENSIONS} features"
            )
    images = arrays.get("arr_0")
    if images is not None and (images.dtype.str != "|u1" or len(images.shape) != 4 or images.shape[3] != 3):
        raise CorruptData(f"{file}: `arr_0` {images.dtype} {images.shape} holds no images, uint8 [N, S, S, 3]")


def _read(archive: zipfile.ZipFile, key: str) -> "NDArray[np.float64]":
    import numpy as np

    with archive.open(f"{key}.npy") as stream:
        array: NDArray[np.float64] = np.lib.format.read_array(stream, allow_pickle=False).astype(np.float64)
    return array
