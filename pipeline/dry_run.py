"""`rae train-decoder --dry-run` and `rae train-dit --dry-run`: what a training takes, told before it begins."""

from rae.pipeline import launch
from rae.pipeline.console import Console, duration, number, size
from rae.pipeline.plan import Pipeline
from rae.pipeline.runner import Options
from rae.pipeline.status import plan_row, show_plan
from rae.store.errors import RaeError
from rae.store.manifest import Json


def show_dry_run(pipeline: Pipeline, name: str, options: Options) -> None:
    """Try a trainer's stage out, unless it is done, and print what it takes; raises what the training would.

    JSON is the row of `rae plan`, with `dry_run` in it.
    """
    console = options.console
    try:
        task = pipeline.task(name)  # raises what the row would only say
        if pipeline.workspace.find(task.stage.kind, task.recipe) is not None:
            show_plan(pipeline, [name], console)
            return
        assert task.dry_run is not None
        with launch.processes(options.device):
            taken = task.dry_run(launch.device_of(options.device))
    except RaeError as error:
        pipeline.name_in(error)
        raise
    if not launch.is_main():
        return
    row = plan_row(pipeline, name)
    if console.as_json:
        console.print_json([row | {"dry_run": taken}])
    else:
        say_dry_run(f"a dry run of {task.stage.verb} `{pipeline.config.name}`", taken, console)


def say_dry_run(title: str, taken: Json, console: Console) -> None:
    """A line for each thing that a training takes; `taken` is what `Training.dry_run` returns."""
    device, workers = taken["device"], taken["workers"]
    kind = "allocated" if device.startswith("cuda") else "resident set"
    peak, there = size(taken["peak_memory_bytes"]), size(taken["memory_bytes"])
    readers = f"{workers} threads make them ahead" if workers else "each is waited for"
    lines = [[f"parameters, {what}", f"{count:,}"] for what, count in taken["parameters"].items() if count]
    lines += [
        ["peak memory", f"{peak} of {there} ({device}, {kind})"],
        ["time per step", f"{taken['seconds_per_step']:.3g} s for a batch of {taken['batch_size']}"],
        ["time to make a batch", f"{taken['seconds_per_batch']:.3g} s ({readers})"],
        ["steps", f"{taken['steps']:,}"],
        ["the whole run", f"about {duration(taken['seconds'])} on {taken['processes']} process(es)"],
        ["a checkpoint", size(taken["checkpoint_bytes"])],
        ["that step's numbers", "  ".join(f"{name} {number(value)}" for name, value in taken["numbers"].items())],
    ]
    console.table(title, ["", ""], lines)
