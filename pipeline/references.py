"""`rae evaluate --make-reference`: the features of real images that scores are taken against, once for all."""

from pathlib import Path

from rae.pipeline import given_images
from rae.pipeline.plan import Pipeline, Stage, Task
from rae.pipeline.runner import Options, Outcome
from rae.pipeline.tasks import extractor_files
from rae.stages.job import Job, Result
from rae.stages.sections import EvaluateSection
from rae.stages.sources import Split
from rae.store.manifest import Json

_STAGE = Stage("evaluate --make-reference", "reference", version=1)


def make_reference(pipeline: Pipeline, split: Split, images: str | None, name: str | None, options: Options) -> Outcome:
    """Make the reference of the training or the held-out images, by the extractor and the image size of `pipeline`.

    Args:
        images: a folder, tars or an .npz with `arr_0` that hold the images of this split in place of `shards`.
        name: what `reference/NAME` will mean; by default `CONFIG-SPLIT`.

    Raises what finding the images or the extractor raises, ConfigError without an image size.
    """
    name = name or f"{pipeline.config.name}-{split}"
    return given_images.make(pipeline, name, lambda: _task(pipeline, split, images), options, images is None)


def say_plan(pipeline: Pipeline, split: Split, images: str | None, name: str | None, options: Options) -> None:
    """Tell whether the reference would be made; raises as `make_reference` does, also for shards that are not there."""
    name = name or f"{pipeline.config.name}-{split}"
    given_images.say(pipeline, name, _task(pipeline, split, images), options)


def _task(pipeline: Pipeline, split: Split, images: str | None) -> Task:
    section, size = pipeline.section("evaluate", EvaluateSection), given_images.image_size(pipeline)
    files = extractor_files(section)
    if images is not None:
        source, digests = given_images.open_images(pipeline, images)
    else:
        source = pipeline.train if split == "train" else pipeline.held_out
        digests = source.digests
    settings: Json = {
        "extractor": section.extractor,
        "extractor_input_size": section.extractor_input_size,
        "image_size": size,
        "crop": None if source is None else "center",
        "split": split,
    }
    made_of: Json = {"weights": files.digests, "source": digests, "reading": pipeline.reading()}
    recipe = _STAGE.recipe({"reference": settings}, **made_of)

    def run(job: Job) -> Result:
        from rae.stages.scoring import references
        from rae.stages.scoring.image_sets import ImageSet, SourceImages
        from rae.stages.scoring.load_extractor import load_extractor
        from rae.stages.scoring.npz_images import NpzImages

        extractor = load_extractor(
            section.extractor,
            section.extractor_weights,
            section.extractor_input_size,
            job.device,
            section.extractor_sha256,
        )
        real: ImageSet = NpzImages(Path(str(images))) if source is None else SourceImages(source, size)
        return references.make_reference(extractor, real, split, size, job)

    return Task(_STAGE, recipe, pipeline.shards if images is None else {}, run)
