"""What a reference says of itself, and whether that is what scores ask for. Light: imports no torch."""

from dataclasses import dataclass
from pathlib import Path

from pydantic import ConfigDict, TypeAdapter, ValidationError

from rae.stages.sources import Split
from rae.store.errors import CorruptData, StaleInput
from rae.store.manifest import Artifact, Json, differing_fields

REFERENCE_FILE = "reference.json"


@dataclass(frozen=True)
class ReferenceDescription:
    """What a reference was made of, and by what.

    Attributes:
        extractor: as `Extractor.protocol` says; of an asserted one, without what nobody can check.
        split: whether these are the images that a generator learns from, or held-out ones.
        image_size: side of the square images, None if nobody said.
        rows: images in the set, unusable ones included; None if nobody said.
        images_digest: which images these are; of an asserted one the sha256 of the file that it came from.
        asserted: whether it was imported, and not computed here.
    """

    __pydantic_config__ = ConfigDict(strict=True, extra="forbid")

    extractor: dict[str, str | int | None]
    split: Split
    image_size: int | None
    rows: int | None
    images_digest: str
    asserted: bool = False

    def differences(self, extractor: Json, split: Split | None, image_size: int | None) -> list[str]:
        """The fields in which scores ask for another reference.

        What is not asked for (None, a field that `extractor` lacks) makes no difference, nor does what an
        asserted reference leaves unsaid.
        """
        known = set(extractor) & set(self.extractor) if self.asserted else set(extractor)
        asked: Json = {"extractor": {key: extractor[key] for key in known}}
        found: Json = {"extractor": {key: self.extractor.get(key) for key in known}}
        if split is not None:
            asked["split"], found["split"] = split, self.split
        if image_size is not None and (self.image_size is not None or not self.asserted):
            asked["image_size"], found["image_size"] = image_size, self.image_size
        return list(differing_fields(asked, found))


def read_description(payload: Path) -> ReferenceDescription:
    """What a reference says of itself; CorruptData if its file holds something else."""
    path = payload / REFERENCE_FILE
    try:
        return TypeAdapter(ReferenceDescription).validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise CorruptData(f"{path} does not describe a reference ({error})") from error


def check_reference(artifact: Artifact, extractor: Json, split: Split | None, image_size: int | None) -> None:
    """Refuse a reference that is not what scores are to be taken against; StaleInput names the fields."""
    if fields := "; ".join(read_description(artifact.payload).differences(extractor, split, image_size)):
        raise StaleInput(
            f"the reference `{artifact.manifest.name}` is not what these scores are to be taken against ({fields})",
            f"rae inspect reference/{artifact.id}",
        )
