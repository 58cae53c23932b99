"""`rae inspect`, `rae diff`, `rae tag`: what an artifact is, what it was made from, what people say of it."""

import html
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from rae.store.artifacts import Workspace
from rae.store.manifest import recipe_id
from tests.conftest import Rae

With = Callable[..., Rae]


def test_lineage_is_shown_as_a_tree(finished: Rae) -> None:
    out = finished("inspect", "samples/tiny", "-w", finished.workspace).succeeded().out
    ids = {kind: finished.artifact(f"{kind}/tiny")["id"] for kind in ("shards", "latents", "decoder", "dit")}
    lines = out.splitlines()
    begin = lines.index("made from:")
    assert lines[begin + 1 : begin + 6] == [
        f"  ├── decoder: decoder/{ids['decoder']} `tiny`",
        f"  │   └── shards: shards/{ids['shards']} `tiny`",
        f"  └── dit: dit/{ids['dit']} `tiny`",
        f"      └── latents: latents/{ids['latents']} `tiny`",
        f"          └── shards: shards/{ids['shards']} `tiny`, as above",
    ]
    assert "needed by scores/tiny" in lines


def test_what_is_not_here_is_said_in_the_tree(rae_with: With) -> None:
    rae = rae_with("dit")
    assert re.search(
        r"└── latents: latents/\w{16}, not in this workspace", rae("inspect", "tiny", "-w", rae.workspace).out
    )


# ---- diff -----------------------------------------------------------------------------------------------------------


def test_a_difference_is_followed_to_where_it_began(rae_with: With) -> None:
    rae = rae_with("shards", "latents", "dit")
    before = rae.artifact("dit/tiny")["id"]
    words = ["-s", "encode.batch_size=4", "-s", "train_dit.lr=0.001", "-s", "train_dit.steps=2"]
    for verb in ("encode", "train-dit"):
        rae.verb(verb, *words).succeeded()
    ran = rae("diff", f"dit/{before}", "dit/tiny", "-w", rae.workspace).succeeded()
    assert "config.train_dit.lr: 0.0002 | 0.001" in ran.out
    assert "dit:" in ran.out.splitlines()
    assert "latents, the latents:" in ran.out.splitlines()
    assert "config.encode.batch_size: 8 | 4" in ran.out
    assert "inputs.latents" not in ran.out
    rows = rae("diff", f"dit/{before}", "dit/tiny", "-w", rae.workspace, "--json").succeeded().json
    assert {"path": "latents", "kind": "latents", "field": "config.encode.batch_size", "a": 8, "b": 4} in rows
    # The same from the configuration, once with its latents made and once without.
    for more, expected in ((words, {"config.train_dit.steps"}), ([*words[:1], "encode.batch_size=2"], set())):
        ran = rae("diff", rae.config, f"dit/{before}", "-w", rae.workspace, *more, "--json").succeeded()
        fields = {row["field"] for row in ran.json}
        assert "config.encode.batch_size" in fields
        assert expected <= fields
        assert not {"kind", "schema", "source"} & fields


def test_the_same_recipe_is_said_to_be_the_same(finished: Rae) -> None:
    ran = finished("diff", finished.config, "dit/tiny", "-w", finished.workspace).succeeded()
    assert ran.out.splitlines()[-1] == "the same recipe"
    assert finished("diff", "dit/tiny", "dit/tiny", "-w", finished.workspace, "--json").succeeded().json == []


def test_what_is_neither_artifact_nor_configuration_is_missing(finished: Rae) -> None:
    finished("diff", "nothing", "dit/tiny", "-w", finished.workspace).refused(3, "no artifact `nothing`")
    finished("diff", "no.yaml", "dit/tiny", "-w", finished.workspace).refused(
        3, "there is no configuration file no.yaml"
    )


# ---- names and notes ------------------------------------------------------------------------------------------------


def test_names_and_notes_change_and_the_artifact_does_not(rae_with: With) -> None:
    rae = rae_with("shards", "latents", "dit")
    folder = Path(rae.artifact("dit/tiny")["path"])
    manifest = (folder / "manifest.json").read_bytes()
    rae("tag", "dit/tiny", "best", "--license", "CC-BY-4.0", "-w", rae.workspace).succeeded()
    rae("tag", "best", "--description", "Good at sevens.", "-w", rae.workspace).succeeded()
    shown = rae.artifact("dit/best")
    assert (shown["names"], shown["description"], shown["license"]) == (
        ["best", "tiny"],
        "Good at sevens.",
        "CC-BY-4.0",
    )
    assert (folder / "manifest.json").read_bytes() == manifest
    rae("verify", "dit/best", "-w", rae.workspace).succeeded()
    assert "description: Good at sevens." in rae("inspect", "best", "-w", rae.workspace).succeeded().out
    assert rae.verb("train-dit").succeeded().out.endswith(f"train-dit: already done, dit/{shown['id']}\n")


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        ([], 2, "say what to tag it with"),
        (["a/b"], 2, "can't be a name"),
        (["0123456789abcdef"], 2, "can't be a name"),
        (["--description", "x" * 10_001], 2, "has 10001 characters"),
    ],
)
def test_tags_that_say_nothing_or_too_much_are_refused(words: list[str], code: int, says: str, finished: Rae) -> None:
    finished("tag", "dit/tiny", *words, "-w", finished.workspace).refused(code, says)


def test_what_lies_elsewhere_is_not_tagged(finished: Rae, rae: Rae) -> None:
    path = finished.artifact("dit/tiny")["path"]
    rae("tag", path, "mine", "-w", rae.workspace).refused(2, "lies outside of the workspace", "next: rae pull dit/")


@pytest.mark.parametrize("data", [b"", b"[]", b'{"description": 5, "license": ""}', b'{"description": "x"}'])
def test_damaged_notes_are_named(data: bytes, rae_with: With) -> None:
    rae = rae_with("shards")
    path = Path(rae.artifact("shards/tiny")["path"]) / "notes.json"
    path.write_bytes(data)
    rae("inspect", "shards/tiny", "-w", rae.workspace).refused(5, f"{path} holds no notes", f"next: rm {path}")


# ---- the card -------------------------------------------------------------------------------------------------------


def test_a_card_says_what_a_person_needs_who_is_handed_the_artifact(rae_with: With) -> None:
    rae = rae_with("shards", "latents", "dit")
    rae("tag", "dit/tiny", "--license", "CC-BY-4.0", "-w", rae.workspace).succeeded()
    card = rae("inspect", "dit/tiny", "--card", "-w", rae.workspace).succeeded().out
    shown = rae.artifact("dit/tiny")
    assert card.startswith("# tiny\n")
    for text in (shown["id"], shown["content"], "CC-BY-4.0", "## Settings: train", "| lr | 0.0002 |", "└── latents"):
        assert text in card
    assert re.search(r"\| steps \| 8 \|", card)
    rae("inspect", "dit/tiny", "--card", "--json", "-w", rae.workspace).refused(2, "--card or --json")


def test_nothing_of_a_manifest_or_a_note_becomes_markup_in_a_card(tmp_path: Path) -> None:
    from rae.store.manifest import Manifest

    hostile = "<script>alert(1)</script> [x](javascript:1) | `code`\n# heading"
    recipe = {"kind": "dit", "config": {}, "inputs": {}, "weights": {hostile: hostile}}
    folder = tmp_path / "objects" / "dit" / recipe_id(recipe)
    folder.mkdir(parents=True)
    made = Manifest(
        "dit", hostile, recipe, hostile, {}, {hostile: {hostile: hostile}}, [], {hostile: hostile}, {"command": hostile}
    )
    (folder / "manifest.json").write_bytes(made.to_json())
    (folder / "notes.json").write_text(json.dumps({"description": hostile, "license": hostile}))
    rae = Rae(tmp_path / "rae")
    card = rae("inspect", f"dit/{recipe_id(recipe)}", "--card", "-w", tmp_path).succeeded().out
    assert html.escape("<script>", quote=False) in card
    assert "<script" not in card
    assert not re.search(r"(?<!\\)[`\[]", card.partition("made by `rae`")[2])
    assert not re.search(r"^# heading", card, re.MULTILINE)
    assert Workspace(tmp_path).resolve(f"dit/{recipe_id(recipe)}").manifest.name == hostile
