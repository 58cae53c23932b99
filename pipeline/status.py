"""`rae status` and the plan: what is there, what is stale or unfinished, what would run and why."""

import datetime
import shutil

from rae.pipeline.console import Console, duration, size
from rae.pipeline.plan import STAGES, Pipeline
from rae.stages.sections import EncodeSection
from rae.store.artifacts import Workspace
from rae.store.catalog import Unfinished
from rae.store.errors import MissingInput, RaeError
from rae.store.layout import LatentLayout
from rae.store.lineage import Lineage
from rae.store.manifest import Artifact, Json


def show_status(workspace: Workspace, console: Console) -> None:
    """Every artifact, what is stale or damaged and why, and everything unfinished."""
    lineage = Lineage(workspace)
    artifacts = list(lineage.artifacts.values())
    if console.as_json:
        done = [summary(lineage, artifact) for artifact in artifacts]
        open_ = [
            {"kind": one.kind, "id": one.id, "name": one.name, "continue": _continue(one)}
            for one in lineage.unfinished.values()
        ]
        damaged = [{"ref": ref, "reason": error.message} for ref, error in lineage.damaged.items()]
        console.print_json({"artifacts": done, "unfinished": open_, "damaged": damaged})
        return
    columns = ["artifact", "id", "age", "size", "made by", "needed by", ""]
    if artifacts:
        console.table(workspace.place, columns, [_row(lineage, artifact) for artifact in artifacts])
    for artifact in artifacts:
        for reason in lineage.stale(artifact):
            console.say(f"stale: {lineage.called(artifact.ref)}: {reason}")
    for one in lineage.unfinished.values():
        console.say(f"unfinished: {one.kind} `{one.name}` ({one.id}); continue with: {_continue(one)}")
    for ref, error in lineage.damaged.items():
        console.say(f"damaged: {ref}: {error.message}")
    if not artifacts and not lineage.unfinished and not lineage.damaged:
        console.say(f"{workspace.place} holds no artifacts yet; begin with: rae run quickstart")


def _row(lineage: Lineage, artifact: Artifact) -> list[str]:
    inputs = ", ".join(lineage.called(one.ref) for one in lineage.inputs(artifact))
    made_by = _stage(artifact) + (f" from {inputs}" if inputs else "")
    needed_by = ", ".join(map(lineage.called, lineage.dependents(artifact.ref)))
    called = ", ".join(f"{artifact.kind}/{name}" for name in lineage.names_of(artifact.ref))
    age = age_seconds(artifact)
    return [
        called or lineage.called(artifact.ref),
        artifact.id,
        "" if age is None else duration(age),
        size(artifact.payload_bytes),
        made_by,
        needed_by,
        "stale" if lineage.stale(artifact) else "",
    ]


def summary(lineage: Lineage, artifact: Artifact) -> Json:
    """An artifact as `--json` has it."""
    manifest = artifact.manifest
    return {
        "kind": manifest.kind,
        "name": manifest.name,
        "names": lineage.names_of(artifact.ref),
        "id": manifest.id,
        "content": manifest.content,
        "created": manifest.provenance.get("created", ""),
        "age_seconds": age_seconds(artifact),
        "bytes": artifact.payload_bytes,
        "made_by": _stage(artifact),
        "inputs": [one.ref for one in lineage.inputs(artifact)],
        "dependents": lineage.dependents(artifact.ref),
        "stale": lineage.stale(artifact),
        "metrics": manifest.metrics,
    }


def age_seconds(artifact: Artifact) -> int | None:
    """How long ago the making of an artifact began; None where its manifest does not say."""
    try:
        created = datetime.datetime.fromisoformat(artifact.manifest.provenance["created"])
        return max(0, round((datetime.datetime.now(datetime.UTC) - created).total_seconds()))
    except (KeyError, TypeError, ValueError):
        return None


def _stage(artifact: Artifact) -> str:
    """The verb that made an artifact."""
    match artifact.manifest.recipe.get("stage"):
        case {"name": str(name)}:
            return name.replace("_", "-")
    return "?"


def _continue(one: Unfinished) -> str:
    match one.recipe.get("stage"):
        case {"name": str(words)} if words.startswith(("import ", "evaluate ")):
            return f"rae {words}, with the same arguments and --name {one.name}"
    verb = next(stage.verb for stage in STAGES.values() if stage.kind == one.kind)
    return f"rae {verb} CONFIG, with the configuration `{one.name}`"


def show_plan(pipeline: Pipeline, names: list[str], console: Console, caching: Json | None = None) -> None:
    """What would run, why, and the disk that it needs; as JSON, `caching` stands in the row of `encode`."""
    rows = [plan_row(one, name) for name in names for one in (pipeline, *pipeline.at_further_scales(STAGES[name]))]
    if console.as_json:
        console.print_json(
            [row | {"caching": caching} if caching and row["stage"] == "encode" else row for row in rows]
        )
        return
    first: dict[str, str] = {}
    for row in rows:  # what every stage waits for is said once
        if first.setdefault(row["why"], row["stage"]) != row["stage"] and row["state"] == "wait":
            row["why"] = f"as {first[row['why']]}"
    columns = ["stage", "state", "why"]
    console.table(f"plan of `{pipeline.config.name}`", columns, [[row[column] for column in columns] for row in rows])


def plan_row(pipeline: Pipeline, name: str) -> Json:
    """A stage's state: done, continue, run, or wait (for an earlier stage)."""
    stage = STAGES[name]
    row: Json = {"stage": stage.verb + pipeline.suffix, "kind": stage.kind}
    try:
        task = pipeline.task(name)
        found = pipeline.workspace.find(stage.kind, task.recipe)
    except MissingInput as error:
        return row | {"state": "wait", "why": error.message}
    except RaeError as error:
        return row | {"state": "refused", "why": error.message}
    if found is not None:
        return row | {"state": "done", "why": f"{found.kind}/{found.id}"}
    begun = [one for one in pipeline.workspace.unfinished() if one.kind == stage.kind and one.recipe == task.recipe]
    if begun:
        return row | {"state": "continue", "why": f"{stage.kind}/{begun[0].id} is unfinished"}
    row |= {"state": "run", "why": "nothing of this recipe in the workspace"}
    return row | _price(pipeline) if name == "encode" else row


def _price(pipeline: Pipeline) -> Json:
    """What the latents will take, said before anything is encoded, and whether the disk has room for them."""
    encode = pipeline.section("encode", EncodeSection)
    channels, (height, width) = pipeline.geometry()
    views, rows = encode.views, len(pipeline.train)
    needed = rows * views * LatentLayout(views, channels, height, width, 1, encode.dtype).latent_bytes
    root = pipeline.workspace.root.absolute()
    folder = next(parent for parent in (root, *root.parents) if parent.exists())
    free = shutil.disk_usage(folder).free
    shape = f"{rows} images x {views} view(s) x {channels} x {height} x {width} {encode.dtype}"
    verdict = "free there" if needed < free else "free there: not enough"
    return {"rows": rows, "bytes": needed, "why": f"{shape}: {size(needed)} to write, {size(free)} {verdict}"}
