"""The wheel against the tree: an editable install would hide a folder that the wheel lacks."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PORTIONS = {"rae": "rae", **{name: f"rae/{name}" for name in ("pipeline", "stages", "store", "configs")}}
SUFFIXES = {".py", ".yaml", ".html", ".json", ".typed"}
NOT_SHIPPED = shutil.ignore_patterns("__pycache__", ".*")


def tree() -> dict[str, Path]:
    """Every file that belongs into the wheel, by its path there."""
    return {
        f"{target}/{path.relative_to(ROOT / folder).as_posix()}": path
        for folder, target in PORTIONS.items()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and not path.name.startswith(".")
    }


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the tree without what git ignores."""
    source, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    for folder in PORTIONS:
        shutil.copytree(ROOT / folder, source / folder, ignore=NOT_SHIPPED)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    built = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stdout[-2000:] + built.stderr[-2000:]
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's contents, as an installation lays them out."""
    folder = tmp_path_factory.mktemp("site-packages")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def test_the_wheel_holds_the_tree_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
    assert len(names) == len(set(names))
    assert set(names) == set(tree())
    assert {Path(name).suffix for name in names} == SUFFIXES
    assert len(names) > 50


def test_every_file_is_the_one_in_the_tree(installed: Path) -> None:
    for name, path in tree().items():
        assert (installed / name).read_bytes() == path.read_bytes(), name


def test_the_distribution_says_what_it_is(installed: Path) -> None:
    (info,) = installed.glob("*.dist-info")
    assert info.name.startswith("rae_pipeline-")
    assert "rae = rae.pipeline.cli:main" in (info / "entry_points.txt").read_text()
    assert (info / "licenses" / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    metadata = (info / "METADATA").read_text()
    assert "\nName: rae-pipeline\n" in metadata
    assert "\nRequires-Python: >=3.11\n" in metadata
    assert "\nLicense-Expression: Apache-2.0\n" in metadata


@pytest.mark.parametrize("words", [["--help"], ["config", "ls"], ["config", "show", "quickstart"]])
def test_the_wheel_works_without_the_tree(words: list[str], installed: Path, tmp_path: Path) -> None:
    script = "import rae, sys; print(rae.__file__, file=sys.stderr); from rae.pipeline.cli import main; main()"
    ran = subprocess.run(
        [sys.executable, "-c", script, *words],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(installed)},
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr.strip() == str(installed / "rae" / "__init__.py")
    assert ran.stdout
