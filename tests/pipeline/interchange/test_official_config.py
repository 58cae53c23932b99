"""The release's YAML files become configurations of the same meaning, and what is not the same is said."""

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from rae.pipeline import config as configuration
from rae.pipeline.interchange.official_config import convert, to_yaml
from rae.pipeline.interchange.official_keys import GAN, Reading
from rae.store.errors import ConfigError, MissingInput

DINOV2 = "facebook/dinov2-with-registers-base"
STAGE_1 = {
    "target": "stage1.RAE",
    "params": {
        "encoder_cls": "Dinov2withNorm",
        "encoder_config_path": DINOV2,
        "encoder_input_size": 224,
        "encoder_params": {"dinov2_path": DINOV2, "normalize": True},
        "decoder_config_path": "configs/decoder/ViTXL",
        "noise_tau": 0.0,
        "reshape_to_2d": True,
    },
}
PRETRAINED = {"pretrained_decoder_path": "models/ViTXL_n08/model.pt", "normalization_stat_path": "models/stat.pt"}
STAGE_2: dict[str, Any] = {
    "target": "stage2.models.DDT.DiTwDDTHead",
    "params": {
        "input_size": 16,
        "patch_size": 1,
        "in_channels": 768,
        "hidden_size": [384, 2048],
        "depth": [12, 2],
        "num_heads": [6, 16],
        "num_classes": 1000,
        "use_qknorm": False,
        "use_rope": True,
    },
}
SCHEDULER = {"type": "linear", "warmup_epochs": 40, "decay_end_epoch": 800, "base_lr": 2e-4, "final_lr": 2e-5}
TRAINING = {
    "epochs": 1400,
    "global_batch_size": 1024,
    "grad_accum_steps": 1,
    "ema_decay": 0.9995,
    "checkpoint_interval": 10,
    "clip_grad": 1.0,
    "global_seed": 42,
    "optimizer": {"lr": 2e-4, "betas": [0.9, 0.95], "weight_decay": 0.0},
    "scheduler": {**SCHEDULER, "warmup_from_zero": False},
}
SAMPLING = {
    "transport": {"params": {"path_type": "Linear", "prediction": "velocity", "time_dist_type": "logit-normal_0_1"}},
    "sampler": {"mode": "ODE", "params": {"sampling_method": "euler", "num_steps": 50, "atol": "1e-6"}},
    "guidance": {"method": "cfg", "scale": 1.0, "t-min": 0.0, "t-max": 1.0},
    "misc": {"latent_size": [768, 16, 16], "num_classes": 1000, "time_dist_shift_dim": 196608},
}


@pytest.fixture
def converted(tmp_path: Path) -> Any:
    """`converted(SECTIONS..., KEY=VALUE)`: what becomes of a file with these sections, dotted keys changed."""

    def make(sections: dict[str, Any], changes: dict[str, Any] | None = None) -> Reading:
        value = copy.deepcopy(sections)
        for dotted, new in (changes or {}).items():
            *parents, last = dotted.split(".")
            node = value
            for key in parents:
                node = node.setdefault(key, {})
            node[last] = new
        path = tmp_path / "official.yaml"
        path.write_text(yaml.safe_dump(value))
        return convert(path)

    return make


DIT_TRAINING = {"stage_1": STAGE_1, "stage_2": STAGE_2, "training": TRAINING, **SAMPLING}
DECODER_TRAINING = {
    "stage_1": {**STAGE_1, "params": {**STAGE_1["params"], "noise_tau": 0.8}},  # type: ignore[dict-item]
    "training": {
        "epochs": 16,
        "global_batch_size": 512,
        "ema_decay": 0.9978,
        "clip_grad": 0.0,
        "optimizer": {"lr": 2e-4, "betas": [0.9, 0.95], "weight_decay": 0.0},
        "scheduler": {"type": "cosine", "warmup_epochs": 1, "decay_end_epoch": 16, "base_lr": 2e-4, "final_lr": 2e-5}
        | {"warmup_from_zero": True},
    },
}


def same(reading: Reading, preset: str, section: str) -> None:
    """The section means what the preset's does."""
    ours = configuration.PipelineConfig.model_validate(reading.settings)
    paper = configuration.load(preset)
    one, other = (getattr(settings, section).in_recipe() for settings in (ours, paper))
    differing = {key for key in one.keys() | other.keys() if one.get(key) != other.get(key)}
    assert differing <= {"epochs", "seed", "decay_end_epoch"}


def test_training_a_transformer_means_what_the_preset_means(converted: Any) -> None:
    reading = converted(DIT_TRAINING)
    same(reading, "imagenet256-dinov2b-s", "train_dit")
    section = reading.settings["train_dit"]
    assert (section["epochs"], section["seed"], section["decay_start_epoch"]) == (1400, 42, 40)
    assert section["time_dist_shift"] == "auto"
    assert reading.settings["encode"] == {"encoder": DINOV2, "image_size": 256, "encoder_input_size": 224}
    assert reading.settings["sample"] == {"sampler": "euler", "num_steps": 50}
    assert [note for note in reading.notes if note.startswith(("unknown", "corrected"))] == []
    assert any("training.checkpoint_interval" in note for note in reading.notes)


def test_training_a_decoder_means_what_the_preset_means(converted: Any) -> None:
    reading = converted(DECODER_TRAINING, {"gan.loss.perceptual_weight": 1.0, "gan.loss.disc_weight": 0.75})
    section = reading.settings["train_decoder"]
    assert (section["size"], section["resize_size"], section["noise_tau"]) == ("XL", 384, 0.8)
    assert (section["schedule"], section["warmup_epochs"], section["perceptual_weight"]) == ("cosine", 1, 1.0)


def test_every_adversarial_setting_is_kept_or_said(converted: Any) -> None:
    gan = {official: 1 for official, _, _ in GAN} | {"gan.disc.arch.recipe": "S_16", "gan.disc.arch.norm_type": "gn"}
    gan |= {"gan.loss.disc_loss": "hinge", "gan.disc.arch.dino_ckpt_path": "models/dino.pth", "gan.disc.arch.ks": 9}
    gan |= {"gan.disc.arch.using_spec_norm": False}
    reading = converted(DECODER_TRAINING, gan)
    said = {ours for _, ours, _ in GAN if any(f"`train_decoder.{ours}: " in note for note in reading.notes)}
    kept = {ours: reading.settings["train_decoder"].get(ours) for _, ours, _ in GAN if ours not in said}
    assert kept == {ours: gan[official] for official, ours, _ in GAN if ours not in said}
    assert reading.commands == ["rae import official models/dino.pth --out disc.safetensors"]


def test_a_discriminator_trained_otherwise_is_said(converted: Any) -> None:
    same_block = {"gan.disc.optimizer": DECODER_TRAINING["training"]["optimizer"]}
    assert not any("gan.disc" in note for note in converted(DECODER_TRAINING, same_block).notes)
    reading = converted(DECODER_TRAINING, {**same_block, "gan.disc.optimizer.lr": 1e-4})
    assert any("gan.disc.optimizer.lr: 0.0001" in note for note in reading.notes)


def test_the_weights_that_a_file_names_are_commands_to_import_them(converted: Any) -> None:
    sections = {"stage_1": {"params": {**STAGE_1["params"], **PRETRAINED}}, "stage_2": STAGE_2, **SAMPLING}  # type: ignore[dict-item]
    reading = converted(sections, {"stage_2.ckpt": "models/DiTDH-S/stage2_model.pt"})
    dit, decoder = reading.commands
    assert dit.startswith("rae import official models/DiTDH-S/stage2_model.pt --name DiTDH-S --stats models/stat.pt")
    assert decoder == "rae import official models/ViTXL_n08/model.pt --name ViTXL_n08 --stats models/stat.pt"
    sample = {"dit": "DiTDH-S", "decoder": "ViTXL_n08", "sampler": "euler", "num_steps": 50}
    assert reading.settings == {"name": "official", "sample": sample}
    assert not reading.notes


def test_guidance_is_taken_with_either_spelling(converted: Any) -> None:
    for low, high in (("t_min", "t_max"), ("t-min", "t-max")):
        changes = {"guidance": {"method": "cfg", "scale": 1.5, low: 0.1, high: 0.9}}
        sample = converted(DIT_TRAINING, changes).settings["sample"]
        assert (sample["guidance_scale"], sample["guidance_interval"]) == (1.5, [0.1, 0.9])


def test_autoguidance_names_the_guide_and_imports_it(converted: Any) -> None:
    guide = {**STAGE_2, "ckpt": "models/DiTDH-S_ep14/stage2_model.pt"}
    changes = {"guidance": {"method": "autoguidance", "scale": 1.42, "guidance_model": guide}}
    reading = converted(DIT_TRAINING, changes)
    assert reading.settings["sample"]["guide"] == "DiTDH-S_ep14"
    assert reading.commands[0].startswith("rae import official models/DiTDH-S_ep14/stage2_model.pt --name DiTDH-S_ep14")
    assert "guide" not in converted(DIT_TRAINING, changes | {"guidance.scale": 1.0}).settings["sample"]


@pytest.mark.parametrize(
    ("sampler", "sample"),
    [
        ({"params": {"sampling_method": "heun2", "num_steps": 20}}, {"sampler": "heun", "num_steps": 20}),
        (
            {"params": {"sampling_method": "dopri5", "num_steps": 50, "rtol": "1e-4"}},
            {"sampler": "adaptive", "rtol": "1e-4"},
        ),
        ({}, {"sampler": "adaptive"}),
        (
            {"mode": "SDE", "params": {"diffusion_form": "sigma", "last_step": None}},
            {"sampler": "sde", "num_steps": 250, "diffusion_form": "sigma", "last_step": None},
        ),
    ],
)
def test_samplers_have_their_own_names(converted: Any, sampler: dict[str, Any], sample: dict[str, Any]) -> None:
    assert converted(DIT_TRAINING, {"sampler": sampler}).settings["sample"] == sample


def test_the_512_px_file_is_corrected_and_says_so(converted: Any) -> None:
    sections = {**DIT_TRAINING, "training": {"epochs": 1400, "global_batch_size": 1024, "schedule_type": "linear"}}
    older = {"base_lr": 2e-4, "final_lr": 2e-5, "beta": [0.9, 0.95], "wd": 0.0}
    older |= {"decay_start_epoch": 40, "decay_end_epoch": 800, "log_every": 100, "ckpt_every": 5000}
    changes = {f"training.{key}": value for key, value in older.items()} | {"stage_1.params.encoder_input_size": 448}
    reading = converted(sections, changes)
    corrected = [note for note in reading.notes if note.startswith("corrected")]
    assert len(corrected) == 2
    assert "16 x 16" in corrected[0]
    assert "32 x 32" in corrected[0]
    assert "scheduler" in corrected[1]
    assert reading.settings["encode"]["image_size"] == 512
    section = reading.settings["train_dit"]
    assert (section["time_dist_shift"], section["schedule"], section["decay_start_epoch"]) == ("auto", "linear", 40)
    assert section["checkpoint_every"] == 5000


def test_unknown_keys_are_named_with_the_closest_match(converted: Any) -> None:
    reading = converted(DIT_TRAINING, {"training.ema_deacy": 0.9, "extra.thing": 1})
    assert "unknown and left out: `training.ema_deacy: 0.9` (did you mean `training.ema_decay`?)" in reading.notes
    assert any("`extra.thing: 1`" in note for note in reading.notes)
    with pytest.raises(ConfigError, match=r"unknown key `mlp_ration` \(did you mean `mlp_ratio`"):
        converted(DIT_TRAINING, {"stage_2.params.mlp_ration": 4.0})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"training.grad_accum_steps": 4}, "grad_accum_steps: 4"),
        ({"stage_1.params.reshape_to_2d": False}, "reshape_to_2d: False"),
        ({"stage_1.params.noise_tau": 0.5}, "noise_tau: 0.5"),
        ({"stage_2.params.patch_size": 2}, "patch_size: 2"),
    ],
)
def test_what_would_not_mean_the_same_is_said(converted: Any, change: dict[str, Any], words: str) -> None:
    assert any(note.startswith("no counterpart") and words in note for note in converted(DIT_TRAINING, change).notes)


def test_a_shift_of_its_own_is_kept_as_a_number(converted: Any) -> None:
    section = converted(DIT_TRAINING, {"misc.time_dist_shift_dim": 16384}).settings["train_dit"]
    assert section["time_dist_shift"] == 2.0


def test_values_are_checked_like_any_configuration(converted: Any) -> None:
    with pytest.raises(ConfigError, match=r"train_dit.ema_decay"):
        converted(DIT_TRAINING, {"training.ema_decay": 2.0})
    with pytest.raises(ConfigError, match=r"use_swiglu"):
        converted(DIT_TRAINING, {"stage_2.params.use_swiglu": False})
    with pytest.raises(ConfigError, match=r"os.system"):
        converted(DIT_TRAINING, {"stage_2.target": "os.system"})


@pytest.mark.parametrize(
    "key",
    [
        "stage_1.params.encoder_input_size",
        "stage_2.params.hidden_size",
        "stage_2.params.num_classes",
        "misc.time_dist_shift_dim",
        "misc.latent_size",
        "guidance.scale",
        "guidance.t_min",
        "training.epochs",
        "training.scheduler.type",
        "sampler.params.num_steps",
        "sampler.params.sampling_method",
        "sampler.mode",
    ],
)
def test_a_value_that_makes_no_sense_is_named(converted: Any, key: str) -> None:
    with pytest.raises(ConfigError, match=r"nonsense"):
        converted(DIT_TRAINING, {key: ["nonsense", "nonsense"]})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sampler.params.sampling_method": "rk4"}, "`sampler.params.sampling_method` is 'rk4'; .* dopri5"),
        ({"sampler": {"mode": "SDE", "params": {"sampling_method": "euler2"}}}, "did you mean `euler`"),
        ({"guidance.method": "autoguidence", "guidance.scale": 1.5}, "did you mean `autoguidance`"),
    ],
)
def test_a_method_without_counterpart_is_refused(converted: Any, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        converted(DIT_TRAINING, changes)


def test_an_encoder_in_a_folder_says_its_patches_itself(converted: Any, tmp_path: Path) -> None:
    for text, patch_size in (('{"patch_size": 8}', 8), ('{"vision_config": {"patch_size": 32}}', 32), ("{}", 16)):
        (tmp_path / "config.json").write_text(text)
        encoder = {"stage_1.params.encoder_params": {"dinov2_path": str(tmp_path)}}
        section = converted(DIT_TRAINING, encoder).settings["encode"]
        assert section["image_size"] == 224 // patch_size * 16


def test_what_the_official_classes_are_built_with_by_default_is_written_out(converted: Any) -> None:
    for target, sizes in (
        ("stage2.models.DDT.DiTwDDTHead", ([1152, 2048], [28, 2], [16, 16])),
        ("stage2.models.lightningDiT.LightningDiT", ([1152], [28], [16])),
    ):
        section = converted({**DIT_TRAINING, "stage_2": {"target": target}}).settings["train_dit"]
        assert (section["hidden_size"], section["depth"], section["num_heads"]) == sizes
        assert section["num_classes"] == 1000
    section = converted(DIT_TRAINING, {"stage_2.params.num_heads": 8}).settings["train_dit"]
    assert section["num_heads"] == [8, 8]


def test_what_is_no_official_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    with pytest.raises(MissingInput):
        convert(path)
    for text, words in (("name: x", "stage_1"), ("[", "not YAML"), ("- 1", "mapping")):
        path.write_text(text)
        with pytest.raises(ConfigError, match=words):
            convert(path)


def test_the_command_writes_a_configuration_that_loads(rae: Any, tmp_path: Path, converted: Any) -> None:
    reading = converted(DIT_TRAINING)
    out = tmp_path / "mine.yaml"
    printed = rae("import", "official-config", tmp_path / "official.yaml").succeeded().out
    assert printed == to_yaml(reading)
    assert printed.startswith("# ")
    told = rae("import", "official-config", tmp_path / "official.yaml", "-o", out).succeeded().out
    assert out.read_text() == printed
    assert all(note in told for note in reading.notes)
    rae("config", "validate", out).succeeded()
    out.write_text("mine")
    rae("import", "official-config", tmp_path / "official.yaml", "-o", out).refused(4, "is there already")
