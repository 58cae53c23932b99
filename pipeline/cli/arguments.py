"""The arguments and options that several commands share, and what they mean together. Light: typer alone."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rae.pipeline.launch import Crew
    from rae.pipeline.plan import Pipeline
    from rae.pipeline.runner import Options, Outcome

Config = Annotated[str, typer.Argument(help="A preset's name (see `rae config ls`) or a YAML file.")]
Ref = Annotated[str, typer.Argument(help="KIND/NAME, KIND/ID, a path, or a bare name if it is unique.")]
WorkspaceOption = Annotated[
    str, typer.Option("--workspace", "-w", envvar="RAE_WORKSPACE", help="The folder that artifacts live in.")
]
Set = Annotated[
    list[str] | None, typer.Option("--set", "-s", metavar="KEY=VALUE", help="Override a setting: train_dit.lr=1e-3.")
]
AsJson = Annotated[bool, typer.Option("--json", help="JSON on stdout, everything else on stderr.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Say nothing but errors.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would run and why; run nothing.")]
TryOut = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Build everything, take two steps with every loss, say what training takes in memory and time; write"
        " nothing.",
    ),
]
Restart = Annotated[bool, typer.Option("--restart", help="Drop unfinished work of this name with other settings.")]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1, mps, or auto.")]
ProfileSteps = Annotated[
    int, typer.Option("--profile", metavar="N", min=0, help="Write a trace of N steps to WORKSPACE/runs/profiles.")
]
DEFAULT_WORKSPACE = "rae-workspace"


def options_for(
    as_json: bool = False,
    quiet: bool = False,
    restart: bool = False,
    device: str = "auto",
    crew: "Crew | None" = None,
) -> "Options":
    """What the options mean for whatever is run; also sends the log where it belongs."""
    from rae.pipeline.console import Console, log_to
    from rae.pipeline.launch import Crew, is_main
    from rae.pipeline.runner import Options

    quiet = quiet or not is_main()
    log_to("stderr", quiet)
    return Options(restart=restart, device=device, crew=crew or Crew(), console=Console(quiet, as_json))


def prepare(
    config: str,
    workspace: str,
    overrides: list[str] | None,
    as_json: bool = False,
    quiet: bool = False,
    restart: bool = False,
    device: str = "auto",
    crew: "Crew | None" = None,
) -> tuple["Pipeline", "Options"]:
    """The configuration in its workspace, read and checked, and how to run it."""
    from rae.pipeline import config as configuration
    from rae.pipeline.plan import Pipeline
    from rae.store.artifacts import Workspace

    settings = configuration.load(config, overrides)
    options = options_for(as_json, quiet, restart, device, crew)
    return Pipeline(settings, Workspace(workspace), configuration.words(config, overrides)), options


def show_outcome(outcome: "Outcome", options: "Options") -> None:
    """With `--json`, what a command made."""
    from rae.pipeline.launch import is_main

    if options.console.as_json and is_main():
        options.console.print_json(outcome.to_json())


def run_verb(name: str, pipeline: "Pipeline", options: "Options", dry_run: bool = False) -> None:
    """Run one stage, or with `dry_run` say whether it would run and why."""
    from rae.pipeline import runner

    if dry_run:
        show_plan(pipeline, [name], options)
    else:
        show_outcome(runner.run_verb(pipeline, name, options), options)


def show_plan(
    pipeline: "Pipeline", names: list[str], options: "Options", caching: dict[str, Any] | None = None
) -> None:
    """What these stages would do."""
    from rae.pipeline.status import show_plan

    show_plan(pipeline, names, options.console, caching)
