"""What commands say and how they exit: no traceback for a person's mistake, nothing heavy before it is needed."""

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import TINY, FullDisk, Rae

HEAVY = {
    "torch",
    "torchvision",
    "transformers",
    "timm",
    "zarr",
    "dask",
    "pandas",
    "sklearn",
    "scipy",
    "lpips",
    "jinja2",
}
LOADED = """
import sys
from rae.pipeline.cli import main
try:
    main()
finally:
    print(*sys.modules, file=sys.stderr)
"""


def loaded_by(*words: str) -> set[str]:
    """The top-level modules that a command has loaded when it ends."""
    ran = subprocess.run(
        [sys.executable, "-c", LOADED, *words], check=False, capture_output=True, text=True, timeout=60
    )
    assert ran.returncode == 0, ran.stderr
    return {name.partition(".")[0] for name in ran.stderr.splitlines()[-1].split()}


def png(size: int = 32, value: int = 128) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((size, size, 3), value, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path: Path, samples: dict[str, dict[str, bytes]]) -> str:
    """A webdataset tar of {key: {suffix: bytes}}."""
    with tarfile.open(path, "w") as tar:
        for key, members in samples.items():
            for suffix, data in members.items():
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return str(path)


# ---- what is loaded -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    ["--help", "run --help", "config ls", "config show quickstart", "config validate quickstart", "status -w none"],
)
def test_nothing_heavy_is_loaded_to_answer_a_question(command: str) -> None:
    loaded = loaded_by(*command.split())
    assert "rae" in loaded
    assert not loaded & HEAVY


def test_help_loads_no_array_library_either() -> None:
    assert not loaded_by("--help") & {"numpy", "pyarrow", "pydantic", "yaml", "rich"}


def test_a_plan_and_a_finished_pipeline_need_no_torch(finished: Rae) -> None:
    assert not loaded_by(*finished.words("plan")) & {"torch", "transformers", "timm", "sklearn"}
    assert not loaded_by(*finished.words("train-dit")) & {"torch", "transformers", "timm", "sklearn"}
    assert not loaded_by(*finished.words("run")) & {"torch", "transformers", "timm", "sklearn"}


# ---- configurations that cannot be meant ----------------------------------------------------------------------------


def test_an_unknown_key_is_refused_with_the_closest_one(rae: Rae) -> None:
    rae.verb("run", "-s", "train_dit.hiden_size=3").refused(2, "`train_dit.hiden_size`", "did you mean `hidden_size`?")
    rae.verb("encode", "-s", "train_dti.steps=3").refused(2, "`train_dti`", "did you mean `train_dit`?")
    assert not rae.workspace.exists()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train_dit.lr=fast", ("`train_dit.lr` is 'fast'", "number")),
        ("train_dit.steps=2.5", ("`train_dit.steps` is 2.5",)),
        ("train_dit.steps=-1", ("`train_dit.steps` is -1", "greater than 0")),
        ("train_dit.lr=.nan", ("`train_dit.lr` is nan", "finite")),
        ("train_dit=5", ("`train_dit` is 5",)),
        ("train_dit.hidden_size=[32]", ("in `train_dit`", "`hidden_size` needs 2 number(s) for DiT-DH")),
        ("train_dit.time_dist_shift=big", ("`train_dit.time_dist_shift`", "'auto'")),
        ("train_dit.epochs=2", ("give the length of training once",)),
        ("encode.dtype=float8", ("`encode.dtype` is 'float8'", "'float16'")),
        ("name=../tiny", ("`../tiny` can't be a name",)),
        ("name=7", ("`name` is 7",)),
        ("lr", ("`-s lr` is not of the form key=value",)),
        ("name.first=a", ("`name` is a value, not a section",)),
        ("train_dit.lr={", ("is not a YAML value",)),
    ],
)
def test_a_wrong_value_is_refused_where_it_stands(override: str, words: tuple[str, ...], rae: Rae) -> None:
    rae.verb("run", "-s", override).refused(2, *words)
    assert not rae.workspace.exists()


def test_all_mistakes_are_told_at_once(rae: Rae) -> None:
    rae("config", "validate", rae.config, "-s", "encode.a=1", "-s", "train_dit.lr=x").refused(
        2, "`encode.a`", "`train_dit.lr`"
    )


def test_a_configuration_that_is_not_there(rae: Rae) -> None:
    rae("run", rae.folder / "none.yaml").refused(3, "none.yaml", "next: rae config ls")
    rae("run", "quickstrat").refused(2, "no preset or file `quickstrat`", "did you mean `quickstart`?")
    rae("run", rae.folder).refused(2, "no preset or file")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"name: [", "is not YAML"),
        (b"- a\n- b", "must hold a mapping"),
        (b"", "must hold a mapping"),
        (b"encode: {}", "`name` is missing"),
        (b"\xff\xfe\x00", "is not text in UTF-8"),
    ],
)
def test_a_file_that_is_no_configuration(data: bytes, words: str, rae: Rae) -> None:
    rae.config.write_bytes(data)
    rae.verb("run").refused(2, words)


def test_usage_is_refused_by_typer_in_the_same_way(rae: Rae) -> None:
    rae("run").refused(2, "Missing argument")
    rae("nothing").refused(2, "nothing")
    rae.verb("run", "--from", "enocde").refused(2, "`enocde` is not a stage of `tiny`", "train-decoder")
    rae("sample", rae.config, "-s", "sample=null", "-w", rae.workspace).refused(2, "has no section `sample`")


def test_a_device_that_is_not_there(rae: Rae) -> None:
    rae.verb("encode", "--device", "abacus").refused(2, "--device abacus")


# ---- inputs that are not there, or cannot be meant ------------------------------------------------------------------


def test_a_missing_shard_is_named(rae: Rae) -> None:
    write_tar(rae.folder / "x-0.tar", {"a": {"png": png(), "cls": b"0"}})
    rae.verb("encode", "-s", f"shards={{train: '{rae.folder}/x-{{0..2}}.tar'}}").refused(3, "x-1.tar", "x-2.tar")
    rae.verb("encode", "-s", f"shards={{train: '{rae.folder}/none'}}").refused(3, "none")


def test_an_empty_data_set_is_refused(rae: Rae) -> None:
    (rae.folder / "empty").mkdir()
    rae.verb("encode", "-s", f"shards={{train: '{rae.folder}/empty'}}").refused(3, "empty")
    write_tar(rae.folder / "empty.tar", {})
    rae.verb("encode", "-s", f"shards={{train: '{rae.folder}/empty.tar'}}").refused(3, "empty.tar")
    rae.verb("encode", "-s", "shards.train=null").refused(3, "names no training images")


def test_a_label_outside_the_classes_is_refused_with_its_sample(rae: Rae, rae_with: Callable[..., Rae]) -> None:
    samples = {"good": {"png": png(), "cls": b"1"}, "bad": {"png": png(), "cls": b"7"}}
    tar = write_tar(rae.folder / "x.tar", samples)
    rae.verb("encode", "-s", f"shards={{train: {tar}, classes: [cat, dog]}}").refused(2, "`bad`", "7", "2 classes")
    trained = rae_with("shards", "latents")
    trained.verb("train-dit", "-s", "train_dit.num_classes=5").refused(2, "`train_dit.num_classes` is 5", "is 9")


def test_an_image_that_cannot_be_decoded_is_recorded_and_the_others_are_encoded(rae: Rae) -> None:
    samples = {f"image-{number}": {"png": png(value=number * 20), "cls": b"0"} for number in range(8)}
    samples["image-3"]["png"] = b"\x89PNG\r\n\x1a\nnot really"
    samples["image-5"]["png"] = png()[:60]
    tar = write_tar(rae.folder / "x.tar", samples)
    options = ("-s", f"shards={{train: {tar}}}", "-s", "train_decoder=null", "-s", "evaluate=null")
    ran = rae.verb("encode", "--json", *options).succeeded()
    assert (ran.json["metrics"]["rows"], ran.json["metrics"]["invalid_rows"]) == (6, 2)
    shown = rae("inspect", "latents/tiny", "-w", rae.workspace).succeeded().out
    assert "invalid: image-3 in source shard 0: truncated or damaged png" in shown
    assert "invalid: image-5 in source shard 0: truncated or damaged png" in shown
    listed = rae.artifact("latents/tiny")["invalid"]
    assert [row["key"] for row in listed] == ["image-3", "image-5"]
    assert all(row["reason"] for row in listed)
    trained = rae.verb("train-dit", "--json", *options, "-s", "train_dit.batch_size=6").succeeded()
    assert trained.json["metrics"]["steps"] == TINY["train_dit"]["steps"]


def test_a_data_set_without_one_good_image_is_corrupt(rae: Rae) -> None:
    tar = write_tar(rae.folder / "x.tar", {"a": {"png": b"\x89PNG\r\n\x1a\nx", "cls": b"0"}})
    rae.verb("encode", "-s", f"shards={{train: {tar}}}").refused(5, "none of the 1 images")


def test_an_image_that_changed_after_it_was_indexed_is_corrupt(rae: Rae) -> None:
    rae("shards", "digits", rae.folder / "mine", "--limit", 20).succeeded()
    tar = rae.folder / "mine" / "train-0000.tar"
    data = bytearray(tar.read_bytes())
    data[:100] = b"other.png".ljust(100, b"\0")
    tar.write_bytes(data)
    rae.verb("encode", "-s", f"shards={{train: '{rae.folder}/mine'}}").refused(5, "train-0000.tar")


@pytest.mark.parametrize(
    ("verb", "missing"), [("train-dit", "encode"), ("sample", "train-dit"), ("evaluate", "encode")]
)
def test_a_missing_input_names_the_command_that_makes_it(verb: str, missing: str, rae_with: Callable[..., Rae]) -> None:
    rae = rae_with("shards", *(["latents", "decoder"] if verb == "sample" else []))
    rae.verb(verb).refused(3, f"next: rae {missing} {rae.config} -w {rae.workspace}")


def test_latents_of_another_encoder_are_refused_with_the_differing_fields(rae_with: Callable[..., Rae]) -> None:
    rae = rae_with("shards")
    rae.verb("encode", "-s", "name=other", "-s", "encode.feature_index=2").succeeded()
    rae.verb("train-dit", "-s", "train_dit.latents=other").refused(
        4, "the latents `other` are not what `tiny` asks for", "feature_index: found 2, asked 3"
    )
    rae.verb("train-dit", "-s", "train_dit.latents=nobody").refused(3, "no latents `nobody`")
    rae.verb("train-dit", "-s", "train_dit.latents=shards/tiny").refused(4, "of kind shards, and latents is needed")


def test_a_decoder_of_another_grid_is_refused_with_the_differing_fields(rae_with: Callable[..., Rae]) -> None:
    rae = rae_with("shards", "latents", "decoder", "dit")
    other = ("-s", "name=other", "-s", "encode.encoder_input_size=128", "-s", "train_decoder.steps=1")
    rae.verb("train-decoder", *other).succeeded()
    rae.verb("sample", "-s", "sample.decoder=other").refused(
        4, "the decoder reads other latents than the transformer makes", "grid", "found [8, 8], asked [4, 4]"
    )


def test_a_transformer_narrower_than_a_token_is_refused_before_anything_runs(rae: Rae) -> None:
    narrow = ("-s", "train_dit.hidden_size=[112, 96]")
    rae.verb("run", *narrow).refused(2, "the head is 96 wide and a token has 112 channels", "Theorem 1", "allow_narrow")
    assert not rae.workspace.exists()
    rae.verb("run", *narrow, "-s", "train_dit.allow_narrow=true", "--to", "train-dit", "--quiet").succeeded()


def test_a_batch_larger_than_the_data_is_refused(rae_with: Callable[..., Rae]) -> None:
    rae = rae_with("shards", "latents")
    rae.verb("train-dit", "-s", "train_dit.batch_size=101").refused(2, "`batch_size` 101", "100")


# ---- workspaces that cannot be used ---------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["run", "encode", "plan", "report"])
def test_a_workspace_that_is_a_file(command: str, rae: Rae) -> None:
    rae.workspace.write_text("not a folder")
    rae.verb(command).refused(3, f"the workspace {rae.workspace} cannot be read")
    rae("status", "-w", rae.workspace).refused(3, "cannot be read")
    rae("inspect", "dit/tiny", "-w", rae.workspace).refused(3, "cannot be read")
    rae("status", "-w", "ftp://host/rae").refused(2, "is no place that artifacts can lie in")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads and writes what it has no permission for")
@pytest.mark.parametrize(("mode", "words"), [(0o000, "cannot be read"), (0o500, "can't be read or written")])
def test_a_workspace_without_permission(mode: int, words: str, rae: Rae) -> None:
    rae.workspace.mkdir(mode=mode)
    rae.verb("encode").refused(3, str(rae.workspace), words)


def test_a_damaged_manifest_is_corrupt_data(rae_with: Callable[..., Rae]) -> None:
    rae = rae_with("shards")
    manifest = next(rae.workspace.glob("objects/shards/*/manifest.json"))
    manifest.write_bytes(manifest.read_bytes()[:-20])
    for words in (rae.words("encode"), ["inspect", "tiny", "-w", rae.workspace]):
        rae(*words).refused(5, str(manifest), "is not JSON")


# ---- work that is there already -------------------------------------------------------------------------------------


def test_unfinished_work_with_other_settings_is_kept_unless_dropped(
    rae_with: Callable[..., Rae], disk: FullDisk
) -> None:
    rae = rae_with("shards", "latents")
    disk.room = 20
    rae.verb("train-dit", "-s", "train_dit.lr=1e-3").refused(6, "next: rae train-dit")
    disk.room = None
    begun = next((rae.workspace / "objects" / "dit").iterdir())
    rae.verb("train-dit").refused(4, "train_dit.lr: found 0.001, asked 0.0002", "--restart")
    assert begun.exists()
    assert "unfinished: dit `tiny`" in rae("status", "-w", rae.workspace).succeeded().out
    states = {row["stage"]: row["state"] for row in rae.verb("plan", "-s", "train_dit.lr=1e-3", "--json").json}
    assert (states["encode"], states["train-dit"], states["sample"]) == ("done", "continue", "wait")
    rae.verb("train-dit", "--restart").succeeded()
    assert not begun.exists()
    assert "unfinished:" not in rae("status", "-w", rae.workspace).out


def test_a_mistake_that_a_stage_finds_leaves_nothing_in_the_way(rae_with: Callable[..., Rae]) -> None:
    rae = rae_with("shards", "latents")
    rae.verb("train-dit", "-s", "train_dit.num_classes=5").refused(2, "`train_dit.num_classes` is 5")
    assert not list((rae.workspace / "objects" / "dit").iterdir())
    rae.verb("train-dit").succeeded()


def test_finished_work_is_found_again(finished: Rae) -> None:
    for verb in ("shards", "encode", "train-decoder", "train-dit", "sample", "evaluate"):
        ran = finished.verb(verb, "--json").succeeded().json
        assert ran["reused"] is True
        assert set(ran) == {"kind", "id", "content", "path", "reused", "metrics"}
        assert Path(ran["path"], "manifest.json").is_file()
    assert [one["reused"] for one in finished.verb("run", "--json").succeeded().json] == [True] * 6
    # What does not change the result does not make it anew.
    moved = finished.verb("train-dit", "--json", "-s", "train_dit.log_every=1", "-s", "encode.workers=1").json
    assert moved["reused"] is True


def test_shards_in_a_folder_of_choice(rae: Rae) -> None:
    out = rae.folder / "mine"
    first = rae("shards", "digits", out, "--limit", 20, "--val-fraction", 0.2, "--json").succeeded().json
    assert (first["reused"], first["metrics"]["rows"], first["path"]) == (False, 10, str(out))
    again = rae("shards", "digits", out, "--limit", 20, "--val-fraction", 0.2, "--json").succeeded().json
    assert (again["reused"], again["content"]) == (True, first["content"])
    rae("shards", "digits", out, "--limit", 30).refused(4, "already holds other shards", "limit: found 20, asked 30")
    (rae.folder / "theirs").mkdir()
    (rae.folder / "theirs" / "thesis.tex").touch()
    rae("shards", "digits", rae.folder / "theirs").refused(2, "is not empty")
    rae("shards", "digits", rae.config / "x").refused(3, "can't be read or written")


# ---- what is said ---------------------------------------------------------------------------------------------------


def test_json_is_all_that_stands_on_stdout(rae: Rae, finished: Rae) -> None:
    done = rae.verb("run", "--json", "--to", "encode").succeeded()
    assert [(one["kind"], one["reused"]) for one in done.json] == [("shards", False), ("latents", False)]
    assert "encode: done" in done.err
    assert [row["stage"] for row in finished.verb("plan", "--json").json][:2] == ["shards", "encode"]
    assert finished.verb("run", "--dry-run", "--json").json[0]["state"] == "done"
    assert len(finished("status", "-w", finished.workspace, "--json").json["artifacts"]) == 6
    assert finished.artifact("dit/tiny")["metrics"]["steps"] == TINY["train_dit"]["steps"]
    assert "quickstart" in finished("config", "ls", "--json").json


def test_quiet_says_nothing(rae: Rae) -> None:
    done = rae.verb("encode", "--quiet").succeeded()
    assert (done.out, done.err) == ("", "")


def test_a_dry_run_changes_nothing(rae: Rae) -> None:
    said = rae.verb("run", "--dry-run").succeeded().out
    assert "encode" in said
    assert not rae.workspace.exists()


def test_a_reader_that_leaves_early_is_no_error(finished: Rae) -> None:
    script = f"{sys.executable} -m rae.pipeline.cli config show {finished.config} | true"
    ran = subprocess.run(["bash", "-c", script], check=False, capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stderr) == (0, "")


def test_the_workspace_can_stand_in_the_environment(finished: Rae, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAE_WORKSPACE", str(finished.workspace))
    assert len(finished("status", "--json").json["artifacts"]) == 6


def test_what_is_shown_can_be_read_back(finished: Rae, tmp_path: Path) -> None:
    shown = tmp_path / "shown.yaml"
    shown.write_text(finished("config", "show", finished.config).succeeded().out)
    assert finished("train-dit", shown, "-w", finished.workspace, "--json").succeeded().json["reused"] is True
    assert json.loads(finished("status", "-w", finished.workspace, "--json").out)["unfinished"] == []


def test_rae_stands_on_the_path() -> None:
    rae = shutil.which("rae", path=str(Path(sys.executable).parent))
    assert rae is not None
    ran = subprocess.run([rae, "--help"], check=False, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0
    assert all(verb in ran.stdout for verb in ("run", "encode", "train-decoder", "train-dit", "sample", "evaluate"))
