"""`rae evaluate`: the command. Light, as all commands are: what it needs is imported when it runs."""

from typing import Annotated, Literal

import typer

from rae.pipeline.arguments import (
    DEFAULT_WORKSPACE,
    AsJson,
    Config,
    Device,
    DryRun,
    Quiet,
    Restart,
    Set,
    WorkspaceOption,
    prepare,
    run_verb,
    show_outcome,
)


def evaluate_command(
    config: Config,
    workspace: WorkspaceOption = DEFAULT_WORKSPACE,
    overrides: Set = None,
    make_reference: Annotated[
        Literal["train", "val"] | None,
        typer.Option(help="Instead of scoring: keep these real images' features, for `evaluate.reference`."),
    ] = None,
    images: Annotated[
        str | None, typer.Option(help="With --make-reference: a folder, tars or FILE.npz, in place of the shards.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="With --make-reference: what reference/NAME will mean.")] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    dry_run: DryRun = False,
    restart: Restart = False,
    device: Device = "auto",
) -> None:
    """Score reconstructions and samples; draws the samples if they are missing."""
    from rae.store.errors import ConfigError

    if make_reference is None and (images or name):
        raise ConfigError("`--images` and `--name` say what a reference is made of: give them with --make-reference")
    pipeline, options = prepare(config, workspace, overrides, as_json, quiet, restart, device)
    if make_reference is None:
        run_verb("evaluate", pipeline, options, dry_run)
        return
    from rae.pipeline import references

    show_outcome(references.make_reference(pipeline, make_reference, images, name, options), options)
