"""What the workspace holds for a configuration, what it cost, and where it came from. For the report; no torch."""

from dataclasses import dataclass

from rae.pipeline.console import duration, size
from rae.pipeline.plan import STAGES, Pipeline, Stage
from rae.store.errors import RaeError
from rae.store.manifest import Artifact, Json, differing_fields


@dataclass(frozen=True)
class Missing:
    """Why a section has nothing to show, and the command that would change that."""

    why: str
    command: str | None = None


@dataclass(frozen=True)
class Facts:
    """What the workspace holds for a configuration: artifacts by kind, and why the others are not there.

    An artifact of a stage that the configuration leaves out (`sample.dit` names a transformer of another one, say) is
    found through the lineage of those that use it.
    """

    pipeline: Pipeline
    made: dict[str, Artifact]
    missing: dict[str, Missing]

    @property
    def stages(self) -> list[Stage]:
        """The stages that belong to the report, in the order of the data flow."""
        return [stage for stage in STAGES.values() if stage in self.pipeline.stages or stage.kind in self.made]


def collect(pipeline: Pipeline) -> Facts:
    """Find what is done, stage by stage, and through lineage what it was made from."""
    found, missing = {}, {}
    for stage in pipeline.stages:
        try:
            artifact = pipeline.find(stage.name)
        except RaeError as error:
            missing[stage.kind] = Missing(error.message, error.next_command)
            continue
        if artifact is None:
            missing[stage.kind] = Missing(_not_made(pipeline, stage), pipeline.command(stage.verb))
        else:
            found[stage.kind] = artifact
    waiting = list(found.values())
    while waiting:
        for one in waiting.pop().manifest.inputs.values():
            if one.get("kind") not in found and (artifact := _resolved(pipeline, one)):
                found[artifact.kind] = artifact
                waiting.append(artifact)
                missing.pop(artifact.kind, None)
    for stage in STAGES.values():
        if stage.kind not in found and stage.kind not in missing:
            missing[stage.kind] = Missing(f"the configuration has no section `{stage.name}`")
    return Facts(pipeline, found, missing)


def _not_made(pipeline: Pipeline, stage: Stage) -> str:
    """Why the stage has nothing: it has not run, or what goes by this name was made with other settings."""
    before = _resolved(pipeline, {"kind": stage.kind, "id": pipeline.config.name})
    if before is None:
        return f"`{stage.verb}` has not run yet"
    fields = "; ".join(differing_fields(pipeline.task(stage.name).recipe, before.manifest.recipe))
    return f"`{stage.verb}` has not run with these settings; what is there was made with others ({fields})"


def _resolved(pipeline: Pipeline, one: Json) -> Artifact | None:
    """The artifact that an input of another one names, if it lies in this workspace."""
    try:
        return pipeline.workspace.resolve(f"{one.get('kind')}/{one.get('id')}")
    except RaeError:
        return None


def cost(facts: Facts) -> Json:
    """What every stage took: rows of the table, and their sum."""
    total = sum(seconds(artifact) for artifact in facts.made.values())
    rows, all_bytes = [], 0
    for stage in facts.stages:
        artifact = facts.made.get(stage.kind)
        if artifact is None:
            rows.append({"verb": stage.verb, "kind": stage.kind, "missing": True})
            continue
        taken = sum(path.stat().st_size for path in artifact.folder.rglob("*") if path.is_file())
        all_bytes += taken
        share = 100 * seconds(artifact) / total if total else 0.0
        rows.append(
            {"verb": stage.verb, "missing": False, "time": spoken(seconds(artifact)), "share": f"{share:.1f}"}
            | {"bytes": size(taken), "work": _work(artifact), "rate": _rate(artifact)}
            | {"made": _minute(artifact), "reused_from": _maker(facts, artifact)}
        )
    return {"rows": rows, "time": spoken(total), "bytes": size(all_bytes)}


def machines(facts: Facts) -> list[str]:
    """The machines that the stages ran on, in words, each once."""
    found = []
    for artifact in facts.made.values():
        about = artifact.manifest.provenance
        device, threads = about.get("device"), about.get("threads")
        if device:
            found.append(f"{device}, {threads} threads" if threads and device == "cpu" else str(device))
    return list(dict.fromkeys(found))


def lineage(facts: Facts) -> list[Json]:
    """Every artifact in the order of the data flow: ids, digests, what it was made from and by."""
    rows = []
    for stage in facts.stages:
        if stage.kind in facts.made:
            manifest = facts.made[stage.kind].manifest
            about = manifest.provenance
            inputs = [f"{one.get('kind')}/{one.get('id')}" for one in manifest.inputs.values()]
            weights = manifest.recipe.get("weights") or {}
            software = [f"{name} {about[name]}" for name in ("rae", "torch", "python") if name in about]
            rows.append(
                {"ref": f"{manifest.kind}/{manifest.id}", "name": manifest.name, "content": manifest.content}
                | {"inputs": inputs, "weights": weights, "command": about.get("command", "")}
                | {"software": ", ".join(software), "created": about.get("created", "")}
            )
    return rows


def seconds(artifact: Artifact) -> float:
    """The time that making it took; of a training, of all its attempts together."""
    value = artifact.manifest.metrics.get("seconds", 0.0)
    return float(value) if isinstance(value, int | float) else 0.0


def in_one_unit(time: float) -> tuple[str, str]:
    """A time for a headline: (`51`, `s`), (`6.3`, `min`), (`5.2`, `h`), (`9.4`, `d`)."""
    for unit, length, below in (("s", 1, 100), ("min", 60, 100), ("h", 3600, 100)):
        if time < below * length:
            return f"{time / length:.{0 if unit == 's' else 1}f}", unit
    return f"{time / 86400:.1f}", "d"


def spoken(time: float) -> str:
    """`0.4 s`, `51 s`, `3 min 20 s`."""
    return f"{time:.1f} s" if time < 10 else duration(time)


def _work(artifact: Artifact) -> str:
    """How much a stage did: `1,437 images`, `600 steps`."""
    metrics = artifact.manifest.metrics
    for name, unit in (("steps", "steps"), ("rows", "images"), ("images", "images"), ("train_rows", "images")):
        if isinstance(metrics.get(name), int | float):
            return f"{metrics[name] + metrics.get('val_rows', 0):,.0f} {unit}"
    return ""


def _rate(artifact: Artifact) -> str:
    """How fast it was; trainers count steps, the others images."""
    metrics, time = artifact.manifest.metrics, seconds(artifact)
    if artifact.kind == "latents" and metrics.get("rows"):
        return f"{_three_digits(metrics['rows'] / (metrics.get('seconds_encoding') or time or 1))} images/s"
    if metrics.get("steps") and time:
        return f"{_three_digits(metrics['steps'] / time)} steps/s"
    if isinstance(metrics.get("images_per_second"), int | float):
        return f"{_three_digits(metrics['images_per_second'])} images/s"
    return ""


def _three_digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _minute(artifact: Artifact) -> str:
    return str(artifact.manifest.provenance.get("created", ""))[:16].replace("T", " ")


def _maker(facts: Facts, artifact: Artifact) -> str | None:
    """The configuration that an artifact was reused from, if it was not made under this one's name."""
    return artifact.manifest.name if artifact.manifest.name != facts.pipeline.config.name else None
