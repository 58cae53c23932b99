"""`rae gc` and `rae rm`: the commands. Light, as all commands are: what they need is imported when they run."""

import re
from typing import Annotated

import typer

from rae.pipeline.cli.arguments import DEFAULT_WORKSPACE, AsJson, Quiet, Ref, WorkspaceOption, options_for

_UNITS = {"s": 1, "min": 60, "h": 3600, "d": 86400}


def gc_command(
    workspace: WorkspaceOption = DEFAULT_WORKSPACE,
    delete: Annotated[bool, typer.Option("--delete", help="Remove it, instead of saying what would go.")] = False,
    grace: Annotated[
        str, typer.Option(metavar="TIME", help="Younger things stay: 90min, 24h, 7d; somebody may have just made them.")
    ] = "24h",
    unfinished: Annotated[
        bool, typer.Option("--unfinished", help="Also work that was begun and not touched for as long.")
    ] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Say what nobody needs: artifacts of no name and no use, attempts of killed runs, leftovers."""
    from rae.pipeline.gc import collect_garbage
    from rae.store.artifacts import Workspace

    seconds = _seconds(grace)
    collect_garbage(Workspace(workspace), seconds, delete, unfinished, options_for(as_json, quiet).console)


def _seconds(text: str) -> float:
    from rae.store.errors import ConfigError

    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|min|h|d)|0", text)
    if found is None:
        raise ConfigError(f"`--grace {text}` is no time; say it as 30s, 90min, 24h or 7d")
    return float(found[1]) * _UNITS[found[2]] if found[1] else 0.0


def rm_command(
    ref: Ref,
    workspace: WorkspaceOption = DEFAULT_WORKSPACE,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go; remove nothing.")] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Remove an artifact that nothing else was made from, with its milestones and names."""
    from rae.pipeline.gc import remove
    from rae.store.artifacts import Workspace

    remove(Workspace(workspace), ref, dry_run, options_for(as_json, quiet).console)
