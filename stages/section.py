"""A section of a configuration, and the types of its values.

Light on purpose (pydantic alone), so that a configuration is checked whole before torch is loaded. A field marked
`Runtime` changes how the work is done, never its result, and therefore stays out of the artifact's recipe.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field


class Runtime:
    """Marks a field that does not change the result: paths, worker counts, how often to log."""


class Section(BaseModel):
    """A stage's settings. Unknown keys are refused; values are typed (`1` for a float is `1.0`)."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    shorthands: ClassVar[tuple[str, ...]] = ()  # keys that are replaced by what they stand for before validation

    def in_recipe(self) -> dict[str, Any]:
        """The settings that determine the result, JSON-ready and typed."""
        runtime = {
            name
            for name, field in type(self).model_fields.items()
            if any(isinstance(mark, Runtime) or mark is Runtime for mark in field.metadata)
        }
        return self.model_dump(mode="json", exclude=runtime)


Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(gt=0)]
Location = Annotated[str | None, Runtime]  # a path, REF or hub id: recipes hold digests and ids instead
Start = Annotated[float, Field(ge=0)]
StartStep = Annotated[int | None, Field(ge=0)]
Precision = Literal["float32", "bf16"]
SigmaRel = Annotated[float, Field(gt=0.01, lt=0.28)]  # of a power-function average: below 12^-0.5, a plain mean's
