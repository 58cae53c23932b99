"""The commands. Thin: each reads its configuration, calls one function, prints what it returns.

Nothing heavy is imported here: `rae --help` costs what a bare typer program costs.
"""

import os
import sys
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from rae.pipeline.arguments import (
    DEFAULT_WORKSPACE,
    AsJson,
    Config,
    Device,
    DryRun,
    Quiet,
    Ref,
    Restart,
    Set,
    WorkspaceOption,
    options_for,
)
from rae.pipeline.cli_export import export_app
from rae.pipeline.cli_import import import_app
from rae.pipeline.cli_verify import verify_command

if TYPE_CHECKING:
    from rae.pipeline.launch import Crew
    from rae.pipeline.plan import Pipeline
    from rae.pipeline.runner import Options, Outcome
    from rae.store.errors import RaeError

app = typer.Typer(
    name="rae",
    help="Train image generators on representation autoencoders, from latents that are encoded once.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
config_app = typer.Typer(help="List, show or check configurations.", no_args_is_help=True, rich_markup_mode=None)
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

    pipeline, options = _prepare(config, workspace, overrides, as_json, quiet, restart, device)
    stages = runner.between(pipeline, first, last)
    preflight(pipeline)
    if dry_run:
        _show_plan(pipeline, [stage.name for stage in stages], options)
        return
    outcomes = runner.run_stages(pipeline, stages, options)
    if not is_main():
        return
    report = write_report(pipeline)
    options.console.say(f"report: {report}")
    if as_json:
        options.console.print_json([outcome.to_json() for outcome in outcomes])


def _stage_command(name: str, summary: str) -> None:
    """The other stages' verbs take the same options and do the same: run that stage."""

    def command(
        config: Config,
        workspace: WorkspaceOption = DEFAULT_WORKSPACE,
        overrides: Set = None,
        as_json: AsJson = False,
        quiet: Quiet = False,
        dry_run: DryRun = False,
        restart: Restart = False,
        device: Device = "auto",
    ) -> None:
        from rae.pipeline import runner

        pipeline, options = _prepare(config, workspace, overrides, as_json, quiet, restart, device)
        if dry_run:
            _show_plan(pipeline, [name], options)
            return
        _show_outcome(runner.run_verb(pipeline, name, options), options)

    app.command(name.replace("_", "-"), help=summary)(command)


@app.command("shards")
def shards_command(
    source: Annotated[str, typer.Argument(help="A configuration; or with OUT: digits, or a path of images.")],
    out: Annotated[str | None, typer.Argument(help="The folder to write webdataset shards into.")] = None,
    limit: Annotated[int | None, typer.Option(help="At most this many images, class-balanced.")] = None,
    val_fraction: Annotated[float | None, typer.Option(help="Hold out this share, class-balanced.")] = None,
    seed: Annotated[int | None, typer.Option(help="Chooses the images of --limit and --val-fraction.")] = None,
    samples_per_shard: Annotated[int | None, typer.Option(help="Images per tar; 1000 by default.")] = None,
    workspace: WorkspaceOption = DEFAULT_WORKSPACE,
    overrides: Set = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Turn images, class folders, parquet or CIFAR-10 into webdataset shards with an index."""
    from rae.pipeline import config as configuration
    from rae.pipeline import runner
    from rae.stages.sections import ShardsSection
    from rae.store.errors import ConfigError

    choice = {"limit": limit, "val_fraction": val_fraction, "seed": seed, "samples_per_shard": samples_per_shard}
    choice = {key: value for key, value in choice.items() if value is not None}
    if out is None:
        overrides = [*(overrides or ()), *(f"shards.{key}={value}" for key, value in choice.items())]
        pipeline, options = _prepare(source, workspace, overrides, as_json, quiet)
        _show_outcome(runner.run_verb(pipeline, "shards", options), options)
        return
    if overrides:
        raise ConfigError("`-s` changes a configuration, and `rae shards SOURCE OUT` reads none: leave out OUT")
    section = configuration.validated(ShardsSection, {"train": source, **choice}, "rae shards")
    options = options_for(as_json, quiet)
    _show_outcome(runner.convert(section, out, options), options)


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
    from rae.pipeline import launch, runner
    from rae.store.errors import OthersAtWork

    crew = launch.Crew(processes, scheduler, launch.share_of(parts) if parts else (0, 1))
    pipeline, options = _prepare(config, workspace, overrides, as_json, quiet, restart, device, crew)
    if dry_run:
        _show_plan(pipeline, ["encode"], options)
        return
    try:
        _show_outcome(runner.run_verb(pipeline, "encode", options), options)
    except OthersAtWork as others:
        options.console.say(f"{others.message}; when all shares are done, the last one finishes the latents")
        if as_json and launch.is_main():
            options.console.print_json({"kind": "latents", "parts": others.total, "missing_parts": others.remaining})


_stage_command("train_decoder", "Train the ViT decoder that turns tokens back into pixels.")
_stage_command("train_dit", "Train the diffusion transformer on the stored latents.")


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
    from rae.pipeline import runner

    pipeline, options = _prepare(config, workspace, overrides, as_json, quiet, restart, device)
    pipeline.checkpoint = checkpoint
    if dry_run:
        _show_plan(pipeline, ["sample"], options)
        return
    _show_outcome(runner.run_verb(pipeline, "sample", options), options)


_stage_command("evaluate", "Score reconstructions and samples; draws the samples if they are missing.")


@app.command("plan")
def plan_command(
    config: Config, workspace: WorkspaceOption = DEFAULT_WORKSPACE, overrides: Set = None, as_json: AsJson = False
) -> None:
    """Say what would run, why, what it takes, and what is missing for it."""
    from rae.pipeline.preflight import problems

    pipeline, options = _prepare(config, workspace, overrides, as_json)
    _show_plan(pipeline, [stage.name for stage in pipeline.stages], options)
    if found := list(problems(pipeline)):
        for problem in found:
            _tell(problem)
        sys.exit(found[0].exit_code)  # as `rae run` would


@app.command("status")
def status_command(workspace: WorkspaceOption = DEFAULT_WORKSPACE, as_json: AsJson = False) -> None:
    """List every artifact, and what is unfinished and how to continue it."""
    from rae.pipeline.status import show_status
    from rae.store.artifacts import Workspace

    show_status(Workspace(workspace), options_for(as_json).console)


@app.command("inspect")
def inspect_command(ref: Ref, workspace: WorkspaceOption = DEFAULT_WORKSPACE, as_json: AsJson = False) -> None:
    """Show one artifact: what made it, its numbers, its inputs, its invalid rows."""
    from rae.pipeline.status import show_artifact
    from rae.store.artifacts import Workspace

    show_artifact(Workspace(workspace), ref, options_for(as_json).console)


app.command("verify")(verify_command)


@app.command("report")
def report_command(
    config: Config, workspace: WorkspaceOption = DEFAULT_WORKSPACE, overrides: Set = None, as_json: AsJson = False
) -> None:
    """Write the HTML report of what is done."""
    from rae.pipeline.report import write_report

    pipeline, options = _prepare(config, workspace, overrides, as_json)
    path = write_report(pipeline)
    options.console.say(f"report: {path}")
    if as_json:
        options.console.print_json({"path": str(path)})


@config_app.command("ls")
def config_ls(as_json: AsJson = False) -> None:
    """List the presets."""
    from rae.pipeline import config as configuration

    console = options_for(as_json).console
    described = {name: configuration.load(name).description for name in configuration.presets()}
    if as_json:
        console.print_json(described)
    else:
        console.table("", ["preset", "what it is"], [[name, text] for name, text in described.items()])


@config_app.command("show")
def config_show(config: Config, overrides: Set = None) -> None:
    """Print a configuration with every default written out."""
    from rae.pipeline import config as configuration

    print(configuration.to_yaml(configuration.load(config, overrides)), end="")


@config_app.command("validate")
def config_validate(config: Config, overrides: Set = None) -> None:
    """Check a configuration without running anything."""
    from rae.pipeline import config as configuration

    print(f"{configuration.load(config, overrides).name}: valid")


def _prepare(
    config: str,
    workspace: str,
    overrides: list[str] | None,
    as_json: bool = False,
    quiet: bool = False,
    restart: bool = False,
    device: str = "auto",
    crew: "Crew | None" = None,
) -> tuple["Pipeline", "Options"]:
    from rae.pipeline import config as configuration
    from rae.pipeline.plan import Pipeline
    from rae.store.artifacts import Workspace

    settings = configuration.load(config, overrides)
    options = options_for(as_json, quiet, restart, device, crew)
    return Pipeline(settings, Workspace(workspace), configuration.words(config, overrides)), options


def _show_outcome(outcome: "Outcome", options: "Options") -> None:
    from rae.pipeline.launch import is_main

    if options.console.as_json and is_main():
        options.console.print_json(outcome.to_json())


def _show_plan(pipeline: "Pipeline", names: list[str], options: "Options") -> None:
    from rae.pipeline.status import show_plan

    show_plan(pipeline, names, options.console)


def main() -> None:
    """The `rae` command: a person's mistake ends in one sentence and the exit code that stands for it."""
    from rae.pipeline import stopping
    from rae.store.errors import RaeError

    try:
        with stopping.raised():
            app(standalone_mode=True)
    except RaeError as error:
        _fail(error)
    except stopping.Stopped as stopped:
        _fail(stopping.as_error(stopped.number, stopping.again()))
    except OSError as error:
        from rae.pipeline.runner import explained

        explanation = explained(error, stopping.again())
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


if __name__ == "__main__":  # torchrun -m rae.pipeline.cli
    try:
        main()
        code = 0
    except SystemExit as done:
        code = int(done.code or 0)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # gloo's threads can abort an interpreter that shuts down around them, after all is done
