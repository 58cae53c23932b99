"""`rae status`, `rae inspect` and the plan: what is there, what is unfinished, what would run and why."""

import shutil

from rae.pipeline.console import Console, duration, size
from rae.pipeline.plan import STAGES, Pipeline
from rae.stages.models.model_folder import read_json
from rae.stages.sections import EncodeSection
from rae.store.artifacts import Unfinished, Workspace
from rae.store.errors import MissingInput, RaeError
from rae.store.layout import LatentLayout
from rae.store.manifest import Artifact, Json

_SHOWN_INVALID_ROWS = 20


def show_status(workspace: Workspace, console: Console) -> None:
    """Every artifact and everything unfinished."""
    _check_readable(workspace)
    artifacts, unfinished = list(workspace.artifacts()), list(workspace.unfinished())
    if console.as_json:
        done = [_summary(artifact) for artifact in artifacts]
        open_ = [{"kind": one.kind, "id": one.id, "name": one.name, "continue": _continue(one)} for one in unfinished]
        console.print_json({"artifacts": done, "unfinished": open_})
        return
    rows = []
    for artifact in artifacts:
        summary = _summary(artifact)
        made_from = ", ".join(summary["inputs"]) or "-"
        rows.append(
            [artifact.kind, summary["name"], artifact.id, summary["created"], size(summary["bytes"]), made_from]
        )
    if rows:
        console.table(f"{workspace.place}", ["kind", "name", "id", "made", "size", "from"], rows)
    for one in unfinished:
        console.say(f"unfinished: {one.kind} `{one.name}` ({one.id}); continue with: {_continue(one)}")
    if not rows and not unfinished:
        console.say(f"{workspace.place} holds no artifacts yet; begin with: rae run quickstart")


def _check_readable(workspace: Workspace) -> None:
    try:
        list(workspace.root.iterdir()) if workspace.root.exists() else None
    except OSError as error:
        raise MissingInput(f"the workspace {workspace.place} cannot be read ({error.strerror})") from error


def _summary(artifact: Artifact) -> Json:
    manifest = artifact.manifest
    inputs = [f"{one['kind']}/{one['id']}" for one in manifest.inputs.values()]
    created = manifest.provenance.get("created", "")
    head = {"kind": manifest.kind, "name": manifest.name, "id": manifest.id, "content": manifest.content}
    return head | {"created": created, "bytes": artifact.payload_bytes, "inputs": inputs, "metrics": manifest.metrics}


def _continue(one: Unfinished) -> str:
    match one.recipe.get("stage"):
        case {"name": str(words)} if words.startswith("import "):
            return f"rae {words}, with the same arguments and --name {one.name}"
    verb = next(stage.verb for stage in STAGES.values() if stage.kind == one.kind)
    return f"rae {verb} CONFIG, with the configuration `{one.name}`"


def show_artifact(workspace: Workspace, ref: str, console: Console) -> None:
    """One artifact: numbers, settings, inputs, and of latents the invalid rows with their reasons."""
    artifact = workspace.resolve(ref)
    manifest = artifact.manifest
    invalid, encoder = _invalid_rows(artifact), _encoder(artifact)
    if console.as_json:
        details = {"path": str(artifact.folder), "config": manifest.config, "provenance": manifest.provenance}
        console.print_json(
            _summary(artifact) | details | {"recipe": manifest.recipe, "encoder": encoder, "invalid": invalid}
        )
        return
    console.say(f"{artifact.kind}/{artifact.id}  `{manifest.name}`  {size(artifact.payload_bytes)}  {artifact.folder}")
    console.say(f"content {manifest.content}")
    sections = {"numbers": manifest.metrics, "provenance": manifest.provenance, **manifest.config}
    if encoder is not None:
        sections["encoder of its tokens"] = {key: value for key, value in encoder.items() if value is not None}
    for title, values in sections.items():
        console.say(f"{title}:")
        for key, value in values.items():
            console.say(f"  {key}: {duration(value) if key == 'seconds' else value}")
    for line in _lineage(workspace, artifact, depth=0):
        console.say(line)
    for row in invalid[:_SHOWN_INVALID_ROWS]:
        console.say(f"invalid: {row['key']} in source shard {row['source_shard']}: {row['reason']}")
    if len(invalid) > _SHOWN_INVALID_ROWS:
        console.say(f"invalid: {len(invalid) - _SHOWN_INVALID_ROWS} more; --json lists them all")


def _lineage(workspace: Workspace, artifact: Artifact, depth: int) -> list[str]:
    """The tree of what an artifact was made from, as far as it lies in this workspace."""
    lines = []
    for role, one in artifact.manifest.inputs.items():
        lines.append(f"{'  ' * depth}made from {role}: {one['kind']}/{one['id']}")
        folder = workspace.folder(one["kind"], one["id"])
        if (folder / "manifest.json").is_file():
            lines += _lineage(workspace, workspace.resolve(f"{one['kind']}/{one['id']}"), depth + 1)
    return lines


def _encoder(artifact: Artifact) -> Json | None:
    """The encoder of an artifact's tokens: width, grid, input size, normalisation, digest, and version if it has one.

    None for kinds without. Raises `CorruptData` if its description cannot be read.
    """
    file = {"latents": "encoder.json", "decoder": "decoder.json", "dit": "dit.json"}.get(artifact.kind)
    if file is None or not (path := artifact.payload / file).is_file():
        return None
    described = read_json(path)
    encoder: Json | None = described if artifact.kind == "latents" else described.get("encoder")
    return encoder


def _invalid_rows(artifact: Artifact) -> list[Json]:
    if artifact.kind != "latents":
        return []
    from rae.store.latents import LatentStore

    return LatentStore(artifact.payload).invalid_rows()


def show_plan(pipeline: Pipeline, names: list[str], console: Console) -> None:
    """What would run, why, and the disk that it needs."""
    rows = [plan_row(one, name) for name in names for one in (pipeline, *pipeline.at_further_scales(STAGES[name]))]
    if console.as_json:
        console.print_json(rows)
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
