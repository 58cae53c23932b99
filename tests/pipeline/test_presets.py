"""The paper's recipes: each is whole, builds the published models, and says what it needs before anything runs."""

import io
import json
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from rae.pipeline import config as configuration
from rae.pipeline.config import PipelineConfig
from rae.stages.models.decoder import ViTDecoder
from rae.stages.models.dit import build_dit
from rae.stages.models.geometry import encoder_geometry, folder_preprocessing, input_size_for
from rae.stages.models.weights import locate_encoder
from rae.stages.train_decoder import describe_decoder
from rae.stages.train_dit import describe_dit, describe_transport
from rae.stages.training.optimizer import learning_rate
from rae.store.errors import ConfigError
from tests.conftest import Rae

DINOV2 = {"model_type": "dinov2_with_registers", "hidden_size": 768, "patch_size": 14, "image_size": 518}
SIGLIP2 = {"model_type": "siglip", "vision_config": {"model_type": "siglip_vision_model", "image_size": 256}}
MAE = {"model_type": "vit_mae", "hidden_size": 768, "patch_size": 16, "image_size": 224}
# Encoder, grid, shift, and millions of numbers in the state dicts of decoder and transformer: constants (position
# tables, time frequencies) included, as the published figures count them. Tables of 32 x 32 tokens are larger.
PRESETS: dict[str, tuple[dict[str, Any], int, float, int, int]] = {
    "imagenet256-dinov2b": (DINOV2, 16, 6.93, 415, 839),
    "imagenet256-dinov2b-s": (DINOV2, 16, 6.93, 415, 197),
    "imagenet512-dinov2b": (DINOV2, 32, 13.86, 416, 840),
    "imagenet256-siglip2b": (SIGLIP2, 16, 6.93, 415, 839),
    "imagenet256-maeb": (MAE, 16, 6.93, 415, 839),
}
PRESET = "imagenet256-dinov2b"


def encoder_folder(folder: Path, config: dict[str, Any]) -> Path:
    """A Hugging Face folder of the real shape, whose weights are not there to be loaded."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    preprocessing = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225], "size": 224}
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing))
    (folder / "model.safetensors").write_bytes(b"")
    return folder


def tar(path: Path, labels: list[int]) -> Path:
    with tarfile.open(path, "w") as file:
        for row, label in enumerate(labels):
            image = io.BytesIO()
            Image.fromarray(np.full((20, 24, 3), row, np.uint8)).save(image, "JPEG")
            for name, data in ((f"{path.stem}{row}.jpg", image.getvalue()), (f"{path.stem}{row}.cls", b"%d" % label)):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                file.addfile(member, io.BytesIO(data))
    return path


def millions(model: nn.Module) -> int:
    return round(sum(tensor.numel() for tensor in model.state_dict().values()) / 1e6)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_builds_the_published_models(name: str, tmp_path: Path) -> None:
    encoder, grid, shift, decoder_millions, dit_millions = PRESETS[name]
    settings = configuration.load(name)
    encode, decoder, dit = settings.encode, settings.train_decoder, settings.train_dit
    files = locate_encoder(str(encoder_folder(tmp_path / "encoder", encoder)))
    input_size = input_size_for(files, encode.image_size, encode.encoder_input_size)
    assert input_size == input_size_for(files, encode.image_size)  # the written size is also the one by default
    token_dim, found_grid = encoder_geometry(files, input_size)
    assert (token_dim, found_grid) == (768, (grid, grid))
    decoder.check_sizes(encode.image_size, found_grid)
    pixels = folder_preprocessing(files)
    seen = SimpleNamespace(token_dim=token_dim, grid=found_grid, mean=pixels.mean, std=pixels.std)
    shape = (token_dim, *found_grid)
    with torch.device("meta"):
        built = (
            ViTDecoder(describe_decoder(decoder, encode.image_size, seen)),
            build_dit(describe_dit(dit, shape, 1000)),
        )
    assert [millions(model) for model in built] == [decoder_millions, dit_millions]
    assert built[0].config.image_size == encode.image_size
    assert built[0].config.patch_size == 16
    assert describe_transport(dit, shape)["time_dist_shift"] == pytest.approx(shift, abs=0.005)
    assert decoder.resize_size == 1.5 * encode.image_size


@pytest.mark.parametrize("name", PRESETS)
def test_learning_rates_are_the_official_ones(name: str) -> None:
    settings = configuration.load(name)
    images, decoder, dit = 1_281_167, settings.train_decoder, settings.train_dit
    assert (decoder.batch_size, dit.batch_size) == (512, 1024)
    per_epoch = images // 512
    steps = (per_epoch // 2, per_epoch, 17 * per_epoch // 2, 16 * per_epoch)
    of_decoder = [learning_rate(decoder, step - 1, per_epoch, 16 * per_epoch) for step in steps]
    assert of_decoder == pytest.approx([1e-4, 2e-4, 1.1e-4, 2e-5], rel=0.001)
    per_epoch = images // 1024
    of_dit = [learning_rate(dit, epoch * per_epoch, per_epoch, 800 * per_epoch) for epoch in (0, 39, 40, 420, 800)]
    assert of_dit == pytest.approx([2e-4, 2e-4, 2e-4, 1.1e-4, 2e-5])


@pytest.mark.parametrize("name", PRESETS)
def test_losses_and_sampling_are_the_official_ones(name: str) -> None:
    settings = configuration.load(name)
    decoder, dit, sample = settings.train_decoder, settings.train_dit, settings.sample
    assert (decoder.noise_tau, decoder.ema_decay, decoder.betas, decoder.weight_decay) == (0.8, 0.9978, (0.9, 0.95), 0)
    assert (decoder.perceptual_loss, decoder.perceptual_weight, decoder.start_step("perceptual", 100)) == (
        "lpips",
        1,
        0,
    )
    assert (decoder.adversarial_loss, decoder.recipe, decoder.ks, decoder.norm_type) == ("dino", "S_8", 9, "bn")
    assert (decoder.disc_weight, decoder.max_d_weight, decoder.disc_loss) == (0.75, 1e4, "hinge")
    assert [decoder.start_step(part, 100) for part in ("disc", "gan")] == [600, 800]
    assert (decoder.using_spec_norm, decoder.augment_prob, decoder.clip_grad) == (True, 1, 0)
    assert (dit.ema_decay, dit.betas, dit.weight_decay, dit.clip_grad) == (0.9995, (0.9, 0.95), 0, 1)
    assert (dit.class_dropout_prob, dit.num_classes, dit.use_qknorm) == (0.1, 1000, False)
    assert (dit.path_type, dit.prediction, dit.loss_weight) == ("Linear", "velocity", None)
    assert (dit.time_dist_type, dit.precision) == ("logit-normal", "float32")
    assert (sample.sampler, sample.num_steps, sample.num_images, sample.weights) == ("euler", 50, 50_000, "ema")


def test_the_presets_share_what_they_do_not_say() -> None:
    first = configuration.load(PRESET)
    small = configuration.load(f"{PRESET}-s")
    assert small.encode == first.encode
    assert small.train_decoder == first.train_decoder  # one decoder and one set of latents serve both
    same = ("hidden_size", "depth", "num_heads")
    assert small.train_dit.model_dump(exclude=set(same)) == first.train_dit.model_dump(exclude=set(same))
    assert small.train_dit.hidden_size == (384, 2048)


# ---- what a person sees ---------------------------------------------------------------------------------------------


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Rae:
    """A machine without models."""
    for variable in ("HF_HOME", "HF_HUB_CACHE", "TORCH_HOME"):
        monkeypatch.setenv(variable, str(tmp_path / "nothing"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "nothing"))
    return Rae(tmp_path / "rae")


@pytest.mark.parametrize("verb", [["plan"], ["run"], ["run", "--dry-run"]])
def test_a_bare_machine_is_told_what_to_do_next(verb: list[str], bare: Rae) -> None:
    ran = bare(verb[0], PRESET, *verb[1:], "-w", bare.workspace)
    next_command = f"next: rae run {PRESET} -w {bare.workspace} -s shards.train=FOLDER"
    ran.refused(3, "names no training images", next_command)
    assert not bare.workspace.exists()


def test_a_plan_lists_all_that_is_missing(bare: Rae) -> None:
    ran = bare("plan", PRESET, "-w", bare.workspace, "-s", "shards.train=nowhere-{0..3}.tar")
    ran.refused(3, "4 of 4 files of nowhere-{0..3}.tar are missing", "holds no images out", "vgg16-397923af.pth")
    ran.refused(3, "the encoder `facebook/dinov2-with-registers-base` is not in the Hugging Face cache")
    # What can be pasted is whole.
    given = f"{PRESET} -s 'shards.train=nowhere-{{0..3}}.tar' -w {bare.workspace}"
    ran.refused(3, f"next: rae encode {given} -s encode.allow_download=true")
    assert ran.out.count("4 of 4") == 1
    assert "as encode" in ran.out


def test_a_plan_says_what_the_latents_take(bare: Rae, tmp_path: Path) -> None:
    encoder = encoder_folder(tmp_path / "dinov2", DINOV2)
    given = {
        "shards.train": tar(tmp_path / "train.tar", [0, 1, 2]),
        "shards.val": tar(tmp_path / "val.tar", [0, 1]),
        "encode.encoder": encoder,
        "train_decoder.perceptual_loss": "none",
    }
    words = [word for key, value in given.items() for word in ("-s", f"{key}={value}")]
    rows = {row["stage"]: row for row in bare("plan", PRESET, "-w", bare.workspace, "--json", *words).json}
    encode = rows["encode"]
    assert (encode["state"], encode["rows"]) == ("run", 3)
    assert encode["bytes"] == 3 * 2 * 768 * 16 * 16 * 2  # images, views, float16
    assert rows["train-dit"]["state"] == "wait"
    told = bare("plan", PRESET, "-w", bare.workspace, *words).out
    assert "3 images x 2 view(s) x 768 x 16 x 16 float16" in " ".join(told.split())


def test_a_plan_that_lacks_nothing_succeeds(bare: Rae) -> None:
    assert not bare("plan", "quickstart", "-w", bare.workspace).succeeded().err


# ---- extends --------------------------------------------------------------------------------------------------------


def write(folder: Path, **files: str) -> PipelineConfig:
    """Writes NAME.yaml for every text and loads the first."""
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)
    return configuration.load(str(folder / f"{next(iter(files))}.yaml"))


def test_a_configuration_extends_another_key_by_key(tmp_path: Path) -> None:
    mine = "extends: base.yaml\nname: mine\ntrain_dit: {lr: 1.0e-3}\nsample:\n"
    base = "extends: quickstart\nname: base\ntrain_dit: {lr: 2.0, steps: 7}\nencode: {image_size: 16}\n"
    settings, quickstart = write(tmp_path, mine=mine, base=base), configuration.load("quickstart")
    assert (settings.name, settings.description, settings.sample) == ("mine", quickstart.description, None)
    assert (settings.train_dit.lr, settings.train_dit.steps) == (1e-3, 7)
    assert settings.train_dit.hidden_size == quickstart.train_dit.hidden_size
    assert settings.encode == quickstart.encode.model_copy(update={"image_size": 16})
    shown = configuration.to_yaml(settings)
    assert "extends" not in shown
    (tmp_path / "shown.yaml").write_text(shown)
    assert configuration.load(str(tmp_path / "shown.yaml")) == settings


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a": "extends: b.yaml\nname: a", "b": "extends: a.yaml\nname: b"}, r"a\.yaml extends .*b\.yaml extends .*a"),
        ({"a": "extends: [quickstart]\nname: a"}, "it names one preset or file"),
        ({"a": "extends: quickstar\nname: a"}, r"no preset or file `quickstar` \(did you mean `quickstart`\?\)"),
        ({"a": "extends: quickstart"}, "`name` is missing"),
        ({"a": "exends: quickstart\nname: a"}, r"unknown key `exends` \(did you mean `extends`\?\)"),
        ({"a": "extends: quickstart\nname: a\ntrain_dit: {zzz: 3}"}, r"unknown key `train_dit\.zzz`"),
    ],
)
def test_what_cannot_be_extended_is_refused(files: dict[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        write(tmp_path, **files)
