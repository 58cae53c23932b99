"""What a sweep can be told: which variants of a configuration, how often, what is compared, what is claimed of it."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from rae.stages.section import Section

Value = bool | int | float | str | list[Any] | None
Overrides = dict[str, Value]  # by dotted key: {train_decoder.noise_tau: 0.8}


class ClaimSection(Section):
    """What an experiment is to show: `metric` of `variant` is higher or lower than that of `baseline`, or within a
    `tolerance` of it. Whether it holds is computed from the seeds' spread (docs/experiments.md).
    """

    says: str
    metric: str
    variant: str
    relation: Literal["higher", "lower", "within"]
    baseline: str
    tolerance: Annotated[float, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _tolerance_belongs_to_within(self) -> Self:
        if (self.relation == "within") != (self.tolerance is not None):
            raise ValueError("`tolerance` says how near `relation: within` is: give both, or neither")
        return self


class PublishedSection(Section):
    """Figures that others measured, to stand beside ours: by variant and metric. `source` says whose and of what."""

    source: str
    figures: dict[str, dict[str, float]]


class SweepSection(Section):
    """The variants of a configuration, each run with every seed.

    `variants` gives overrides by label, `grid` values by dotted key; of both, every pair is a variant. A seed is the
    value of all `seed_keys`, of the sections that the configuration has.

    `size` chooses among `sizes`: each is a configuration of its own, beginning perhaps with `extends`, that stands
    below (`extends`) and above (its sections) what the file says.

    `measures` are columns of the table, metrics of scores or `KIND.METRIC` of another artifact; without them, all of
    the scores.
    """

    variants: dict[str, Overrides] = Field(default_factory=dict)
    grid: dict[str, Annotated[list[Value], Field(min_length=1)]] = Field(default_factory=dict)
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (0,)
    seed_keys: tuple[str, ...] = ("train_decoder.seed", "train_dit.seed", "sample.seed")
    size: str = "cpu"
    sizes: dict[str, dict[str, Any]] = Field(default_factory=dict)
    measures: tuple[str, ...] = ()
    claims: tuple[ClaimSection, ...] = ()
    published: tuple[PublishedSection, ...] = ()

    @model_validator(mode="after")
    def _seeds_differ(self) -> Self:
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"`seeds` {list(self.seeds)} has a seed twice")
        return self

    @model_validator(mode="after")
    def _something_varies(self) -> Self:
        if not self.variants and not self.grid:
            raise ValueError("a sweep needs `variants` or a `grid`: what is to differ")
        return self

    @model_validator(mode="after")
    def _size_is_known(self) -> Self:
        if self.sizes and self.size not in self.sizes:
            raise ValueError(f"`size` is {self.size!r}, and the sizes are {', '.join(self.sizes)}")
        return self
