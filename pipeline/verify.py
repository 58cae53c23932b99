"""`rae verify`: whether an artifact is what was published, and the repair of latents that are not."""

import functools
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rae.pipeline.plan import Pipeline
from rae.pipeline.runner import Options
from rae.store.artifacts import Workspace
from rae.store.errors import ConfigError, CorruptData, RaeError, StaleInput
from rae.store.latents_repair import EncodedRow, Repair, published_layout
from rae.store.latents_verify import Mode, Problem, verify
from rae.store.layout import ARRAY_FILE, LatentLayout, Part
from rae.store.manifest import Artifact, differing_fields
from rae.store.transfer import damaged
from rae.store.zarr_shard import file_sha256

if TYPE_CHECKING:
    from rae.stages.encode import Encoding

_SHOWN = 20


def verify_artifact(
    workspace: Workspace, ref: str, mode: Mode, options: Options, repair: bool = False, pipeline: Pipeline | None = None
) -> None:
    """Say what is wrong with an artifact; with `repair`, mend latents by `pipeline`, the configuration that made them.

    Raises `CorruptData` (exit code 5) if anything is wrong in the end.
    """
    artifact = workspace.resolve(ref)
    if repair and artifact.mirror is not None:
        raise ConfigError(f"{artifact.ref} lies in {artifact.mirror.objects.place}: pull it, repair it and push it")
    if repair and artifact.kind != "latents":
        raise ConfigError(f"{artifact.kind}/{artifact.id} can't be repaired, only latents can: remove it and run again")
    repairing = shlex.join(["rae", "verify", ref, "-w", workspace.place, "--repair", "--config"]) + " CONFIG"
    problems, replaced = find_problems(artifact, mode), list[Path]()
    if problems and repair:
        for problem in problems:
            options.console.say(f"damaged: {problem}")
        replaced = _repair(artifact, mode, pipeline, options.device, repairing)
        for path in replaced:
            options.console.say(f"repaired: {path}")
        problems = find_problems(artifact, mode)
    name = f"{artifact.kind}/{artifact.id}"
    if options.console.as_json:
        found = [{"file": str(one.file), "reason": one.reason, "slot": one.slot, "key": one.key} for one in problems]
        options.console.print_json(
            {"artifact": name, "mode": mode, "problems": found, "repaired": [str(path) for path in replaced]}
        )
    if not problems:
        options.console.say(f"{name} is whole ({mode})")
        return
    for problem in problems[:_SHOWN]:
        options.console.say(str(problem))
    if len(problems) > _SHOWN:
        options.console.say(f"{len(problems) - _SHOWN} more; --json lists them all")
    raise CorruptData(
        f"{len(problems)} problem(s) in {name}, the first in {problems[0].file}",
        repairing if artifact.kind == "latents" and artifact.mirror is None and not repair else None,
    )


def find_problems(artifact: Artifact, mode: Mode) -> list[Problem]:
    """Everything that is wrong with an artifact; of others than latents, `quick` looks at sizes and the rest at all.

    So it does of latents that lie in a bucket, where every byte that is looked at has to travel.
    """
    if artifact.mirror is not None:
        return [Problem(Path(path), reason) for path, reason in damaged(artifact.mirror.objects, artifact, mode)]
    if artifact.kind == "latents":
        try:
            layout, _ = LatentLayout.load(artifact.folder)
        except RaeError as error:
            return [Problem(artifact.folder / ARRAY_FILE, error.message)]
        return verify(artifact.folder, layout, mode)
    problems = []
    for entry in artifact.manifest.files:
        path = artifact.folder / entry["path"]
        if not path.resolve().is_relative_to(artifact.folder.resolve()):
            problems.append(Problem(path, "is a link that leads out of the artifact"))
        elif not path.exists():
            problems.append(Problem(path, "is missing"))
        elif path.stat().st_size != entry["bytes"] or (mode != "quick" and file_sha256(path) != entry["sha256"]):
            problems.append(Problem(path, "does not match the manifest"))
    return problems


def _repair(artifact: Artifact, mode: Mode, pipeline: Pipeline | None, device: str, repairing: str) -> list[Path]:
    @functools.cache
    def encoding() -> "Encoding":
        from rae.pipeline import launch
        from rae.stages.encode import Encoding
        from rae.stages.sections import EncodeSection

        if pipeline is None:
            raise ConfigError(
                "this takes the encoder again: name the configuration that the latents were made with",
                repairing,
            )
        section = pipeline.section("encode", EncodeSection)
        return Encoding(section, pipeline.train, pipeline.encoder_source, launch.device_of(device))

    if pipeline is not None:
        recipe = pipeline.task("encode").recipe
        if fields := "; ".join(differing_fields(recipe, artifact.manifest.recipe)):
            raise StaleInput(f"latents/{artifact.id} were not made with `{pipeline.config.name}` ({fields})")
    layout = published_layout(artifact.folder, artifact.manifest)

    def encode(part: Part, rows: Sequence[int]) -> Iterable[EncodedRow]:
        return encoding().again(part, rows)

    def describe() -> Mapping[str, bytes]:
        return encoding().descriptions()

    return Repair(artifact.folder, layout, artifact.manifest, encode, describe).run(mode)
