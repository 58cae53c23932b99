"""The README tells the truth: its tree, its commands, its pictures."""

import re
from pathlib import Path

import pytest
from typer.main import get_command

from rae.pipeline.cli import app
from rae.pipeline.config import presets

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
TREE = next(block for block in re.findall(r"```\w*\n(.*?)```", README, re.DOTALL) if block.startswith("rae/"))


def tree_entries() -> list[str]:
    """The paths or globs that the tree names, in the folder they stand under."""
    entries, folder = [], ""
    for line in TREE.splitlines():
        names = re.split(r"\s{2,}", line.strip())[0]
        if not line.startswith(" "):
            folder = names
            entries.append(folder)
            continue
        for name in re.findall(r"[\w*]+(?:\.\w+|/)", line if "(" in line else names):
            entries.append(folder + name)
    return entries


def test_every_file_that_the_tree_names_exists() -> None:
    missing = [entry for entry in tree_entries() if not list(ROOT.glob(entry))]
    assert len(tree_entries()) > 30
    assert not missing


def test_every_module_stands_in_the_tree() -> None:
    listed = {path for entry in tree_entries() for path in ROOT.glob(entry)}
    modules = {path for folder in ("pipeline", "stages", "store") for path in (ROOT / folder).glob("*.py")}
    unlisted = {str(path.relative_to(ROOT)) for path in modules - listed if path.name != "__init__.py"}
    assert not unlisted


def test_every_command_exists() -> None:
    verbs = set(re.findall(r"^rae ([a-z-]+)", README, re.MULTILINE))
    verbs |= set(re.findall(r"`rae ([a-z-]+)", README))
    assert {"shards", "plan", "run", "inspect"} <= verbs
    assert verbs <= set(get_command(app).commands)  # type: ignore[attr-defined]
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:^|`)make ([a-z-]+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_every_command_and_every_document_is_named() -> None:
    unnamed = [name for name in get_command(app).commands if not re.search(rf"`(rae )?{name}\b", README)]  # type: ignore[attr-defined]
    assert not unnamed
    unlinked = [path for path in (ROOT / "docs").rglob("*.md") if f"({path.relative_to(ROOT)})" not in README]
    assert not unlinked


@pytest.mark.parametrize("picture", re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README))
def test_every_picture_is_there(picture: str) -> None:
    assert (ROOT / picture).stat().st_size > 1000


def test_every_preset_stands_in_its_table() -> None:
    assert sorted(re.findall(r"^\| `([a-z0-9-]+)` \|", README, re.MULTILINE)) == presets()


def test_no_placeholder_is_left() -> None:
    assert "@@" not in README
