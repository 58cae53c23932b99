"""Ids follow from recipes; manifests of strangers are not believed."""

import itertools
import json
from typing import Any

import pytest

from rae.store.errors import CorruptData
from rae.store.manifest import Manifest, canonical, differing_fields, recipe_id

RECIPE = {"kind": "dit", "config": {"lr": 2e-4, "classes": ["Eule", "größer"]}, "inputs": {"latents": "ab" * 8}}
WHERE = "here/manifest.json"


def manifest(**changes: Any) -> Manifest:
    entry = {"path": "attempts/1a2b3c4d/ema.safetensors", "bytes": 3, "sha256": "0" * 64}
    given: dict[str, Any] = {
        "kind": "dit",
        "name": "mine",
        "recipe": RECIPE,
        "content": "c" * 64,
        "inputs": {"latents": {"kind": "latents", "id": "ab" * 8, "content": "d" * 64}},
        "config": RECIPE["config"],
        "files": [entry],
        "metrics": {"loss": 0.5},
    }
    return Manifest(**(given | changes))


def stored(**changes: Any) -> bytes:
    """A manifest's bytes with some fields changed after its id was written."""
    return json.dumps(json.loads(manifest().to_json()) | changes).encode()


def test_a_manifest_is_read_as_it_was_written() -> None:
    assert Manifest.from_json(manifest().to_json(), WHERE) == manifest()


def test_the_canonical_form_is_the_documented_one() -> None:
    assert canonical({"b": 1, "a": [1.0, None, "ö"]}) == b'{"a":[1.0,null,"\\u00f6"],"b":1}'
    # Changing this number orphans every artifact in every workspace.
    assert recipe_id(RECIPE) == "dcca988c232de773"
    assert recipe_id(dict(reversed(RECIPE.items()))) == recipe_id(RECIPE)
    with pytest.raises(ValueError, match="JSON"):
        canonical({"lr": float("nan")})


def test_names_of_files_that_are_not_text_have_an_id_too() -> None:
    assert len(recipe_id({"key": "\udcff.png"})) == 16


def test_differing_fields_are_named_with_both_values() -> None:
    asked = {"config": {"lr": 1.0, "steps": 5}, "source": ["a"], "weights": None}
    found = {"config": {"lr": 2.0, "steps": 5}, "source": ["a", "b"], "extra": "x" * 100}
    assert list(differing_fields(asked, found)) == [
        "config.lr: found 2.0, asked 1.0",
        f'extra: found "{"x" * 56}..., asked nothing',
        'source: found ["a", "b"], asked ["a"]',
        "weights: found nothing, asked null",
    ]


def test_fields_differ_exactly_when_ids_do() -> None:
    same, other = {"sizes": (1, 2)}, {"sizes": [1, 2]}
    assert recipe_id(same) == recipe_id(other)
    assert not list(differing_fields(same, other))
    for one, two in (({"lr": 1}, {"lr": 1.0}), ({"flip": True}, {"flip": 1}), ({"limit": None}, {})):
        assert recipe_id(one) != recipe_id(two)
        assert list(differing_fields(one, two))


def test_every_flipped_bit_of_a_manifest_is_found() -> None:
    data = stored()
    for byte, bit in itertools.product(range(len(data)), range(8)):
        damaged = data[:byte] + bytes([data[byte] ^ 1 << bit]) + data[byte + 1 :]
        with pytest.raises(CorruptData, match=WHERE):
            Manifest.from_json(damaged, WHERE)


@pytest.mark.parametrize(
    "path",
    [
        "../../../etc/passwd",
        "attempts/../../other/x",
        "attempts/1a2b3c4d/../../../../x",
        "/etc/passwd",
        "parts/./x",
        "parts//x",
        "..\\x",
        "",
        ".",
        "a\0b",
        "attempts",
        "attempts/x",
    ],
)
def test_a_path_that_leads_out_of_the_artifact_is_refused(path: str) -> None:
    data = stored(files=[{"path": path, "bytes": 3, "sha256": "0" * 64}])
    with pytest.raises(CorruptData, match=r"does not lead to a file of the artifact|lies in no attempt") as refusal:
        Manifest.from_json(data, WHERE)
    assert repr(path) in refusal.value.message


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"[]", "is not a manifest"),
        (b"{}", "is not a manifest"),
        (stored(metrics={"loss": float("nan")}), "NaN is no JSON number"),
        (stored(schema=2), "has schema 2; this version of rae reads up to 1"),
        (stored(schema=2, more="a field of the future"), "has schema 2"),
        (stored(schema=True), "`schema` must be int"),
        (stored(name=5), "`name` must be str"),
        (stored(kind="weights"), "`kind` is 'weights', not one of"),
        (stored(id="ab" * 8), "its recipe gives the id dcca988c232de773, not abab"),
        (stored(recipe={"kind": "dit"}), "its recipe gives the id"),
        (stored(files=["x"]), "every entry of `files` needs"),
        (stored(files=[{"path": "x", "bytes": True, "sha256": ""}]), "every entry of `files` needs"),
        (stored(inputs={"latents": "abc"}), "the input `latents` needs kind, id and content"),
        (stored(inputs={"dit": {"kind": "dit", "id": "../../x", "content": ""}}), "the input `dit` is no artifact"),
        (stored(inputs={"dit": {"kind": "x", "id": "ab" * 8, "content": ""}}), "the input `dit` is no artifact"),
    ],
)
def test_what_does_not_hold_is_said(data: bytes, why: str) -> None:
    with pytest.raises(CorruptData) as refusal:
        Manifest.from_json(data, WHERE)
    assert why in refusal.value.message
    assert WHERE in refusal.value.message
