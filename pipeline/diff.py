"""`rae diff`: which settings, inputs or weights made two artifacts differ, all the way up their lineage."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rae.pipeline.console import Console
from rae.pipeline.plan import STAGES, Pipeline
from rae.store.artifacts import Workspace
from rae.store.errors import ConfigError, MissingInput, RaeError
from rae.store.manifest import ABSENT, Artifact, Json, differences

_LONGEST = 70


@dataclass(frozen=True)
class Side:
    """What is compared: an artifact, or what a configuration would make, of whose recipe a part may be known alone."""

    title: str
    kind: str
    recipe: Json
    inputs: dict[str, "Side"]
    content: str | None = None
    partial: bool = False


@dataclass(frozen=True)
class Difference:
    """A field of the recipes of two artifacts of a kind; `path` leads from the two that were asked for to these."""

    path: tuple[str, ...]
    kind: str
    field: str
    values: tuple[Any, Any]


def show_differences(one: Side, other: Side, console: Console) -> None:
    """Say in what two sides differ: settings, weights and sources, then the same of each input that differs."""
    found = list(differing(one, other))
    if console.as_json:
        rows = [{"path": "/".join(each.path), "kind": each.kind, "field": each.field} for each in found]
        values = [dict(zip("ab", map(_as_json, each.values), strict=True)) for each in found]
        console.print_json([row | pair for row, pair in zip(rows, values, strict=True)])
        return
    console.say(f"a: {one.title}")
    console.say(f"b: {other.title}")
    if not found:
        same = one.content == other.content or None in (one.content, other.content)
        console.say("the same recipe" + ("" if same else ", and yet other content: made twice, not to the bit alike"))
    path: tuple[str, ...] | None = None
    for each in found:
        if each.path != path:
            path = each.path
            console.say(f"{each.kind}:" if not path else f"{each.kind}, the {' of the '.join(reversed(path))}:")
        console.say(f"  {each.field}: {_short(each.values[0])} | {_short(each.values[1])}")


def differing(one: Side, other: Side, path: tuple[str, ...] = ()) -> Iterator[Difference]:
    """Each field in which two recipes differ; of inputs that can be looked into, theirs in place of their ids."""
    followed = [role for role in one.inputs if role in other.inputs]
    known = [side.recipe.keys() for side in (one, other) if side.partial]
    recipes = [
        {key: side.recipe[key] for key in side.recipe if all(key in keys for keys in known)} for side in (one, other)
    ]
    for field, a, b in differences(recipes[1], recipes[0]):
        if field.removeprefix("inputs.") not in followed:
            yield Difference(path, one.kind, field, (a, b))
    for role in followed:
        if one.inputs[role].recipe != other.inputs[role].recipe:
            yield from differing(one.inputs[role], other.inputs[role], (*path, role))


def of_artifact(workspace: Workspace, artifact: Artifact) -> Side:
    """A published artifact, with what it was made from as far as that lies in the workspace."""
    manifest, inputs = artifact.manifest, dict[str, Side]()
    # By the recipe: lineage that no result follows from is no reason to differ.
    for role, id in manifest.recipe.get("inputs", {}).items():
        made_from = manifest.inputs.get(role)
        found = workspace.published(made_from["kind"], str(id)) if made_from is not None else None
        if found is not None:
            inputs[role] = of_artifact(workspace, found)
    title = f"{artifact.ref} `{manifest.name}`, {manifest.provenance.get('created', '')}"
    return Side(title, artifact.kind, manifest.recipe, inputs, manifest.content)


def of_configuration(pipeline: Pipeline, kind: str) -> Side:
    """What a configuration would make of a kind. Inputs that are still to be made stand in it as far as is known."""
    stage = next(stage for stage in STAGES.values() if stage.kind == kind)
    if stage not in pipeline.stages:
        raise ConfigError(f"the configuration `{pipeline.config.name}` makes no {kind}: it has no `{stage.name}`")
    title = f"{kind} of the configuration `{pipeline.config.name}`"
    try:
        task = pipeline.task(stage.name)
    except MissingInput:
        section: Any = getattr(pipeline.config, stage.name)
        known = {"config": {stage.name: section.in_recipe()}}
        return Side(
            f"{title}, whose inputs are still to be made", kind, known, _made_before(pipeline, stage.name), partial=True
        )
    inputs = {role: of_artifact(pipeline.workspace, task.inputs[role]) for role in task.recipe["inputs"]}
    return Side(title, kind, task.recipe, inputs)


def _made_before(pipeline: Pipeline, name: str) -> dict[str, Side]:
    """The stages before one, as far as what they would make is known: by the role that it would have."""
    sides = {}
    for stage in pipeline.stages:
        if stage.name == name:
            break
        try:
            sides[stage.kind] = of_configuration(pipeline, stage.kind)
        except RaeError:
            continue
    return sides


def _as_json(value: Any) -> Any:
    return None if value is ABSENT else value


def _short(value: Any) -> str:
    if value is ABSENT:
        return "nothing"
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."
