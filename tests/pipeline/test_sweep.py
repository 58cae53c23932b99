"""Sweeps: what varies, what is shared, what the spread says, and that the same command continues."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from rae.pipeline import config as configuration
from rae.pipeline.sweep import pieces, sweep_of, variants
from rae.pipeline.sweep_plan import rows
from rae.pipeline.sweep_results import decide
from rae.pipeline.sweep_section import SweepSection
from rae.store.artifacts import Workspace
from rae.store.errors import ConfigError
from tests.conftest import TINY, Rae

DECODERS = {
    **TINY,
    "evaluate": {**TINY["evaluate"], "perceptual_distance": "none", "latent_noise": [0, 1]},
    "train_dit": None,
    "sample": None,
    "sweep": {
        "grid": {"train_decoder.noise_tau": [0, 0.8]},
        "seeds": [0, 1],
        "measures": ["reconstruction_psnr_db", "decoder.loss"],
        "claims": [
            {
                "says": "noise changes little in six steps",
                "metric": "reconstruction_psnr_db",
                "variant": "noise_tau=0.8",
                "relation": "within",
                "baseline": "noise_tau=0",
                "tolerance": 5,
            }
        ],
        "published": [{"source": "somebody", "figures": {"noise_tau=0": {"reconstruction_psnr_db": 25.87}}}],
    },
}


def write(folder: Path, **changes: Any) -> str:
    path = folder / "sweep.yaml"
    sweep = {**DECODERS["sweep"], **changes}
    path.write_text(yaml.safe_dump({"name": "swept", **DECODERS, "sweep": sweep}))
    return str(path)


@pytest.fixture(scope="module")
def swept(finished: Rae, tmp_path_factory: pytest.TempPathFactory) -> tuple[Rae, str, str]:
    """The sweep in a workspace that held the shards and the latents, its file, and what the command said."""
    folder = tmp_path_factory.mktemp("swept")
    rae = finished.copy(folder, "shards", "latents")
    config = write(folder)
    return rae, config, rae("sweep", config, "-w", rae.workspace).succeeded().out


def test_a_sweep_runs_every_variant_with_every_seed_and_makes_what_they_share_once(swept: Any) -> None:
    rae, _, said = swept
    assert "4 of 4 runs done" in said
    made = {kind: len(list(Workspace(rae.workspace).artifacts(kind))) for kind in ("latents", "decoder", "scores")}
    assert made == {"latents": 1, "decoder": 4, "scores": 4}
    seeds = {rae.artifact(f"decoder/swept-noise_tau-0.8-s{seed}")["id"] for seed in (0, 1)}
    assert len(seeds) == 2


def test_the_table_holds_means_spreads_published_figures_and_a_verdict(swept: Any) -> None:
    rae, _, said = swept
    found = json.loads((rae.workspace / "reports" / "swept.json").read_text())
    cell = found["variants"]["noise_tau=0"]["reconstruction_psnr_db"]
    first, second = cell["values"]
    assert cell["mean"] == pytest.approx((first + second) / 2)
    assert cell["spread"] == pytest.approx(abs(first - second) / 2**0.5)
    assert first == rae.artifact("scores/swept-noise_tau-0-s0")["metrics"]["reconstruction_psnr_db"]
    assert "±" in said
    assert "25.87" in said
    assert [claim["outcome"] for claim in found["claims"]] == ["holds"]
    assert "holds: noise changes little" in said
    with (rae.workspace / "reports" / "swept.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [(line["variant"], line["seed"]) for line in lines] == [
        (f"noise_tau={tau}", seed) for tau in ("0", "0.8") for seed in "01"
    ]


def test_the_report_shows_verdicts_charts_and_pictures(swept: Any) -> None:
    page = (swept[0].workspace / "reports" / "swept.html").read_text()
    assert "<strong>holds</strong>" in page
    assert page.count('<svg class="chart"') == 4  # two spreads, the loss, and PSNR by level
    assert page.count("data:image/png") == 2 * 3 * 6  # per variant: originals and two levels of six images
    assert "<script" not in page
    assert "http" not in page.replace("http-equiv", "")


def test_a_finished_sweep_is_found_whole_and_told_as_json(swept: Any) -> None:
    rae, config, _ = swept
    again = rae("sweep", config, "-w", rae.workspace, "--json").succeeded()
    assert again.json["done"] == 4
    assert "begins" not in again.err


def test_the_plan_says_what_is_shared_what_remains_and_how_long(swept: Any, tmp_path: Path) -> None:
    rae, config, _ = swept
    assert "everything is done" in rae("plan", config, "-w", rae.workspace).succeeded().out
    longer = ("-s", "train_decoder.steps=60")
    work = rae("plan", config, "-w", rae.workspace, *longer, "--json").succeeded().json
    assert [(row["stage"], len(row["runs"]), row["state"]) for row in work[:2]] == [
        ("shards", 4, "done"),
        ("encode", 4, "done"),
    ]
    trainings = [row for row in work if row["stage"] == "train-decoder"]
    assert [row["state"] for row in trainings] == ["run"] * 4
    newest = max((rae.artifact(f"decoder/{one.id}") for one in Workspace(rae.workspace).artifacts("decoder")), key=_age)
    assert trainings[0]["seconds"] == pytest.approx(10 * newest["metrics"]["seconds"], rel=1)
    elsewhere = sweep_of(config, Workspace(tmp_path))
    assert {row.seconds for row in rows(elsewhere)} == {None}  # it never guesses


def _age(artifact: Any) -> str:
    return str(artifact["provenance"]["created"])


def test_two_shares_do_it_all_between_them(finished: Rae, tmp_path: Path) -> None:
    rae = finished.copy(tmp_path, "shards", "latents")
    config = write(tmp_path, seeds=[0])
    half = rae("sweep", config, "-w", rae.workspace, "--parts", "0/2", "--json").succeeded()
    assert half.json["done"] == 1
    whole = rae("sweep", config, "-w", rae.workspace, "--parts", "1/2", "--json").succeeded()
    assert whole.json["done"] == 2
    assert whole.json["claims"][0]["outcome"] == "undecided"  # one seed has no spread


def test_what_a_transformer_s_settings_leave_alone_is_shared(tmp_path: Path) -> None:
    path = tmp_path / "dits.yaml"
    path.write_text(
        yaml.safe_dump({"name": "dits", **TINY, "sweep": {"grid": {"train_dit.lr": [1e-3, 1e-4]}, "seeds": [0]}})
    )
    found = {(one.stage.name, len(one.runs)) for one in pieces(sweep_of(str(path), Workspace(tmp_path / "w")).runs)}
    shared, own = ("shards", "encode", "train_decoder"), ("train_dit", "sample", "evaluate")
    assert found == {(name, 2) for name in shared} | {(name, 1) for name in own}


def test_variants_and_grid_multiply() -> None:
    section = SweepSection(variants={"a": {"x.y": 1}, "b": {}}, grid={"p.q": [1, 2.5]})
    assert variants(section) == {
        "a,q=1": {"x.y": 1, "p.q": 1},
        "a,q=2.5": {"x.y": 1, "p.q": 2.5},
        "b,q=1": {"p.q": 1},
        "b,q=2.5": {"p.q": 2.5},
    }


@pytest.mark.parametrize(
    ("differences", "relation", "tolerance", "outcome"),
    [
        ([1.0, 1.1, 0.9], "higher", None, "holds"),
        ([1.0, 1.1, 0.9], "lower", None, "does not hold"),
        ([1.0, -1.1, 0.9], "higher", None, "undecided"),
        ([-1.0, -1.1, -0.9], "lower", None, "holds"),
        ([0.1, -0.1, 0.0], "within", 0.5, "holds"),
        ([2.0, 2.1, 1.9], "within", 0.5, "does not hold"),
        ([0.1, -0.9, 0.8], "within", 0.5, "undecided"),
        ([5.0], "higher", None, "undecided"),
        ([], "higher", None, "not measured"),
    ],
)
def test_a_verdict_follows_from_the_spread(
    differences: list[float], relation: str, tolerance: float | None, outcome: str
) -> None:
    assert decide(differences, relation, tolerance)[0] == outcome


def test_an_interval_is_student_s(tmp_path: Path) -> None:
    """Of 1, 2, 3: mean 2, standard error 0.577, t(0.975, 2) = 4.303."""
    assert "95 % interval -0.4841 to +4.484, 3 seeds" in decide([1.0, 2.0, 3.0], "higher", None)[1]


def test_what_is_wrong_with_a_sweep_is_said(tmp_path: Path, finished: Rae) -> None:
    with pytest.raises(ConfigError, match="has no section `sweep`"):
        sweep_of(str(finished.config), Workspace(tmp_path))
    claim = {**DECODERS["sweep"]["claims"][0], "variant": "noise_tau=0.9"}
    with pytest.raises(ConfigError, match=r"names no variant: `noise_tau=0.9` \(did you mean"):
        sweep_of(write(tmp_path, claims=[claim]), Workspace(tmp_path))
    with pytest.raises(ConfigError, match="needs `variants` or a `grid`"):
        sweep_of(write(tmp_path, grid={}, claims=[]), Workspace(tmp_path))
    with pytest.raises(ConfigError, match=r"unknown key `train_decoder\.noise_taw`"):
        sweep_of(write(tmp_path, grid={"train_decoder.noise_taw": [0]}, claims=[]), Workspace(tmp_path))
    finished("sweep", write(tmp_path, seeds=[1, 1]), "-w", tmp_path).refused(2, "has a seed twice")


@pytest.mark.parametrize("size", ["cpu", "gpu"])
@pytest.mark.parametrize("name", configuration.experiments())
def test_every_experiment_is_a_valid_sweep_at_both_sizes(name: str, size: str, tmp_path: Path) -> None:
    sweep = sweep_of(name, Workspace(tmp_path), [f"sweep.size={size}"])
    assert sweep.config.name == name
    assert sweep.name == f"{name}-{size}"
    assert len(sweep.config.description) > 40
    assert sweep.section.claims
    assert len(sweep.section.seeds) >= 2 or size == "gpu"
    for published in sweep.section.published:
        assert set(published.figures) <= set(sweep.variants)
