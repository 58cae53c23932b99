"""`rae import ...`: models made elsewhere become artifacts."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from rae.pipeline.arguments import DEFAULT_WORKSPACE, AsJson, Quiet, Restart, WorkspaceOption, options_for

import_app = typer.Typer(help="Bring in models made elsewhere.", no_args_is_help=True, rich_markup_mode=None)


@import_app.command("official")
def official_command(
    file: Annotated[Path, typer.Argument(help="A checkpoint of the official release: .pt, .pth or .safetensors.")],
    name: Annotated[str | None, typer.Option(help="What KIND/NAME will mean.")] = None,
    stats: Annotated[Path | None, typer.Option(help="The release's stat.pt for these latents; a DiT needs it.")] = None,
    encoder: Annotated[str | None, typer.Option(help="Hub id or folder; DINOv2-B with registers by default.")] = None,
    config: Annotated[Path | None, typer.Option(help="Its YAML or config.json, for what shapes do not tell.")] = None,
    weights: Annotated[
        Literal["ema", "model"] | None, typer.Option(help="Which set of a training checkpoint; ema by default.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Where the discriminator's backbone goes: FILE.safetensors.")] = None,
    workspace: WorkspaceOption = DEFAULT_WORKSPACE,
    as_json: AsJson = False,
    quiet: Quiet = False,
    restart: Restart = False,
) -> None:
    """Import a decoder, a DiT, or the discriminator's backbone: told apart by their tensors, loaded strictly."""
    from rae.pipeline.import_official import Official, import_official
    from rae.store.artifacts import Workspace

    official = Official(file, name, out, stats, encoder, config, weights)
    options = options_for(as_json, quiet, restart, device="cpu")
    made = import_official(official, Workspace(workspace), options)
    if as_json:
        options.console.print_json(made)
