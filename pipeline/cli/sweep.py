"""`rae sweep`: the command. Light, as all commands are: what it needs is imported when it runs."""

from typing import TYPE_CHECKING, Annotated

import typer

from rae.pipeline.cli.arguments import (
    DEFAULT_WORKSPACE,
    AsJson,
    Device,
    DryRun,
    Quiet,
    Restart,
    Set,
    WorkspaceOption,
    options_for,
)

if TYPE_CHECKING:
    from rae.pipeline.runner import Options
    from rae.pipeline.sweep import Sweep

SweepConfig = Annotated[str, typer.Argument(help="An experiment's name (see `rae config ls`) or a YAML file.")]
Size = Annotated[str | None, typer.Option(help="One of the sweep's sizes: cpu, gpu. Means -s sweep.size=SIZE.")]


def sweep_command(
    config: SweepConfig,
    workspace: WorkspaceOption = DEFAULT_WORKSPACE,
    overrides: Set = None,
    size: Size = None,
    parts: Annotated[
        str | None, typer.Option(metavar="I/N", help="This share of the runs, 0/N to N-1/N: for job arrays.")
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    dry_run: DryRun = False,
    restart: Restart = False,
    device: Device = "auto",
) -> None:
    """Run every variant of a configuration with every seed; then a table, verdicts and a report."""
    from rae.pipeline import launch, sweep_plan
    from rae.pipeline.sweep import run_sweep, sweep_of
    from rae.store.artifacts import Workspace
    from rae.store.errors import PartialResult

    options = options_for(as_json, quiet, restart, device)
    sized = [*(overrides or []), *([f"sweep.size={size}"] if size else [])]
    sweep = sweep_of(config, Workspace(workspace), sized)
    if dry_run:
        sweep_plan.show(sweep, options.console)
        return
    try:
        run_sweep(sweep, options, launch.share_of(parts) if parts else (0, 1))
    except PartialResult:
        show_results(sweep, options)
        raise
    show_results(sweep, options)


def show_results(sweep: "Sweep", options: "Options") -> None:
    """The table of what is done so far, and the files and the report that hold it."""
    from rae.pipeline import sweep_results
    from rae.pipeline.sweep_report import write_report

    results = sweep_results.collect(sweep)
    if not options.console.as_json and not options.console.quiet:
        sweep_results.say_results(results, options.console)
    path = write_report(results)
    options.console.say(f"report: {path}")
    if options.console.as_json:
        options.console.print_json(sweep_results.to_json(results))
