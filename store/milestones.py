"""What training runs publish before their end, found by the run's own recipe: no name or list that could go stale."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from rae.store.errors import MissingInput
from rae.store.manifest import Artifact, Json, milestone_recipe, read_artifact, recipe_id

Published = Callable[[str, str], Artifact | None]  # what a workspace has under a kind and an id


@dataclass(frozen=True)
class Run:
    """A training run, done or not: what it makes, and the folder of its artifact."""

    kind: str
    recipe: Json
    folder: Path

    @property
    def id(self) -> str:
        return recipe_id(self.recipe)


def milestone(published: Published, run: Run, step: int) -> Artifact | None:
    """What a training run published at a step; its last step is the run's own artifact."""
    if found := _find(published, run, recipe_id(milestone_recipe(run.recipe, step))):
        return found
    whole = _find(published, run, run.id)
    return whole if whole is not None and whole.manifest.metrics.get("steps") == step else None


def _find(published: Published, run: Run, id: str) -> Artifact | None:
    """An artifact of the workspace, or else one that lies beside the run, which may be given by its path."""
    beside = run.folder.parent / id
    if (found := published(run.kind, id)) is not None or not (beside / "manifest.json").is_file():
        return found
    return read_artifact(beside)


def milestone_steps(artifacts: Iterable[Artifact], run: Run) -> list[int]:
    """The steps before its end that a training run has published, in order; `artifacts` are all of its kind."""
    steps = set[int]()
    for artifact in artifacts:
        match artifact.manifest.recipe.get("milestone"):
            case {"run": run.id, "step": int(step)}:
                steps.add(step)
    return sorted(steps)


def no_milestone(artifacts: Iterable[Artifact], run: Run, step: int) -> MissingInput:
    """The refusal of a milestone that is not there, with those of the run that are among `artifacts`."""
    there = ", ".join(map(str, milestone_steps(artifacts, run)))
    section = f"train_{run.kind}.publish_at"
    return MissingInput(
        f"{run.kind}/{run.id} has published nothing at step {step}"
        + (f"; there are steps {there}" if there else f", nor at any other; `{section}` names steps before it trains")
    )
