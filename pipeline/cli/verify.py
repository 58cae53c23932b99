"""`rae verify`: the command. Light, as all commands are: what it needs is imported when it runs."""

from typing import TYPE_CHECKING, Annotated

import typer

from rae.pipeline.cli.arguments import (
    DEFAULT_WORKSPACE,
    AsJson,
    Device,
    Quiet,
    Ref,
    Set,
    WorkspaceOption,
    options_for,
    prepare,
)

if TYPE_CHECKING:
    from rae.store.latents_verify import Mode


def verify_command(
    ref: Ref,
    workspace: WorkspaceOption = DEFAULT_WORKSPACE,
    quick: Annotated[bool, typer.Option("--quick", help="Look at sizes and metadata alone.")] = False,
    sampled: Annotated[bool, typer.Option("--sampled", help="Read every byte of 32 parts, others each time.")] = False,
    full: Annotated[bool, typer.Option("--full", help="Read every byte; the default.")] = False,
    repair: Annotated[bool, typer.Option("--repair", help="Make damaged files of latents again.")] = False,
    config: Annotated[
        str | None, typer.Option("--config", help="What the latents were made with; --repair may need it.")
    ] = None,
    overrides: Set = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    device: Device = "auto",
) -> None:
    """Check an artifact against its digests and name what is damaged; exit code 5 if anything is."""
    from rae.pipeline.verify import verify_artifact
    from rae.store.artifacts import Workspace
    from rae.store.errors import ConfigError

    if quick + sampled + full > 1:
        raise ConfigError("give one of --quick, --sampled and --full")
    if config is not None and not repair:
        raise ConfigError("`--config` says how to make damaged rows again: give it with --repair")
    mode: Mode = "quick" if quick else "sampled" if sampled else "full"
    pipeline = prepare(config, workspace, overrides)[0] if config is not None else None
    verify_artifact(Workspace(workspace), ref, mode, options_for(as_json, quiet, device=device), repair, pipeline)
