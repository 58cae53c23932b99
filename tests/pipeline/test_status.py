"""The plan says what a stage would do, why, and what it takes."""

from pathlib import Path
from typing import Any

import pytest

from rae.pipeline import config as configuration
from rae.pipeline import status
from rae.pipeline.plan import STAGES, Pipeline
from rae.store.artifacts import Workspace


@pytest.fixture
def rows(finished: Any, tmp_path: Path) -> Any:
    """`rows("train_dit.lr=1")`: the plan of the finished pipeline under other settings, or in an empty workspace."""

    def plan(*overrides: str, empty: bool = False) -> dict[str, dict[str, Any]]:
        workspace = Workspace(tmp_path / "empty" if empty else finished.workspace)
        pipeline = Pipeline(configuration.load(str(finished.config), overrides), workspace, ["tiny.yaml"])
        return {name: status.plan_row(pipeline, name) for name in STAGES}

    return plan


def test_a_finished_pipeline_has_nothing_to_run(rows: Any) -> None:
    assert {row["state"] for row in rows().values()} == {"done"}


def test_a_changed_setting_runs_its_stage_and_what_follows_waits(rows: Any) -> None:
    states = {name: row["state"] for name, row in rows("train_dit.lr=0.5").items()}
    assert states == {
        "shards": "done",
        "encode": "done",
        "train_decoder": "done",
        "train_dit": "run",
        "sample": "wait",
        "evaluate": "wait",
    }


def test_the_price_of_latents_is_told_before_they_are_encoded(rows: Any) -> None:
    row = rows("encode.dtype=float32")["encode"]
    assert row["state"] == "run"
    assert row["bytes"] == row["rows"] * 112 * 4 * 4 * 4
    assert f"{row['rows']} images x 1 view(s) x 112 x 4 x 4 float32" in row["why"]
    assert rows("encode.horizontal_flip=true")["encode"]["bytes"] == row["bytes"]  # two views of half the size


def test_in_an_empty_workspace_only_the_first_stage_can_run(rows: Any) -> None:
    states = [row["state"] for row in rows(empty=True).values()]
    assert states == ["run", "wait", "wait", "wait", "wait", "wait"]


def test_status_says_what_made_each_artifact_what_needs_it_and_what_is_stale(rae_with: Any) -> None:
    rae = rae_with("shards", "latents", "dit")
    before = rae.artifact("latents/tiny")["id"]
    rae.verb("encode", "-s", "encode.batch_size=4").succeeded()
    now = rae.artifact("latents/tiny")["id"]
    ran = rae("status", "-w", rae.workspace).succeeded()
    assert f"stale: dit/tiny: made from latents/{before}, and latents/tiny is now latents/{now}" in ran.out
    assert "(config.encode.batch_size: found 8, asked 4)" in ran.out
    shown = {
        (one["kind"], one["id"]): one
        for one in rae("status", "-w", rae.workspace, "--json").succeeded().json["artifacts"]
    }
    dit = next(one for one in shown.values() if one["kind"] == "dit")
    assert (dit["made_by"], dit["names"], dit["inputs"]) == ("train-dit", ["tiny"], [f"latents/{before}"])
    assert dit["bytes"] > 10_000
    assert 0 <= dit["age_seconds"] < 24 * 3600
    assert shown["latents", before]["dependents"] == [f"dit/{dit['id']}"]
    assert (shown["latents", now]["stale"], shown["latents", now]["dependents"]) == ([], [])
    assert len(shown["latents", before]["stale"]) == len(dit["stale"]) == 1


def test_what_is_damaged_is_listed_with_the_reason_and_hides_nothing_else(rae_with: Any) -> None:
    rae = rae_with("shards", "latents", "dit")
    manifest = next(rae.workspace.glob("objects/dit/*/manifest.json"))
    manifest.write_bytes(manifest.read_bytes()[:-20])
    ref = f"dit/{manifest.parent.name}"
    name = rae.workspace / "refs" / "dit" / "other.json"
    name.write_bytes(b"{")
    shown = rae("status", "-w", rae.workspace).succeeded().out
    assert f"damaged: {ref}: {manifest} is not JSON" in shown
    assert f"damaged: refs/dit/other.json: {name} is not JSON" in shown
    told = rae("status", "-w", rae.workspace, "--json").succeeded().json
    assert {one["kind"] for one in told["artifacts"]} == {"shards", "latents"}
    assert {one["ref"] for one in told["damaged"]} == {ref, "refs/dit/other.json"}
    assert rae.artifact("latents/tiny")["dependents"] == []
    rae("inspect", ref, "-w", rae.workspace).refused(5, str(manifest))
