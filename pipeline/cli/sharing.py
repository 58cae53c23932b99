"""`rae push` and `rae pull`: the commands. Light, as all commands are: what they need is imported when they run."""

from typing import Annotated

import typer

from rae.pipeline.cli.arguments import DEFAULT_WORKSPACE, AsJson, Quiet, Ref, WorkspaceOption, options_for

Alone = Annotated[bool, typer.Option("--alone", help="The artifact without what it was made from.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be copied and how many bytes; copy nothing.")]


def push_command(
    ref: Ref,
    to: Annotated[str, typer.Option("--to", metavar="PLACE", help="A workspace: s3://..., az://..., a folder.")],
    workspace: WorkspaceOption = DEFAULT_WORKSPACE,
    alone: Alone = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Copy an artifact and what it was made from to another workspace."""
    from rae.pipeline.sharing import carry
    from rae.store.artifacts import Workspace

    console = options_for(as_json, quiet).console
    carry("push", ref, Workspace(workspace), Workspace(to, upstreams=()), console, alone, dry_run)


def pull_command(
    ref: Ref,
    from_: Annotated[str, typer.Option("--from", metavar="PLACE", help="A workspace: s3://..., az://..., a folder.")],
    workspace: WorkspaceOption = DEFAULT_WORKSPACE,
    alone: Alone = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Copy an artifact and what it was made from out of another workspace."""
    from rae.pipeline.sharing import carry
    from rae.store.artifacts import Workspace

    console = options_for(as_json, quiet).console
    carry("pull", ref, Workspace(from_), Workspace(workspace, upstreams=()), console, alone, dry_run)
