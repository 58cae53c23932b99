"""Checkpoints of the release are recognised by their tensors, sized by their shapes, and refused by name."""

import contextlib
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from rae.stages.models.decoder import DecoderConfig, ViTDecoder
from rae.stages.models.discriminator import DinoDiscriminator
from rae.stages.models.dit import DiTConfig, build_dit
from rae.stages.models.official import (
    Checkpoint,
    check_backbone,
    infer_decoder,
    infer_dit,
    read_checkpoint,
    read_stats,
)
from rae.stages.models.official_encoder import RELEASED_ENCODERS, describe_encoder
from rae.store.errors import ConfigError, CorruptData, MissingInput, StaleInput

PARITY = Path(__file__).parents[2] / "parity"
RELEASED = json.loads((PARITY / "official_state_dicts.json").read_text())
DINOV2 = "facebook/dinov2-with-registers-base"
ENCODER = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def on_meta(shapes: dict[str, list[int]]) -> Checkpoint:
    kind: Any = "decoder" if "decoder_embed.weight" in shapes else "dit"
    state = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    return Checkpoint(Path("released.pt"), kind, state, "ema")


def decoder_state(hidden_size: int = 16, num_heads: int = 2) -> dict[str, Tensor]:
    config = DecoderConfig(
        token_dim=8,
        grid=2,
        hidden_size=hidden_size,
        depth=1,
        num_heads=num_heads,
        intermediate_size=24,
        patch_size=4,
        image_mean=(0.5, 0.5, 0.5),
        image_std=(0.5, 0.5, 0.5),
    )
    return ViTDecoder(config).state_dict()


def dit_state(**changes: Any) -> dict[str, Tensor]:
    sizes: dict[str, Any] = {"hidden_size": (16, 32), "depth": (2, 1), "num_heads": (2, 4)}
    sizes |= {"model": "DiT-DH", "in_channels": 8, "input_size": 2, "num_classes": 3}
    return build_dit(DiTConfig(**sizes | changes)).state_dict()


@pytest.fixture
def saved(tmp_path: Path) -> Any:
    def save(value: Any, name: str = "model.pt") -> Path:
        path = tmp_path / name
        save_file(value, path) if path.suffix == ".safetensors" else torch.save(value, path)
        return path

    return save


@pytest.mark.parametrize(
    ("name", "sizes"),
    [("decoder-ViTB", (768, 12, 12)), ("decoder-ViTL", (1024, 24, 16)), ("decoder-ViTXL", (1152, 28, 16))],
)
def test_the_released_decoders_are_sized_by_their_shapes(name: str, sizes: tuple[int, int, int]) -> None:
    config = infer_decoder(on_meta(RELEASED[name]), ENCODER)
    assert (config.hidden_size, config.depth, config.num_heads) == sizes
    assert (config.token_dim, config.grid, config.image_size, config.layer_norm_eps) == (768, 16, 256, 1e-12)


@pytest.mark.parametrize(
    ("name", "body"), [("DiTDH-S", (384, 12, 6)), ("DiTDH-XL", (1152, 28, 16))], ids=["DiTDH-S", "DiTDH-XL"]
)
def test_the_released_transformers_are_sized_by_their_shapes(name: str, body: tuple[int, int, int]) -> None:
    config = infer_dit(on_meta(RELEASED[name]))
    assert (config.hidden_size, config.depth, config.num_heads) == tuple(zip(body, (2048, 2, 16), strict=True))
    assert (config.model, config.in_channels, config.input_size, config.patch_size) == ("DiT-DH", 768, 16, 1)
    assert (config.num_classes, config.mlp_ratio, config.use_qknorm) == (1000, 4.0, False)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mlp_ratio": 2.5, "use_qknorm": True, "num_classes": 0},
        {"input_size": 4, "patch_size": 2},
        {"model": "LightningDiT", "hidden_size": (16,), "depth": (2,), "num_heads": (4,)},
    ],
)
def test_a_transformer_is_rebuilt_from_its_shapes(changes: dict[str, Any], saved: Any) -> None:
    state = dit_state(**changes)
    checkpoint = read_checkpoint(saved(state))
    assert checkpoint.kind == "dit"
    config = infer_dit(checkpoint)
    for key, value in changes.items():
        assert getattr(config, key) == value
    build_dit(config).load_state_dict(checkpoint.state)


def test_a_body_as_wide_as_the_head_needs_to_be_told(saved: Any) -> None:
    changes = {"hidden_size": (16, 16), "depth": (2, 1), "num_heads": (2, 2)}
    checkpoint = read_checkpoint(saved(dit_state(**changes)))
    with pytest.raises(ConfigError, match=r"both 16 wide.*--config"):
        infer_dit(checkpoint)
    given = DiTConfig(model="DiT-DH", in_channels=8, input_size=2, num_classes=3, **changes)  # type: ignore[arg-type]
    assert infer_dit(checkpoint, given) == given
    wrong = DiTConfig(model="DiT-DH", in_channels=8, input_size=2, num_classes=4, **changes)  # type: ignore[arg-type]
    with pytest.raises(CorruptData, match=r"y_embedder.embedding_table.weight` as \[4, 16\] where \[5, 16\]"):
        infer_dit(checkpoint, wrong)


def test_a_decoder_of_a_free_width_needs_its_heads(saved: Any) -> None:
    checkpoint = read_checkpoint(saved(decoder_state()))
    with pytest.raises(ConfigError, match=r"16 wide.*--config"):
        infer_decoder(checkpoint, ENCODER)
    assert infer_decoder(checkpoint, ENCODER, num_heads=2).num_heads == 2


def test_of_a_training_checkpoint_the_ema_is_taken_unless_asked(saved: Any) -> None:
    state = dit_state()
    sets = {
        name: {key: value * 0 + number for key, value in state.items()} for number, name in enumerate(("model", "ema"))
    }
    path = saved({"step": 5, "epoch": 1, **sets, "optimizer": {"state": {}}, "scheduler": None})
    for asked, number in ((None, 1.0), ("ema", 1.0), ("model", 0.0)):
        checkpoint = read_checkpoint(path, asked)  # type: ignore[arg-type]
        assert {value.unique().item() for value in checkpoint.state.values()} == {number}
    with pytest.raises(ConfigError, match=r"bare state dict.*--weights model"):
        read_checkpoint(saved(dit_state(), "bare.pt"), "model")


def test_a_whole_autoencoder_gives_its_decoder(saved: Any) -> None:
    state = {f"decoder.{key}": value for key, value in decoder_state().items()} | {"encoder.w": torch.ones(3)}
    checkpoint = read_checkpoint(saved({"model": state, "ema": state}))
    assert checkpoint.kind == "decoder"
    assert checkpoint.state.keys() == decoder_state().keys()


@pytest.mark.parametrize("legacy", [False, True])
def test_every_format_gives_the_same_tensors_in_float32(legacy: bool, tmp_path: Path, saved: Any) -> None:
    state = {key: value.half() for key, value in decoder_state().items()}
    torch.save(state, tmp_path / "legacy.pth", _use_new_zipfile_serialization=not legacy)
    paths = [saved(state), saved(state, "model.safetensors"), tmp_path / "legacy.pth"]
    for path in paths:
        for key, value in read_checkpoint(path).state.items():
            assert torch.equal(value, state[key].float()), (path, key)
            assert value.dtype == torch.float32


class Trap:
    """A pickle that runs code when it is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("sprung"),)


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_checkpoint_is_refused_in_one_sentence(
    legacy: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"decoder_embed.weight": Trap()}, "model.pt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CorruptData, match="would run code") as error:
        read_checkpoint(Path("model.pt"))
    assert "\n" not in error.value.message
    assert not Path("sprung").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "model.pt"),
        (b"not a checkpoint", "no checkpoint"),
        (pickle.dumps({"a": 1}, protocol=2), "model.pt"),
        ({"step": torch.ones(1)}, "holds no model of the release.*`step`"),
        ({"decoder_embed.weight": "text"}, "other things than tensors"),
        ([torch.ones(1)], "no tensors by name"),
        ({"decoder_norm.weight": torch.ones(3)}, "lacks `decoder_embed.weight`"),
        ({"decoder_norm.weight": torch.ones(3, dtype=torch.int64)}, r"`decoder_norm.weight` as torch\.int64"),
        (
            {"decoder_norm.weight": torch.tensor([1, torch.nan])},
            "`decoder_norm.weight` with values that are not finite",
        ),
        ({"decoder_embed.weight": torch.ones(3)}, r"`decoder_embed.weight` as \[3\]"),
    ],
)
def test_what_is_no_checkpoint_is_refused(content: Any, words: str, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(CorruptData, match=words):
        infer_decoder(read_checkpoint(path), ENCODER, 2)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_damaged_checkpoint_is_refused_wherever_the_damage_lies(legacy: bool, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save({"decoder_embed.weight": torch.ones(3)}, path, _use_new_zipfile_serialization=not legacy)
    whole = path.read_bytes()
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place])
        with pytest.raises(CorruptData):
            read_checkpoint(path)
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        with contextlib.suppress(CorruptData):  # a flipped byte of a value is another value
            read_checkpoint(path)


def test_a_large_checkpoint_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save({"decoder_embed.weight": torch.ones(100_000)}, path)
    path.write_bytes(path.read_bytes()[:5000])  # torch looks for the archive's end before its beginning
    with pytest.raises(CorruptData, match=r"model\.pt"):
        read_checkpoint(path)


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_names_lose_what_training_put_before_them(wrapper: str, saved: Any) -> None:
    state = dit_state()
    checkpoint = read_checkpoint(saved({"model": {f"{wrapper}{name}": value for name, value in state.items()}}))
    assert checkpoint.kind == "dit"
    assert checkpoint.state.keys() == state.keys()
    assert infer_dit(checkpoint) == infer_dit(read_checkpoint(saved(state)))


def test_missing_unknown_and_misshapen_tensors_are_named(saved: Any) -> None:
    state = decoder_state()
    state["decoder_norms.weight"] = state.pop("decoder_norm.weight")
    del state["trainable_cls_token"]
    state["decoder_embed.bias"] = torch.ones(17)
    with pytest.raises(CorruptData) as error:
        infer_decoder(read_checkpoint(saved(state)), ENCODER, 2)
    for words in (
        "has the unknown `decoder_norms.weight` (did you mean `decoder_norm.weight`?)",
        "holds `decoder_embed.bias` as [17] where [16] is needed",
        "lacks `decoder_norm.weight`",
        "lacks `trainable_cls_token`",
    ):
        assert words in error.value.message


def test_statistics_are_checked(saved: Any) -> None:
    shape, var = (8, 2, 2), torch.rand(8, 2, 2)
    mean, read = read_stats(saved({"var": var}), shape)
    assert torch.equal(read, var)
    assert torch.equal(mean, torch.zeros(shape))
    assert torch.equal(read_stats(saved({"mean": var, "var": var}), shape)[0], var)
    for value, words in (
        ({"mean": var}, "`var` is not there"),
        ({"mean": torch.ones(8), "var": var}, r"`mean` is \[8\] where \[8, 2, 2\]"),
        ({"var": -var - 1}, "no variance"),
        ({"var": var * float("nan")}, "no variance"),
        ({"var": var, "std": var}, "`std`"),
    ):
        with pytest.raises(CorruptData, match=words):
            read_stats(saved(value), shape)


def test_the_discriminators_backbone_is_known_by_its_size(saved: Any) -> None:
    with torch.device("meta"):
        shapes = DinoDiscriminator("S_16").backbone.state_dict()
    state = {name: torch.zeros(tensor.shape) for name, tensor in shapes.items()}
    checkpoint = read_checkpoint(saved(state, "dino.safetensors"))
    assert (checkpoint.kind, check_backbone(checkpoint)) == ("backbone", "S_16")
    with pytest.raises(CorruptData, match=r"patches of 8 pixels.*S_8"):
        check_backbone(read_checkpoint(saved({"patch_embed.proj.weight": torch.ones(16, 3, 8, 8)})))
    del state["norm.bias"]
    with pytest.raises(CorruptData, match=r"lacks `norm.bias`"):
        check_backbone(read_checkpoint(saved(state, "less.safetensors")))


def test_an_encoder_at_hand_is_described_with_its_digest() -> None:
    about = describe_encoder(str(PARITY / "encoder_dinov2"), token_dim=32, grid=4)
    assert (about["kind"], about["input_size"], about["grid"]) == ("dinov2", 56, [4, 4])
    assert len(about["digest"]) == 64
    with pytest.raises(StaleInput, match="are 32 wide, and the model takes 768"):
        describe_encoder(str(PARITY / "encoder_dinov2"), token_dim=768, grid=4)


@pytest.mark.usefixtures("_no_cache")
def test_a_released_encoder_that_is_not_at_hand_is_taken_at_its_word() -> None:
    about = {name: describe_encoder(name, 768, 32) for name in RELEASED_ENCODERS}
    assert {one["digest"] for one in about.values()} == {None}
    assert [one["input_size"] for one in about.values()] == [448, 512, 512]  # at 512 px
    with pytest.raises(MissingInput, match="dinov2-large"):
        describe_encoder("facebook/dinov2-large", 1024, 16)
    with pytest.raises(ConfigError, match="no encoder of the release"):
        describe_encoder("efficientnet-lite0", 112, 4)


@pytest.fixture
def _no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
