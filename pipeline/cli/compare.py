"""`rae compare`: the command. Light, as all commands are: what it needs is imported when it runs."""

from typing import Annotated

import typer

from rae.pipeline.cli.arguments import DEFAULT_WORKSPACE, AsJson, WorkspaceOption, options_for


def compare_command(
    refs: Annotated[list[str], typer.Argument(metavar="A B...", help="Scores: KIND/NAME, KIND/ID, a path, a name.")],
    workspace: WorkspaceOption = DEFAULT_WORKSPACE,
    excepted: Annotated[
        list[str] | None,
        typer.Option("--except", metavar="FIELD", help="A field of the protocol that may differ: sample.num_steps."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show scores side by side, if they were taken by one protocol; exit code 4 names the fields that differ."""
    from rae.pipeline.compare import compare
    from rae.store.artifacts import Workspace

    console = options_for(as_json).console
    found = compare(refs, excepted or [], Workspace(workspace), console)
    if as_json:
        console.print_json(found)
