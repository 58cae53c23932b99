"""`rae evaluate`: the command. Light, as all commands are: what it needs is imported when it runs."""

from typing import Annotated, Literal

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
    prepare,
    run_verb,
    show_outcome,
)

OptionalConfig = Annotated[
    str | None, typer.Argument(help="A preset's name (see `rae config ls`) or a YAML file. --self-test needs none.")
]


def evaluate_command(
    config: OptionalConfig = None,
    workspace: WorkspaceOption = DEFAULT_WORKSPACE,
    overrides: Set = None,
    make_reference: Annotated[
        Literal["train", "val"] | None,
        typer.Option(help="Instead of scoring: keep these real images' features, for `evaluate.reference`."),
    ] = None,
    images: Annotated[
        str | None,
        typer.Option(
            help="A folder, tars or FILE.npz: images to be scored in place of the configuration's own samples; with"
            " --make-reference, real ones in place of its shards."
        ),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(help="With --images, --make-reference: what scores/NAME, reference/NAME will mean."),
    ] = None,
    self_test: Annotated[
        bool, typer.Option("--self-test", help="Instead of scoring: compare extractors with stored features.")
    ] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    dry_run: DryRun = False,
    restart: Restart = False,
    device: Device = "auto",
) -> None:
    """Score reconstructions and samples, or any images; draws the samples if they are missing."""
    from rae.store.errors import ConfigError

    if self_test:
        _self_test(config, workspace, overrides, as_json, quiet, device)
        return
    if config is None:
        raise ConfigError("say what is to be scored: rae evaluate CONFIG", "rae config ls")
    if name is not None and make_reference is None and images is None:
        raise ConfigError("`--name` is for what `--images` or `--make-reference` makes: elsewhere it is -s name=NAME")
    pipeline, options = prepare(config, workspace, overrides, as_json, quiet, restart, device)
    if make_reference is None and images is None:
        run_verb("evaluate", pipeline, options, dry_run)
        return
    from rae.pipeline import given_images, references

    if dry_run and make_reference is not None:
        references.say_plan(pipeline, make_reference, images, name, options)
    elif dry_run:
        given_images.say_plan(pipeline, str(images), name, options)
    elif make_reference is not None:
        show_outcome(references.make_reference(pipeline, make_reference, images, name, options), options)
    else:
        show_outcome(given_images.score_images(pipeline, str(images), name, options), options)


def _self_test(
    config: str | None, workspace: str, overrides: list[str] | None, as_json: bool, quiet: bool, device: str
) -> None:
    from rae.pipeline.self_test import self_test

    options = options_for(as_json, quiet, device=device)
    pipeline = prepare(config, workspace, overrides)[0] if config is not None else None
    found = self_test(pipeline, options)
    if as_json:
        options.console.print_json(found)
