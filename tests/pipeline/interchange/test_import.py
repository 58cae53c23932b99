"""Models made elsewhere become artifacts like any other."""

import hashlib
from pathlib import Path

import pytest

from rae.pipeline.interchange.imports import import_artifact
from rae.pipeline.plan import Stage
from rae.pipeline.runner import Options, Outcome
from rae.pipeline.status import show_status
from rae.stages.job import Job, Result
from rae.store.artifacts import Workspace
from rae.store.errors import CorruptData, StaleInput

STAGE = Stage("import something", "decoder", version=1)


def copied(source: Path, workspace: Workspace, name: str = "mine", **config: object) -> Outcome:
    def write(job: Job) -> Result:
        made = job.folder / "copy"
        made.write_bytes(source.read_bytes())
        if source.read_bytes() == b"bad":
            raise CorruptData("this is no model")
        return Result(hashlib.sha256(source.read_bytes()).hexdigest(), {"bytes": 1}, (made,))

    return import_artifact(workspace, STAGE, name, config, {"weights": source}, write, Options(device="cpu"))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "foreign"
    path.write_bytes(b"tensors")
    return path


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path / "workspace")


def test_an_imported_file_is_an_artifact_under_its_name(source: Path, workspace: Workspace) -> None:
    made = copied(source, workspace, size=3)
    found = workspace.resolve("decoder/mine")
    assert found == made.artifact
    assert (found.payload / "copy").read_bytes() == b"tensors"
    assert found.manifest.config == {"import_something": {"size": 3}}
    assert found.manifest.recipe["files"] == {"weights": hashlib.sha256(b"tensors").hexdigest()}
    assert str(source) not in found.manifest.to_json().decode().replace(found.manifest.provenance["command"], "")


def test_the_same_file_is_imported_once_wherever_it_lies(source: Path, workspace: Workspace, tmp_path: Path) -> None:
    first = copied(source, workspace)
    again = copied(source.rename(tmp_path / "moved"), workspace, name="other")
    assert (first.reused, again.reused) == (False, True)
    assert workspace.resolve("decoder/other").id == workspace.resolve("decoder/mine").id


def test_another_file_or_setting_is_another_artifact(source: Path, workspace: Workspace) -> None:
    ids = {copied(source, workspace).artifact.id, copied(source, workspace, size=4).artifact.id}
    source.write_bytes(b"other tensors")
    assert len(ids | {copied(source, workspace).artifact.id}) == 3


def test_a_failed_import_leaves_nothing(source: Path, workspace: Workspace) -> None:
    source.write_bytes(b"bad")
    with pytest.raises(CorruptData, match="no model"):
        copied(source, workspace)
    assert not [path for path in workspace.root.rglob("*") if path.is_file()]
    source.write_bytes(b"good")
    assert not copied(source, workspace).reused


def test_a_killed_import_is_continued_by_the_command_that_status_tells(
    source: Path, workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = STAGE.recipe({"import_something": {}}, files={"weights": hashlib.sha256(b"tensors").hexdigest()})
    workspace.begin("decoder", "mine", recipe, {})
    show_status(workspace, Options().console)
    assert "rae import something, with the same arguments and --name mine" in capsys.readouterr().out
    with pytest.raises(StaleInput, match="--restart"):
        copied(source, workspace, size=4)
    assert not copied(source, workspace).reused
    assert not list(workspace.unfinished())
