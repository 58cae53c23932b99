"""Configurations: presets, overrides, and what is written out."""

import importlib.resources
from pathlib import Path

import pytest
import yaml

from rae.pipeline import config as configuration
from rae.pipeline.config import PipelineConfig
from rae.store.errors import ConfigError


def load(*overrides: str) -> PipelineConfig:
    return configuration.load("quickstart", list(overrides))


def test_every_preset_is_valid_and_named_as_its_file() -> None:
    assert "quickstart" in configuration.presets()
    for name in configuration.presets():
        settings = configuration.load(name)
        assert settings.name == name
        assert settings.description
    experiments = importlib.resources.files("rae.configs").joinpath("experiments")
    for path in Path(str(experiments)).glob("*.yaml"):
        configuration.load(str(path))


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("train_dit.lr=1e-3", "train_dit", "lr", 1e-3),
        ("train_dit.lr=1", "train_dit", "lr", 1.0),
        ("train_dit.steps=1e3", "train_dit", "steps", 1000),
        ("train-dit.batch-size=8", "train_dit", "batch_size", 8),
        ("train_dit.hidden_size=[32, 112]", "train_dit", "hidden_size", (32, 112)),
        ("train_dit.time_dist_shift=2", "train_dit", "time_dist_shift", 2.0),
        ("train_dit.time_dist_shift=auto", "train_dit", "time_dist_shift", "auto"),
        ("encode.horizontal_flip=true", "encode", "horizontal_flip", True),
        ("encode.feature_index=null", "encode", "feature_index", None),
        ("shards.train=data/x=1.tar", "shards", "train", "data/x=1.tar"),
        ("shards.train='1e3'", "shards", "train", "1e3"),
        ("shards.train=nan", "shards", "train", "nan"),
        ("shards.limit=null", "shards", "limit", None),
    ],
)
def test_an_override_is_typed_by_its_key(override: str, section: str, key: str, value: object) -> None:
    found = getattr(getattr(load(override), section), key)
    assert found == value
    assert type(found) is type(value)


def test_later_overrides_win_and_sections_can_be_dropped() -> None:
    assert load("train_dit.lr=1", "train_dit.lr=2").train_dit.lr == 2.0
    assert load("sample=null").sample is None
    assert load("sample={num_images: 3}").sample.num_steps == 50  # the defaults, not the preset's
    assert load("name=mine").name == "mine"


def test_an_override_begins_a_section_that_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\nshards:\n")
    settings = configuration.load(str(path), ["shards.train=digits", "train_dit.steps=5"])
    assert (settings.shards.train, settings.train_dit.steps, settings.encode) == ("digits", 5, None)


def test_what_is_written_out_reads_back_as_the_same(tmp_path: Path) -> None:
    settings = load("train_dit.lr=3e-4", "shards.classes=['0', 'größer']")
    path = tmp_path / "shown.yaml"
    path.write_text(configuration.to_yaml(settings), encoding="utf-8")
    assert configuration.load(str(path)) == settings
    shown = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert shown["train_dit"]["weight_decay"] == 0.0  # a default
    assert shown["shards"]["classes"] == ["0", "größer"]


def test_a_file_without_a_suffix_and_a_preset_of_the_same_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "quickstart").write_text("name: theirs")
    monkeypatch.chdir(tmp_path)
    assert configuration.load("quickstart").name == "theirs"
    (tmp_path / "quickstart").unlink()
    assert configuration.load("quickstart").name == "quickstart"


def test_yaml_makes_no_objects(tmp_path: Path) -> None:
    path = tmp_path / "evil.yaml"
    path.write_text("name: !!python/object/apply:os.system ['touch owned']")
    with pytest.raises(ConfigError, match="is not YAML"):
        configuration.load(str(path))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("encode.imgae_size=3", r"unknown key `encode\.imgae_size` \(did you mean `image_size`\?\)"),
        ("encode.zzz=3", r"unknown key `encode\.zzz`$"),
        ("trian_dit.lr=3", r"unknown key `trian_dit` \(did you mean `train_dit`\?\)"),
        ("train_dit.hidden_size=[a, 5]", r"`train_dit\.hidden_size\.0` is 'a'"),
        (
            "train_dit.time_dist_shift=big",
            r"`train_dit\.time_dist_shift` is 'big': .* number.*, or input should be 'auto'",
        ),
        ("train_dit.num_heads=[3, 4]", "in `train_dit`, `hidden_size` 128 is not a multiple of 4 x `num_heads` 3"),
        ("shards.val=x", "in `shards`, give either `val` or `val_fraction`"),
        ("encode=[]", r"`encode` is \[\]: input should be a section, keys with values"),
        ("train_dit.betas=0.9", r"`train_dit\.betas` is 0.9: input should be a list"),
        ("train_dit.lr=inf", r"`train_dit\.lr` is 'inf': input should be a finite number"),
        ("train_dit.=3", "is not of the form key=value"),
        ("=3", "is not of the form key=value"),
    ],
)
def test_a_fault_is_told_where_it_is(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(override)


def test_closest_guesses_only_what_is_close() -> None:
    assert configuration.closest("hiden_size", ["hidden_size", "depth"]) == " (did you mean `hidden_size`?)"
    assert configuration.closest("zebra", ["hidden_size", "depth"]) == ""
