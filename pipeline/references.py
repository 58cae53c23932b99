"""`rae evaluate --make-reference`: the features of real images that scores are taken against, once for all."""

from pathlib import Path
from typing import Any

from rae.pipeline import runner
from rae.pipeline.plan import Pipeline, Stage, Task
from rae.pipeline.runner import Options, Outcome
from rae.pipeline.tasks import extractor_files
from rae.stages.job import Job, Result
from rae.stages.models.weights import digest_file
from rae.stages.sections import EvaluateSection
from rae.stages.sources import Split
from rae.store.errors import ConfigError, MissingInput, RaeError
from rae.store.manifest import Json
from rae.store.shards import open_source

_STAGE = Stage("make_reference", "reference", version=1)


def make_reference(pipeline: Pipeline, split: Split, images: str | None, name: str | None, options: Options) -> Outcome:
    """Make the reference of the training or the held-out images, by the extractor and the image size of `pipeline`.

    Args:
        images: a folder, tars or an .npz with `arr_0` that hold the images of this split in place of `shards`.
        name: what `reference/NAME` will mean; by default `CONFIG-SPLIT`.

    Raises what finding the images or the extractor raises, ConfigError without an image size.
    """
    try:
        if images is None:
            runner.run_stages(pipeline, [stage for stage in pipeline.stages if stage.name == "shards"], options)
        task = _task(pipeline, split, images)
        return runner.make(pipeline.workspace, name or f"{pipeline.config.name}-{split}", task, options)
    except RaeError as error:
        pipeline.name_in(error)
        raise


def say_plan(pipeline: Pipeline, split: Split, images: str | None, name: str | None, options: Options) -> None:
    """Tell whether the reference would be made; raises as `make_reference` does, also for shards that are not there."""
    found = pipeline.workspace.find(_STAGE.kind, _task(pipeline, split, images).recipe)
    state = f"already done, reference/{found.id}" if found is not None else "would be made"
    options.console.say(f"reference/{name or f'{pipeline.config.name}-{split}'}: {state}")


def _task(pipeline: Pipeline, split: Split, images: str | None) -> Task:
    section, size = pipeline.section("evaluate", EvaluateSection), _image_size(pipeline)
    files = extractor_files(section)
    npz = images is not None and images.endswith(".npz")
    if npz:
        source, digests = None, [_digest(Path(str(images)))]
    elif images is not None:
        source = open_source(images, label_field=pipeline.config.shards.label_field, **_keys(pipeline))
        digests = source.digests
    else:
        source = pipeline.train if split == "train" else pipeline.held_out
        digests = source.digests
    settings: Json = {
        "extractor": section.extractor,
        "extractor_input_size": section.extractor_input_size,
        "image_size": size,
        "crop": None if npz else "center",
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


def _image_size(pipeline: Pipeline) -> int:
    if pipeline.config.encode is None:
        raise ConfigError(
            f"`{pipeline.config.name}` does not say how large images are, and a reference is of one size",
            pipeline.command("evaluate") + " -s encode.image_size=256",
        )
    return pipeline.config.encode.image_size


def _keys(pipeline: Pipeline) -> dict[str, Any]:
    shards = pipeline.config.shards
    return {"image_key": shards.image_key, "label_key": shards.label_key}


def _digest(path: Path) -> str:
    if not path.is_file():
        raise MissingInput(f"there is no file {path}")
    return digest_file(path)
