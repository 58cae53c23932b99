"""Models made elsewhere become artifacts: found again by the digests of their files, published like any stage's."""

from collections.abc import Callable, Mapping
from pathlib import Path

from rae.pipeline import runner
from rae.pipeline.plan import Stage, Task
from rae.pipeline.runner import Options, Outcome
from rae.stages.job import Job, Result
from rae.stages.models.weights import digest_file
from rae.store.artifacts import Workspace
from rae.store.manifest import Json


def import_artifact(
    workspace: Workspace,
    stage: Stage,
    name: str,
    config: Json,
    files: Mapping[str, Path],
    write: Callable[[Job], Result],
    options: Options,
) -> Outcome:
    """Publish what `write` makes of foreign files, unless the same files were imported with the same settings before.

    Args:
        stage: the command's words as its name (`import official`), and the artifact's kind; bump the version when the
            same files come to mean another payload.
        name: what `KIND/NAME` will mean.
        config: every setting that the payload follows from, as JSON; `rae inspect` shows it.
        files: the files by what they are for (`weights`, `stats`); their sha256 stand in the recipe, never their paths.
        write: puts the payload into `job.folder`. Nothing of it stays if it fails.
    """
    digests = {role: digest_file(path) for role, path in files.items()}
    recipe = stage.recipe({stage.name.replace(" ", "_"): config}, files=digests)

    def run(job: Job) -> Result:
        try:
            return write(job)
        except BaseException:  # there is nothing to continue: reading again takes as long as reading first
            for path in job.folder.iterdir():
                path.unlink()
            raise

    return runner.make(workspace, name, Task(stage, recipe, {}, run), options)


def say_encoder(encoder: Json, options: Options) -> None:
    """Tell which encoder an imported model is for, and whether anything but a name says so."""
    if encoder["digest"] is None:
        options.console.say(
            f"encoder: `{encoder['name']}`, taken at its word: its files are not on this machine, so that nothing"
            " compares their digest (--encoder names another)"
        )
    else:
        options.console.say(f"encoder: `{encoder['name']}`, sha256 {encoder['digest'][:16]}...")
