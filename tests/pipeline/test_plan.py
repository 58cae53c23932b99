"""The data flow: what a result follows from, and what it does not."""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rae.pipeline import config as configuration
from rae.pipeline.plan import STAGES, Pipeline
from rae.store.artifacts import Workspace
from rae.store.errors import ConfigError, MissingInput, StaleInput
from rae.store.manifest import differing_fields, recipe_id
from tests.conftest import Rae

Plan = Callable[..., Pipeline]


@pytest.fixture
def plan(finished: Rae) -> Plan:
    """`plan("train_dit.lr=1")`: the finished pipeline under other settings."""

    def make(*overrides: str) -> Pipeline:
        settings = configuration.load(str(finished.config), overrides)
        return Pipeline(settings, Workspace(finished.workspace), configuration.words("tiny.yaml", overrides))

    return make


def test_the_table_is_the_data_flow(plan: Plan) -> None:
    assert list(STAGES) == ["shards", "encode", "train_decoder", "train_dit", "sample", "evaluate"]
    inputs = {name: set(plan().task(name).inputs) for name in STAGES}
    assert inputs == {
        "shards": set(),
        "encode": {"shards"},
        "train_decoder": {"shards"},
        "train_dit": {"latents"},
        "sample": {"dit", "decoder"},
        "evaluate": {"decoder", "samples", "shards"},
    }


def test_a_finished_pipeline_is_found_whole(plan: Plan) -> None:
    found = {name: plan().find(name) for name in STAGES}
    assert [artifact.kind for artifact in found.values()] == [stage.kind for stage in STAGES.values()]
    for name, artifact in found.items():
        recipe = plan().task(name).recipe
        assert artifact.manifest.recipe == recipe
        assert artifact.id == recipe_id(recipe)
        assert artifact.manifest.config == recipe["config"]
        # Shards are lineage alone: recipes hold the digests of the tars, wherever they lie.
        ids = {role: one["id"] for role, one in artifact.manifest.inputs.items() if role != "shards"}
        assert recipe["inputs"] == ids
        for role, one in artifact.manifest.inputs.items():
            assert one == found[next(n for n, s in STAGES.items() if s.kind == one["kind"])].as_input(), role


@pytest.mark.parametrize(
    ("stage", "override"),
    [
        ("shards", "shards.seed=1"),
        ("shards", "shards.val_fraction=0.3"),
        ("encode", "encode.batch_size=4"),
        ("encode", "encode.rows_per_part=4"),
        ("encode", "encode.dtype=float32"),
        ("encode", "encode.precision=bf16"),
        ("encode", "encode.horizontal_flip=true"),
        ("train_decoder", "train_decoder.seed=1"),
        ("train_decoder", "train_decoder.noise_tau=0.1"),
        ("train_decoder", "encode.encoder_input_size=96"),
        ("train_dit", "train_dit.class_dropout_prob=0.2"),
        ("train_dit", "train_dit.batch_size=4"),
        ("sample", "sample.guidance_scale=2"),
        ("sample", "sample.classes=[1]"),
        ("sample", "sample.sampler=sde"),
        ("evaluate", "evaluate.nearest_k=4"),
        ("evaluate", "evaluate.classifier=none"),
    ],
)
def test_what_changes_the_result_changes_the_id(stage: str, override: str, plan: Plan) -> None:
    assert recipe_id(plan(override).task(stage).recipe) != recipe_id(plan().task(stage).recipe)


@pytest.mark.parametrize(
    "override",
    [
        "encode.workers=7",
        "train_decoder.log_every=1",
        "train_decoder.checkpoint_every=1",
        "train_dit.keep_checkpoints=9",
        "train_dit.compile=true",
        "train_decoder.grad_checkpoint=true",
        "description=another",
        "train_dit.lr=2.0e-4",  # the default, written out
        "evaluate.nearest_k=3",
    ],
)
def test_what_does_not_change_the_result_changes_nothing(override: str, plan: Plan) -> None:
    for name in STAGES:
        assert plan(override).find(name) == plan().find(name)


def test_a_guide_stands_in_the_recipe_and_in_the_lineage_of_samples(plan: Plan) -> None:
    guided = plan("sample.guidance_scale=2", "sample.guide=dit/tiny").task("sample")
    assert guided.inputs["guide"] == guided.inputs["dit"]
    assert guided.recipe["inputs"]["guide"] == guided.inputs["dit"].id
    assert guided.recipe["config"] == plan("sample.guidance_scale=2").task("sample").recipe["config"]


def test_a_decoder_does_not_follow_from_how_latents_are_stored(plan: Plan) -> None:
    assert plan("encode.dtype=float32", "encode.batch_size=4").find("train_decoder") == plan().find("train_decoder")


def test_no_recipe_names_a_place(plan: Plan, finished: Rae) -> None:
    for name in STAGES:
        recipe = str(plan().task(name).recipe)
        assert str(finished.folder) not in recipe
        assert "site-packages" not in recipe


def test_two_copies_of_the_same_tars_are_one_source_and_other_labels_are_not(tmp_path: Path) -> None:
    """The same bytes give the same latents wherever they lie, unless they are read under other keys."""
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(buffer, "PNG")
    members = {"a.png": buffer.getvalue(), "a.json": b'{"coarse": 0, "fine": 3}'}
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        with tarfile.open(tmp_path / place / "x.tar", "w") as tar:
            for name, data in members.items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))

    def recipe(place: str, *overrides: str) -> object:
        given = (f"shards.train={tmp_path / place / 'x.tar'}", "shards.val_fraction=0", *overrides)
        settings = configuration.load("quickstart", given)
        return Pipeline(settings, Workspace(tmp_path / "none"), []).task("encode").recipe

    first = recipe("here", "shards.label_field=coarse")
    assert recipe("there", "shards.label_field=coarse") == first
    assert list(differing_fields(first, recipe("here", "shards.label_field=fine"))) == [
        'reading.label_field: found "fine", asked "coarse"'
    ]
    assert recipe("here", "shards.label_field=coarse", "shards.classes=[x]") != first


def test_tars_in_place_need_no_shards_and_a_choice_among_them_does(tmp_path: Path) -> None:
    (tmp_path / "x.tar").touch()

    def stages(*overrides: str) -> list[str]:
        settings = configuration.load("quickstart", [f"shards.train={tmp_path / 'x.tar'}", *overrides])
        return [stage.name for stage in Pipeline(settings, Workspace(tmp_path / "none"), []).stages]

    assert stages("shards.val_fraction=0") == list(STAGES)[1:]
    assert stages("shards.val_fraction=0.1") == list(STAGES)
    assert stages("shards.val_fraction=0", "shards.limit=5") == list(STAGES)
    assert stages("shards.val_fraction=0", "shards.val=digits") == list(STAGES)
    assert stages("shards.val_fraction=0", "sample=null", "evaluate=null") == list(STAGES)[1:4]


def test_what_is_missing_names_the_command_that_makes_it(plan: Plan, finished: Rae) -> None:
    pipeline = plan("encode.dtype=float32")
    with pytest.raises(MissingInput, match="`tiny` has no latents in the workspace") as refusal:
        pipeline.task("train_dit")
    where = f"-s encode.dtype=float32 -w {finished.workspace}"
    assert refusal.value.next_command == f"rae encode tiny.yaml {where}"
    with pytest.raises(MissingInput) as refusal:  # of a chain, the first link
        pipeline.task("evaluate")
    assert refusal.value.next_command == f"rae encode tiny.yaml {where}"


def test_a_pipeline_without_a_section_says_so(plan: Plan) -> None:
    with pytest.raises(ConfigError, match="has no section `encode`"):
        plan("encode=null").task("train_decoder")
    with pytest.raises(MissingInput, match="names no training images"):
        plan("shards.train=null", "shards.val_fraction=0").task("encode")
    tars = f"shards.train={plan().find('shards').payload}/train-*.tar"
    with pytest.raises(MissingInput, match="holds no images out"):
        plan(tars, "shards.val_fraction=0", "shards.limit=null").task("evaluate")


def test_named_inputs_are_held_against_the_configuration(plan: Plan) -> None:
    latents = plan().find("encode")
    named = plan(f"train_dit.latents={latents.id}").task("train_dit")
    assert named.recipe == plan().task("train_dit").recipe  # however it is named
    with pytest.raises(StaleInput, match=r"encode\.batch_size: found 8, asked 4"):
        plan(f"train_dit.latents={latents.id}", "encode.batch_size=4").task("train_dit")
    free = plan(f"train_dit.latents={latents.id}", "encode=null").task("train_dit")
    assert free.recipe == named.recipe
    assert plan("sample.decoder=decoder/tiny", "sample.dit=tiny").find("sample") == plan().find("sample")


def test_without_samples_reconstructions_are_scored_alone(plan: Plan) -> None:
    assert set(plan("sample=null").task("evaluate").inputs) == {"decoder", "shards"}


def test_an_extractor_of_a_given_file_is_the_file_s_digest(plan: Plan, tmp_path: Path) -> None:
    from rae.stages.models.weights import locate_encoder

    carried = locate_encoder("efficientnet-lite0").folder_or_file
    copy = tmp_path / "weights.pth"
    copy.write_bytes(carried.read_bytes())
    assert plan(f"evaluate.extractor_weights={copy}").find("evaluate") == plan().find("evaluate")
    copy.write_bytes(carried.read_bytes() + b"\0")
    assert plan(f"evaluate.extractor_weights={copy}").find("evaluate") is None
    with pytest.raises(MissingInput, match="are not at"):
        plan(f"evaluate.extractor_weights={tmp_path}/none.pth").task("evaluate")
