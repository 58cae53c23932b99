"""`rae export ...`: artifacts as the files that other programs read."""

from pathlib import Path
from typing import Annotated

import typer

from rae.pipeline.cli.arguments import DEFAULT_WORKSPACE, AsJson, Quiet, Ref, WorkspaceOption, options_for

export_app = typer.Typer(help="Write artifacts for other programs.", no_args_is_help=True, rich_markup_mode=None)


@export_app.command("official")
def official_command(
    ref: Ref,
    out: Annotated[Path, typer.Argument(help="The folder to write into.")],
    workspace: WorkspaceOption = DEFAULT_WORKSPACE,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write a decoder or DiT as the official release loads it: EMA weights, statistics, their configuration."""
    from rae.pipeline.interchange.export_official import export_official
    from rae.store.artifacts import Workspace

    console = options_for(as_json, quiet).console
    made = export_official(ref, out, Workspace(workspace), console)
    if as_json:
        console.print_json(made)


@export_app.command("diffusers")
def diffusers_command(
    ref: Ref,
    out: Annotated[Path, typer.Argument(help="The folder to write into.")],
    encoder: Annotated[str | None, typer.Option(help="Hub id or folder; by default what the decoder says.")] = None,
    stats: Annotated[str | None, typer.Option(help="REF of latents or a dit whose statistics go in.")] = None,
    workspace: WorkspaceOption = DEFAULT_WORKSPACE,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write a decoder with its encoder as diffusers' AutoencoderRAE loads it: EMA weights, statistics."""
    from rae.pipeline.interchange.export_diffusers import export_diffusers
    from rae.store.artifacts import Workspace

    console = options_for(as_json, quiet).console
    made = export_diffusers(ref, out, encoder, stats, Workspace(workspace), console)
    if as_json:
        console.print_json(made)


@export_app.command("adm-npz")
def adm_npz_command(
    ref: Ref,
    out: Annotated[Path, typer.Argument(help="The file to write: FILE.npz.")],
    adm_truncate: Annotated[
        bool,
        typer.Option("--adm-truncate", help="floor(255 x), as published numbers were taken, for the nearest level."),
    ] = False,
    workspace: WorkspaceOption = DEFAULT_WORKSPACE,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write samples as ADM's evaluator reads them: uint8 images and their labels in one .npz."""
    from rae.pipeline.interchange.export_adm_npz import export_adm_npz
    from rae.store.artifacts import Workspace

    console = options_for(as_json, quiet).console
    made = export_adm_npz(ref, out, adm_truncate, Workspace(workspace), console)
    if as_json:
        console.print_json(made)


@export_app.command("png")
def png_command(
    ref: Ref,
    out: Annotated[Path, typer.Argument(help="The folder to write into.")],
    workspace: WorkspaceOption = DEFAULT_WORKSPACE,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write samples as PNG files, INDEX_CLASS.png."""
    from rae.pipeline.interchange.export_png import export_png
    from rae.store.artifacts import Workspace

    console = options_for(as_json, quiet).console
    made = export_png(ref, out, Workspace(workspace), console)
    if as_json:
        console.print_json(made)
