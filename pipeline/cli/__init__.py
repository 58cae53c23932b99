"""The commands. Thin: each reads its configuration, calls one function, prints what it returns.

Nothing heavy is imported here: `rae --help` costs what a bare typer program costs.
"""

import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from rae.pipeline.cli.arguments import (
    DEFAULT_WORKSPACE,
    AsJson,
    Config,
    Device,
    DryRun,
    ProfileSteps,
    Quiet,
    Restart,
    Set,
    TryOut,
    WorkspaceOption,
    options_for,
    prepare,
    run_verb,
    show_plan,
)
from rae.pipeline.cli.compare import compare_command
from rae.pipeline.cli.config import config_app
from rae.pipeline.cli.evaluate import evaluate_command
from rae.pipeline.cli.exports import export_app
from rae.pipeline.cli.gc import gc_command, rm_command
from rae.pipeline.cli.imports import import_app
from rae.pipeline.cli.inspect import diff_command, inspect_command, tag_command
from rae.pipeline.cli.shards import shards_command
from rae.pipeline.cli.sharing import pull_command, push_command
from rae.pipeline.cli.sweep import sweep_command
from rae.pipeline.cli.verify import verify_command

if TYPE_CHECKING:
    from rae.store.errors import RaeError

app = typer.Typer(
    name="rae",
    help="Train image generators on representation autoencoders, from latents that are encoded once.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(config_app, name="config")
app.add_typer(import_app, name="import")
app.add_typer(export_app, name="export")


@app.command("run")
def run_command(
    config: Config,
    workspace: WorkspaceOption = DEFAULT_WORKSPACE,
    overrides: Set = None,
    first: Annotated[str | None, typer.Option("--from", help="Begin at this stage; earlier ones must be done.")] = None,
    last: Annotated[str | None, typer.Option("--to", help="End with this stage.")] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    dry_run: DryRun = False,
    restart: Restart = False,
    device: Device = "auto",
) -> None:
    """Run every stage that is missing, in order, and write the report."""
    from rae.pipeline import runner
    from rae.pipeline.launch import is_main
    from rae.pipeline.preflight import preflight
    from rae.pipeline.report import write_report

    pipeline, options = prepare(config, workspace, overrides, as_json, quiet, restart, device)
    stages = runner.between(pipeline, first, last)
    preflight(pipeline)
    if dry_run:
        show_plan(pipeline, [stage.name for stage in stages], options)
        return
    outcomes = runner.run_stages(pipeline, stages, options)
    if not is_main():
        return
    report = write_report(pipeline)
    options.console.say(f"report: {report}")
    if as_json:
        options.console.print_json([outcome.to_json() for outcome in outcomes])


def _trainer_command(name: str, summary: str) -> None:
    """Both trainers' verbs take the same options."""

    def command(
        config: Config,
        workspace: WorkspaceOption = DEFAULT_WORKSPACE,
        overrides: Set = None,
        as_json: AsJson = False,
        quiet: Quiet = False,
        dry_run: TryOut = False,
        restart: Restart = False,
        profile: ProfileSteps = 0,
        device: Device = "auto",
    ) -> None:
        from rae.pipeline.dry_run import show_dry_run

        pipeline, options = prepare(config, workspace, overrides, as_json, quiet, restart, device)
        if dry_run:
            show_dry_run(pipeline, name, options)
        else:
            run_verb(name, pipeline, replace(options, profile_steps=profile))

    app.command(name.replace("_", "-"), help=summary)(command)


app.command("shards")(shards_command)


@app.command("encode")
def encode_command(
    config: Config,
    workspace: WorkspaceOption = DEFAULT_WORKSPACE,
    overrides: Set = None,
    processes: Annotated[int, typer.Option(min=1, help="So many processes on this machine.")] = 1,
    scheduler: Annotated[str | None, typer.Option(help="The dask scheduler whose workers encode: tcp://...")] = None,
    parts: Annotated[
        str | None, typer.Option(metavar="I/N", help="This share of the parts, 0/N to N-1/N: for job arrays.")
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    dry_run: DryRun = False,
    restart: Restart = False,
    device: Device = "auto",
) -> None:
    """Encode every image once into the latent store."""
    from rae.pipeline import launch
    from rae.store.errors import OthersAtWork

    crew = launch.Crew(processes, scheduler, launch.share_of(parts) if parts else (0, 1))
    pipeline, options = prepare(config, workspace, overrides, as_json, quiet, restart, device, crew)
    try:
        run_verb("encode", pipeline, options, dry_run)
    except OthersAtWork as others:
        options.console.say(f"{others.message}; when all shares are done, the last one finishes the latents")
        if as_json and launch.is_main():
            options.console.print_json({"kind": "latents", "parts": others.total, "missing_parts": others.remaining})


_trainer_command("train_decoder", "Train the ViT decoder that turns tokens back into pixels.")
_trainer_command("train_dit", "Train the diffusion transformer on the stored latents.")


@app.command("sample")
def sample_command(
    config: Config,
    workspace: WorkspaceOption = DEFAULT_WORKSPACE,
    overrides: Set = None,
    checkpoint: Annotated[
        str | None, typer.Option(metavar="step=N|latest", help="Of a run that may still be training; leaves it alone.")
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    dry_run: DryRun = False,
    restart: Restart = False,
    device: Device = "auto",
) -> None:
    """Draw latents from the transformer and decode them to images."""
    pipeline, options = prepare(config, workspace, overrides, as_json, quiet, restart, device)
    pipeline.checkpoint = checkpoint
    run_verb("sample", pipeline, options, dry_run)


app.command("evaluate")(evaluate_command)


@app.command("plan")
def plan_command(
    config: Config,
    workspace: WorkspaceOption = DEFAULT_WORKSPACE,
    overrides: Set = None,
    as_json: AsJson = False,
    measure: Annotated[
        bool, typer.Option(help="Time a few batches of encoder and transformer, to say what caching saves.")
    ] = False,
    device: Device = "auto",
) -> None:
    """Say what would run, why, what it takes, what caching saves, and what is missing for it."""
    from rae.pipeline.break_even import break_even, say_break_even
    from rae.pipeline.preflight import problems

    pipeline, options = prepare(config, workspace, overrides, as_json)
    if pipeline.config.sweep is not None:
        from rae.pipeline import sweep, sweep_plan

        sweep_plan.show(sweep.sweep_of(config, pipeline.workspace, overrides or ()), options.console)
        return
    caching = break_even(pipeline, device if measure else None)
    show_plan(pipeline, [stage.name for stage in pipeline.stages], options, caching)
    if found := list(problems(pipeline)):
        for problem in found:
            _tell(problem)
        sys.exit(found[0].exit_code)  # as `rae run` would
    if caching is not None and not as_json:
        say_break_even(caching, options.console)


@app.command("status")
def status_command(workspace: WorkspaceOption = DEFAULT_WORKSPACE, as_json: AsJson = False) -> None:
    """List every artifact, what is stale and why, what is unfinished and how to continue it."""
    from rae.pipeline.status import show_status
    from rae.store.artifacts import Workspace

    show_status(Workspace(workspace), options_for(as_json).console)


app.command("inspect")(inspect_command)
app.command("diff")(diff_command)
app.command("tag")(tag_command)
app.command("verify")(verify_command)
app.command("push")(push_command)
app.command("pull")(pull_command)
app.command("compare")(compare_command)
app.command("sweep")(sweep_command)
app.command("gc")(gc_command)
app.command("rm")(rm_command)


@app.command("report")
def report_command(
    config: Config, workspace: WorkspaceOption = DEFAULT_WORKSPACE, overrides: Set = None, as_json: AsJson = False
) -> None:
    """Write the HTML report of what is done."""
    from rae.pipeline.report import write_report

    pipeline, options = prepare(config, workspace, overrides, as_json)
    path = write_report(pipeline)
    options.console.say(f"report: {path}")
    if as_json:
        options.console.print_json({"path": str(path)})


def main() -> None:
    """The `rae` command: a person's mistake ends in one sentence and the exit code that stands for it."""
    from rae.pipeline import stopping
    from rae.store.errors import PartialResult, RaeError

    try:
        with stopping.raised():
            app(standalone_mode=True)
    except RaeError as error:
        if isinstance(error, PartialResult) and error.next_command is None:
            error.next_command = stopping.again()
        _fail(error)
    except stopping.Stopped as stopped:
        _fail(stopping.as_error(stopped.number, stopping.again()))
    except OSError as error:
        explanation = stopping.explained(error, stopping.again())
        if explanation is None:
            raise
        _fail(explanation)


def _tell(error: "RaeError") -> None:
    print(f"rae: {error.message}", file=sys.stderr)
    if error.next_command:
        print(f"  next: {error.next_command}", file=sys.stderr)


def _fail(error: "RaeError") -> NoReturn:
    _tell(error)
    sys.exit(error.exit_code)
