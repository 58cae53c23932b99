"""`rae config ...`: configurations, looked at without running anything."""

import typer

from rae.pipeline.cli.arguments import AsJson, Config, Set, options_for

config_app = typer.Typer(help="List, show or check configurations.", no_args_is_help=True, rich_markup_mode=None)


@config_app.command("ls")
def config_ls(as_json: AsJson = False) -> None:
    """List the presets and the experiments (`rae sweep NAME`)."""
    from rae.pipeline import config as configuration

    console = options_for(as_json).console
    names = [*configuration.presets(), *configuration.experiments()]
    described = {name: configuration.load(name).description for name in names}
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
