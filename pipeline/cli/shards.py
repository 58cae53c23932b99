"""`rae shards`: the command, of a configuration or of a source and a folder."""

from typing import Annotated

import typer

from rae.pipeline.cli.arguments import (
    DEFAULT_WORKSPACE,
    AsJson,
    Quiet,
    Set,
    WorkspaceOption,
    options_for,
    prepare,
    show_outcome,
)


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
        pipeline, options = prepare(source, workspace, overrides, as_json, quiet)
        show_outcome(runner.run_verb(pipeline, "shards", options), options)
        return
    if overrides:
        raise ConfigError("`-s` changes a configuration, and `rae shards SOURCE OUT` reads none: leave out OUT")
    section = configuration.validated(ShardsSection, {"train": source, **choice}, "rae shards")
    options = options_for(as_json, quiet)
    show_outcome(runner.convert(section, out, options), options)
