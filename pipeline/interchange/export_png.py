"""`rae export png`: samples as one picture a file, INDEX_CLASS.png, or INDEX.png where they show no class."""

from pathlib import Path

from PIL import Image

from rae.pipeline.console import Console
from rae.store.artifacts import Workspace
from rae.store.errors import ConfigError, StaleInput
from rae.store.manifest import Json
from rae.store.samples import read_batches


def export_png(ref: str, out: Path, workspace: Workspace, console: Console) -> Json:
    """Write the samples that `ref` means into the folder `out`, lossless; what `--json` prints.

    Pictures appear one by one; what is there of the same samples is written again.

    Raises:
        ConfigError: an artifact of another kind.
        StaleInput: the folder holds something else.
        CorruptData: a batch that cannot be read.
    """
    artifact = workspace.resolve(ref)
    if artifact.kind != "samples":
        raise ConfigError(f"`{ref}` is of kind {artifact.kind}; of samples alone there are pictures to write")
    count = int(artifact.manifest.metrics["images"])
    labels = [int(label) for batch in read_batches(artifact.payload) for label in batch.labels]
    width = max(6, len(str(count)))
    names = [f"{index:0{width}d}" + (f"_{label}" if label >= 0 else "") + ".png" for index, label in enumerate(labels)]
    out.mkdir(parents=True, exist_ok=True)
    if strangers := sorted({path.name for path in out.iterdir()} - set(names)):
        raise StaleInput(f"{out} holds {strangers[0]}, which is none of these pictures: export into another folder")
    with console.progress("export png") as progress:
        index = 0
        for batch in read_batches(artifact.payload):
            for image in batch.images:
                Image.fromarray(image).save(out / names[index])
                index += 1
            progress(index, count, "images")
    console.say(f"wrote {index} pictures into {out}")
    return {"kind": artifact.kind, "id": artifact.id, "folder": str(out), "images": index}
