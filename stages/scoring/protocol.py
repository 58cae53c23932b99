"""What a score was measured with: two scores are comparable if their protocols are equal."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Self

from pydantic import TypeAdapter, ValidationError

from rae.store.errors import CorruptData
from rae.store.manifest import Json, differing_fields


@dataclass(frozen=True)
class Protocol:
    """The protocol of a score of generated images.

    Attributes:
        extractor: its name, weight digest (sha256), resize, input size and block size, as `Extractor.protocol` says.
        images: how many were scored.
        labels: how many images each label has, by label; `-1` is none.
        reference: what the images were compared with, as a person calls it.
        reference_digest: which images, or moments, these are.
        reference_images: how many.
        sampler, steps, guidance, shift, precision, seed: how the images were drawn; None where nobody knows.
    """

    extractor: dict[str, str | int | None]
    images: int
    labels: dict[str, int]
    reference: str
    reference_digest: str
    reference_images: int
    sampler: str | None = None
    steps: int | None = None
    guidance: float | None = None
    shift: float | None = None
    precision: str | None = None
    seed: int | None = None

    def to_json(self) -> Json:
        """JSON-ready, with the names of the attributes."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: Any) -> Self:
        """The inverse of `to_json`; CorruptData for what is no protocol."""
        try:
            return TypeAdapter(cls).validate_python(value)
        except ValidationError as error:
            raise CorruptData(f"this is no protocol of scores: {error}") from error

    def differences(self, other: "Protocol") -> list[str]:
        """The fields in which `other` differs, as sentences `field: found (other's), asked (this one's)`."""
        return list(differing_fields(self.to_json(), other.to_json()))
