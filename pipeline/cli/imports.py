"""`rae import ...`: models made elsewhere become artifacts."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from rae.pipeline.cli.arguments import DEFAULT_WORKSPACE, AsJson, Quiet, Restart, WorkspaceOption, options_for

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
    from rae.pipeline.interchange.import_official import Official, import_official
    from rae.store.artifacts import Workspace

    official = Official(file, name, out, stats, encoder, config, weights)
    options = options_for(as_json, quiet, restart, device="cpu")
    made = import_official(official, Workspace(workspace), options)
    if as_json:
        options.console.print_json(made)


@import_app.command("diffusers")
def diffusers_command(
    model: Annotated[str, typer.Argument(help="The folder or hub id of an AutoencoderRAE or AutoencoderKL.")],
    name: Annotated[str, typer.Option(help="What decoder/NAME will mean.")],
    image_size: Annotated[int | None, typer.Option(min=1, help="KL: pixels; by default its sample_size.")] = None,
    encoder: Annotated[str | None, typer.Option(help="RAE: hub id or folder of the encoder that is inside.")] = None,
    allow_download: Annotated[
        bool, typer.Option("--allow-download", help="Fetch from the hub what is missing.")
    ] = False,
    workspace: WorkspaceOption = DEFAULT_WORKSPACE,
    as_json: AsJson = False,
    quiet: Quiet = False,
    restart: Restart = False,
) -> None:
    """Import the decoder of an AutoencoderRAE, or of an AutoencoderKL, the baseline: `sample.decoder: NAME`."""
    from rae.pipeline.interchange.import_diffusers import Diffusers, import_diffusers
    from rae.store.artifacts import Workspace

    options = options_for(as_json, quiet, restart, device="cpu")
    asked = Diffusers(model, name, image_size, encoder, allow_download)
    made = import_diffusers(asked, Workspace(workspace), options)
    if as_json:
        options.console.print_json(made.to_json())


@import_app.command("official-config")
def official_config_command(
    file: Annotated[Path, typer.Argument(help="A YAML file of the official release.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write it here instead of to the terminal.")] = None,
) -> None:
    """Print a YAML file of the official release as a configuration of ours, headed by what is not the same."""
    from rae.pipeline.interchange.official_config import convert, to_yaml
    from rae.store.errors import StaleInput

    reading = convert(file)
    text = to_yaml(reading)
    if out is None:
        print(text, end="")
        return
    if out.exists() and out.read_text(encoding="utf-8") != text:
        raise StaleInput(f"{out} is there already, and is another: write to another file")
    out.write_text(text, encoding="utf-8")
    for line in (*reading.notes, *(f"next: {command}" for command in reading.commands), f"wrote {out}"):
        print(line)


@import_app.command("adm-npz")
def adm_npz_command(
    file: Annotated[Path, typer.Argument(help="ADM's statistics: an .npz with mu and sigma.")],
    name: Annotated[str, typer.Option(help="What reference/NAME will mean.")],
    split: Annotated[
        Literal["train", "val"],
        typer.Option(help="Of which images: those that generators learn from, or held-out ones."),
    ],
    workspace: WorkspaceOption = DEFAULT_WORKSPACE,
    as_json: AsJson = False,
    quiet: Quiet = False,
    restart: Restart = False,
) -> None:
    """Import moments of real images as a reference, taken at the word of whoever made them."""
    from rae.pipeline.interchange.import_adm_npz import import_adm_npz
    from rae.store.artifacts import Workspace

    options = options_for(as_json, quiet, restart, device="cpu")
    made = import_adm_npz(file, name, split, Workspace(workspace), options)
    if as_json:
        options.console.print_json(made.to_json())
