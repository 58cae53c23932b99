"""`rae compare`: scores side by side, of one protocol alone."""

import difflib
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rae.pipeline.console import Console
from rae.pipeline.report_scores import METRICS, protocol_fields, protocol_value, read_scores
from rae.store.artifacts import Workspace
from rae.store.errors import ConfigError, StaleInput
from rae.store.manifest import Artifact, Json, canonical

_BETTER = {metric.name: metric.higher_is_better for metric in METRICS}
_BETTER |= {"psnr_db": True, "ssim": True, "perceptual_distance": False}
_OF_RECONSTRUCTIONS = ("reconstructions", "perceptual_distance", "reconstruction_reference")  # fields of the protocol
_NO_SCORES = ("seconds",)  # what the manifest's metrics hold besides
_SUGGESTED = 3  # more fields than these are no choice that somebody compares
_ABSENT = object()


def compare(refs: Sequence[str], excepted: Sequence[str], workspace: Workspace, console: Console) -> Json:
    """Show the scores that `refs` mean in a table, and return what `--json` prints.

    Args:
        excepted: dotted fields of the protocol, or their beginnings, that may differ (`sample.guidance_scale`,
            `sample`); they stand in the table.

    Raises:
        ConfigError: fewer than two scores, or a field that no protocol has.
        StaleInput: an artifact of another kind, or protocols that differ in a field that is not excepted.
    """
    if len(refs) < 2:
        raise ConfigError("a comparison takes two scores or more: rae compare A B")
    artifacts = [workspace.resolve(ref, "scores") for ref in refs]
    found = [read_scores(artifact) for artifact in artifacts]
    protocols = [dict(protocol_fields(scores.protocol)) for scores in found]
    metrics = [_scores(artifact) for artifact in artifacts]
    if not all(scores.reconstruction for scores in found):  # images from elsewhere have none: what both have compares
        protocols = [_without(protocol, _of_reconstructions) for protocol in protocols]
        metrics = [_without(one, lambda name: name.startswith("reconstruction_")) for one in metrics]
    names = sorted({name for protocol in protocols for name in protocol})
    for field in excepted:
        if not any(_covers(field, name) for name in names):
            close = difflib.get_close_matches(field, names, n=1)
            raise ConfigError(f"no protocol has a field `{field}`" + (f"; did you mean `{close[0]}`?" if close else ""))
    allowed = {name for name in names if any(_covers(field, name) for field in excepted)}
    _check_equal(refs, protocols, [name for name in names if name not in allowed], excepted)
    varying = [name for name in sorted(allowed) if _differ(protocols, name)]
    rows = [[name, "", *(_shown(protocol.get(name, _ABSENT)) for protocol in protocols)] for name in varying]
    for name in dict.fromkeys(name for one in metrics for name in one):
        rows.append([name, _direction(name), *(_number(one.get(name)) for one in metrics)])
    if not console.as_json:
        console.table("scores of one protocol", ["", "better", *refs], rows)
    return {
        "protocol": {name: protocols[0][name] for name in names if name in protocols[0] and name not in varying},
        "excepted": {name: [protocol.get(name) for protocol in protocols] for name in varying},
        "scores": [
            {"ref": ref, "id": artifact.id, "metrics": one}
            for ref, artifact, one in zip(refs, artifacts, metrics, strict=True)
        ],
    }


def _check_equal(
    refs: Sequence[str], protocols: Sequence[Mapping[str, Any]], names: Sequence[str], excepted: Sequence[str]
) -> None:
    differing = [name for name in names if _differ(protocols, name)]
    if not differing:
        return
    told = "; ".join(
        f"{name}: "
        + ", ".join(f"{_shown(one.get(name, _ABSENT))} of {ref}" for ref, one in zip(refs, protocols, strict=True))
        for name in differing
    )
    command = None
    if len(differing) <= _SUGGESTED:
        command = shlex.join(["rae", "compare", *refs, *(f"--except={name}" for name in [*excepted, *differing])])
    raise StaleInput(f"these scores were not taken by one protocol, and do not compare ({told})", command)


def _without(values: Mapping[str, Any], dropped: Callable[[str], bool]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if not dropped(name)}


def _of_reconstructions(name: str) -> bool:
    return any(_covers(field, name) for field in _OF_RECONSTRUCTIONS)


def _covers(field: str, name: str) -> bool:
    return name == field or name.startswith(f"{field}.")


def _differ(protocols: Sequence[Mapping[str, Any]], name: str) -> bool:
    return len({canonical(one[name]) if name in one else b"" for one in protocols}) > 1


def _scores(artifact: Artifact) -> dict[str, float]:
    return {name: value for name, value in artifact.manifest.metrics.items() if name not in _NO_SCORES}


def _direction(name: str) -> str:
    plain = re.sub(r"^reconstruction_|_at_noise_.*$", "", name)
    return {True: "higher", False: "lower", None: ""}[_BETTER.get(plain)]


def _number(value: Any) -> str:
    return "" if value is None else f"{value:.5g}" if isinstance(value, float) else str(value)


def _shown(value: Any) -> str:
    return "nothing" if value is _ABSENT else protocol_value(value)
