"""`rae inspect`, `rae diff`, `rae tag`: the commands. Light, as all are: what they need is imported when they run."""

from typing import Annotated

import typer

from rae.pipeline.cli.arguments import DEFAULT_WORKSPACE, AsJson, Ref, Set, WorkspaceOption, options_for, prepare


def inspect_command(
    ref: Ref,
    workspace: WorkspaceOption = DEFAULT_WORKSPACE,
    card: Annotated[bool, typer.Option("--card", help="An artifact card in Markdown.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show one artifact: what made it, its numbers, its lineage, its invalid rows."""
    from rae.pipeline.inspect import show_artifact
    from rae.store.artifacts import Workspace
    from rae.store.errors import ConfigError

    if card and as_json:
        raise ConfigError("a card is Markdown: give --card or --json")
    show_artifact(Workspace(workspace), ref, options_for(as_json).console, card)


def diff_command(
    a: Annotated[str, typer.Argument(help="A REF, or a configuration: a preset's name or a YAML file.")],
    b: Annotated[str, typer.Argument(help="The REF to hold against it.")],
    workspace: WorkspaceOption = DEFAULT_WORKSPACE,
    overrides: Set = None,
    as_json: AsJson = False,
) -> None:
    """Say which settings, inputs or weights made two artifacts differ, or an artifact and a configuration."""
    from rae.pipeline.config import presets
    from rae.pipeline.diff import of_artifact, of_configuration, show_differences
    from rae.store.artifacts import Workspace

    here = Workspace(workspace)
    other = here.resolve(b)
    if a in presets() or a.endswith((".yaml", ".yml")):
        one = of_configuration(prepare(a, workspace, overrides)[0], other.kind)
    else:
        one = of_artifact(here, here.resolve(a))
    show_differences(one, of_artifact(here, other), options_for(as_json).console)


def tag_command(
    ref: Ref,
    name: Annotated[str | None, typer.Argument(help="Another name; what it meant before loses it.")] = None,
    description: Annotated[str | None, typer.Option(help="What a person should know of it.")] = None,
    license: Annotated[str | None, typer.Option(help="What others may do with it: an SPDX name, say.")] = None,
    workspace: WorkspaceOption = DEFAULT_WORKSPACE,
    as_json: AsJson = False,
) -> None:
    """Give an artifact a name, a description, a licence; the artifact itself stays as it is."""
    from rae.pipeline.tag import tag
    from rae.store.artifacts import Workspace

    tag(Workspace(workspace), ref, name, description, license, options_for(as_json).console)
