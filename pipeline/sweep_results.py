"""What a sweep found: a mean and a spread for every variant and measure, and whether what it claims holds."""

import csv
import io
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rae.pipeline.console import Console
from rae.pipeline.sweep import Run, Sweep
from rae.pipeline.sweep_section import ClaimSection
from rae.store.errors import ConfigError, RaeError
from rae.store.manifest import Artifact, Json

CONFIDENCE = 0.95
Outcome = Literal["holds", "does not hold", "undecided", "not measured"]


@dataclass(frozen=True)
class Cell:
    """A measure of one variant: its values, one a seed."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def spread(self) -> float | None:
        """The standard deviation over seeds; None of a single one."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    def __str__(self) -> str:
        return f"{self.mean:.4g}" + (f" ± {self.spread:.2g}" if self.spread is not None else "")


@dataclass(frozen=True)
class Verdict:
    """Whether a claim holds, and the sentence that says by how much."""

    claim: ClaimSection
    outcome: Outcome
    why: str


@dataclass(frozen=True)
class Results:
    """A sweep's numbers: `values[variant][seed][measure]`; runs that are not done have none."""

    sweep: Sweep
    measures: tuple[str, ...]
    values: dict[str, dict[int, dict[str, float]]]
    done: int

    def cell(self, variant: str, measure: str) -> Cell | None:
        found = [one[measure] for one in self.values[variant].values() if measure in one]
        return Cell(tuple(found)) if found else None

    def verdicts(self) -> list[Verdict]:
        return [self._verdict(claim) for claim in self.sweep.section.claims]

    def _verdict(self, claim: ClaimSection) -> Verdict:
        """By the seeds' paired differences: their mean with its Student interval."""
        one, other = self.values[claim.variant], self.values[claim.baseline]
        pairs = [
            one[seed][claim.metric] - other[seed][claim.metric]
            for seed in one
            if claim.metric in one[seed] and claim.metric in other.get(seed, {})
        ]
        return Verdict(claim, *decide(pairs, claim.relation, claim.tolerance))

    def published(self, variant: str, measure: str) -> list[tuple[float, str]]:
        """What others measured, and who."""
        return [
            (one.figures[variant][measure], one.source)
            for one in self.sweep.section.published
            if measure in one.figures.get(variant, {})
        ]


def decide(differences: Sequence[float], relation: str, tolerance: float | None) -> tuple[Outcome, str]:
    """Whether paired differences, one a seed, bear out `higher`, `lower` or `within` (the tolerance), and why.

    It holds where the whole 95 % interval of their mean does, and does not where the whole interval lies beyond;
    between, and with fewer than two seeds, it is undecided.
    """
    from scipy.stats import t

    if not differences:
        return "not measured", "no seed has both"
    mean = statistics.fmean(differences)
    if len(differences) < 2:
        return "undecided", f"the difference is {mean:+.4g}, and one seed has no spread"
    error = statistics.stdev(differences) / len(differences) ** 0.5
    reach = float(t.ppf((1 + CONFIDENCE) / 2, len(differences) - 1)) * error
    low, high = mean - reach, mean + reach
    why = f"the difference is {mean:+.4g}, 95 % interval {low:+.4g} to {high:+.4g}, {len(differences)} seeds"
    if relation == "within":
        assert tolerance is not None
        holds, fails = -tolerance <= low and high <= tolerance, low > tolerance or high < -tolerance
    else:
        holds, fails = (low > 0, high <= 0) if relation == "higher" else (high < 0, low >= 0)
    return "holds" if holds else "does not hold" if fails else "undecided", why


def collect(sweep: Sweep) -> Results:
    """The measures of every run that is done; `ConfigError` for a measure that none of them has."""
    numbers = {(run.variant, run.seed): metrics_of(run) for run in sweep.runs}
    done = sum(run.next_stage() is None for run in sweep.runs)
    section = sweep.section
    known = list(dict.fromkeys(name for one in numbers.values() for name in one))
    wanted = section.measures or tuple(name for name in known if "." not in name and name != "seconds")
    asked = dict.fromkeys([*wanted, *(claim.metric for claim in section.claims)])
    if done == len(sweep.runs) and (unknown := [name for name in asked if name not in known]):
        raise ConfigError(f"no run of `{sweep.config.name}` has a measure `{unknown[0]}`; they have {', '.join(known)}")
    values: dict[str, dict[int, dict[str, float]]] = {variant: {} for variant in sweep.variants}
    for (variant, seed), metrics in numbers.items():
        values[variant][seed] = {name: metrics[name] for name in asked if name in metrics}
    return Results(sweep, tuple(asked), values, done)


def metrics_of(run: Run) -> dict[str, float]:
    """The numbers that a run's artifacts noted: of scores by their names, of the others as `KIND.NAME`."""
    found: dict[str, float] = {}
    for kind, artifact in artifacts_of(run).items():
        for name, value in artifact.manifest.metrics.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                found[name if kind == "scores" else f"{kind}.{name}"] = float(value)
    return found


def artifacts_of(run: Run) -> dict[str, Artifact]:
    """What a run has made so far, by kind."""
    made = {}
    for stage in run.pipeline.stages:
        try:
            artifact = run.pipeline.find(stage.name)
        except RaeError:  # an earlier stage is still to be made
            continue
        if artifact is not None:
            made[stage.kind] = artifact
    return made


def say_results(results: Results, console: Console) -> None:
    """The table and the verdicts, in the terminal."""
    sweep = results.sweep
    seeds = len(sweep.section.seeds)
    rows = []
    for measure in results.measures:
        cells = {variant: results.cell(variant, measure) for variant in sweep.variants}
        rows.append([measure, *("" if cell is None else str(cell) for cell in cells.values())])
        for source in dict.fromkeys(one.source for one in sweep.section.published):
            told = [_from(source, results.published(variant, measure)) for variant in sweep.variants]
            if any(told):
                rows.append([f"  {source}", *told])
    of = f"mean ± standard deviation of {seeds} seeds" if seeds > 1 else "one seed"
    title = f"{sweep.name}: {results.done} of {len(sweep.runs)} runs done, {of}"
    console.table(title, ["", *sweep.variants], rows)
    for verdict in results.verdicts():
        console.say(f"{verdict.outcome}: {verdict.claim.says} ({verdict.claim.metric}: {verdict.why})")


def _from(source: str, figures: list[tuple[float, str]]) -> str:
    return ", ".join(f"{value:.4g}" for value, whose in figures if whose == source)


def to_json(results: Results) -> Json:
    """Everything, as `--json` and the file beside the report have it."""
    sweep = results.sweep
    cells = {
        variant: {measure: cell for measure in results.measures if (cell := results.cell(variant, measure))}
        for variant in sweep.variants
    }
    return {
        "name": sweep.name,
        "description": sweep.config.description,
        "runs": len(sweep.runs),
        "done": results.done,
        "seeds": list(sweep.section.seeds),
        "variants": {
            variant: {
                measure: {"mean": cell.mean, "spread": cell.spread, "values": list(cell.values)}
                for measure, cell in found.items()
            }
            for variant, found in cells.items()
        },
        "published": [one.model_dump(mode="json") for one in sweep.section.published],
        "claims": [
            {**one.claim.model_dump(mode="json"), "outcome": one.outcome, "why": one.why} for one in results.verdicts()
        ],
        "artifacts": {
            run.name: {kind: artifact.id for kind, artifact in artifacts_of(run).items()} for run in sweep.runs
        },
    }


def to_csv(results: Results) -> str:
    """One line a run: variant, seed, its measures."""
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(["variant", "seed", *results.measures])
    for variant, by_seed in results.values.items():
        for seed, found in by_seed.items():
            lines.writerow([variant, seed, *(found.get(measure, "") for measure in results.measures)])
    return text.getvalue()


def to_text(results: Results) -> str:
    return json.dumps(to_json(results), indent=1, allow_nan=False) + "\n"
