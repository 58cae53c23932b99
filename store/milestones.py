"""What training runs publish before their end, found by the run's own recipe: no name or list that could go stale."""

from dataclasses import dataclass
from pathlib import Path

from rae.store.errors import MissingInput
from rae.store.manifest import Artifact, Json, milestone_recipe, read_artifact, recipe_id


@dataclass(frozen=True)
class Run:
    """A training run, done or not: what it makes, and the folder of its artifact."""

    kind: str
    recipe: Json
    folder: Path

    @property
    def id(self) -> str:
        return recipe_id(self.recipe)


def milestone(run: Run, step: int) -> Artifact | None:
    """What a training run published at a step; its last step is the run's own artifact."""
    folder = run.folder.parent / recipe_id(milestone_recipe(run.recipe, step))
    if (folder / "manifest.json").is_file():
        return read_artifact(folder)
    if (run.folder / "manifest.json").is_file():
        artifact = read_artifact(run.folder)
        return artifact if artifact.manifest.metrics.get("steps") == step else None
    return None


def milestone_steps(run: Run) -> list[int]:
    """The steps before its end that a training run has published, in order."""
    steps = []
    for path in run.folder.parent.glob("*/manifest.json"):
        match read_artifact(path.parent).manifest.recipe.get("milestone"):
            case {"run": run.id, "step": int(step)}:
                steps.append(step)
    return sorted(steps)


def no_milestone(run: Run, step: int) -> MissingInput:
    """The refusal of a milestone that is not there, with those that are."""
    there = ", ".join(map(str, milestone_steps(run)))
    section = f"train_{run.kind}.publish_at"
    return MissingInput(
        f"{run.kind}/{run.id} has published nothing at step {step}"
        + (f"; there are steps {there}" if there else f", nor at any other; `{section}` names steps before it trains")
    )
