"""`rae evaluate --self-test`: do extractors make the features on this machine that are stored of them?"""

from typing import TYPE_CHECKING

from rae.pipeline import launch
from rae.pipeline.plan import Pipeline
from rae.pipeline.runner import Options
from rae.pipeline.tasks import extractor_files
from rae.stages.scoring.extractor_files import NAMES
from rae.stages.sections import EvaluateSection
from rae.store.errors import CorruptData, MissingInput
from rae.store.manifest import Json

if TYPE_CHECKING:
    from rae.stages.scoring.self_test import Agreement


def self_test(pipeline: Pipeline | None, options: Options) -> list[Json]:
    """Test the extractor that `pipeline` scores by, or every one that has a name of its own; what `--json` prints.

    One whose weights are not on this machine is told as not verified. Raises CorruptData for one that makes other
    features than it should.
    """
    if pipeline is not None:
        sections = [pipeline.section("evaluate", EvaluateSection)]
    else:
        sections = [EvaluateSection(extractor=name) for name in NAMES if name != "torchscript"]  # which needs a file
    found = [_tested(section, launch.device_of(options.device)) for section in sections]
    if not options.console.as_json:
        verified = {True: "yes", False: "differs", None: "no"}
        rows = [[one.extractor, verified[one.verified], one.said] for one in found]
        options.console.table("extractors on this machine", ["extractor", "verified", ""], rows)
    if wrong := [one for one in found if one.verified is False]:
        raise CorruptData(
            f"scores by `{wrong[0].extractor}` on this machine are not those of others: {wrong[0].said}; look at the"
            " versions of torch, timm and torch-fidelity, and at the device"
        )
    return [one.to_json() for one in found]


def _tested(section: EvaluateSection, device: str) -> "Agreement":
    from rae.stages.scoring import self_test as extractors
    from rae.stages.scoring.load_extractor import load_extractor

    try:
        files = extractor_files(section)
    except MissingInput as error:
        return extractors.unverified(section.extractor, error.message)
    weights, sha256 = section.extractor_weights, section.extractor_sha256
    extractor = load_extractor(section.extractor, weights, section.extractor_input_size, device, sha256)
    return extractors.self_test(extractor, files)
