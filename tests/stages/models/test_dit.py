"""The transformers' contracts; that their numbers are the official ones is tested in tests/parity."""

import json
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from rae.stages.models.dit import DiTConfig, build_dit
from rae.stages.models.layers import PatchEmbed, RMSNorm, RotaryPositions, unpatchify
from rae.stages.models.sizes import DIT_SIZES
from rae.store.errors import ConfigError

HEAD = DiTConfig(
    model="DiT-DH",
    in_channels=6,
    input_size=4,
    hidden_size=(16, 32),
    depth=(2, 1),
    num_heads=(2, 4),
    num_classes=5,
)
PLAIN = replace(HEAD, model="LightningDiT", hidden_size=(32,), depth=(2,), num_heads=(4,))


def awake(config: DiTConfig) -> nn.Module:
    """A model whose every weight matters: a fresh one is the zero function."""
    torch.manual_seed(0)
    model = build_dit(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def inputs(batch: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 6, 4, 4, generator=generator)
    return x, torch.rand(batch, generator=generator), torch.arange(batch) + 3


@pytest.mark.parametrize(
    ("model", "size", "millions"),
    [
        *zip(["DiT-DH"] * 4, DIT_SIZES["DiT-DH"], [197, 294, 622, 839], strict=True),
        *zip(["LightningDiT"] * 4, DIT_SIZES["LightningDiT"], [34, 132, 460, 677], strict=True),
    ],
)
def test_sizes_by_name(model: str, size: str, millions: int) -> None:
    config = DiTConfig(model=model, in_channels=768, input_size=16, num_classes=1000, **DIT_SIZES[model][size])
    with torch.device("meta"):
        built = build_dit(config)
    # The published figures (DiTDH-S 197, XL 839) count what is stored, constants included.
    assert round(sum(tensor.numel() for tensor in built.state_dict().values()) / 1e6) == millions


@pytest.mark.parametrize("config", [HEAD, PLAIN])
def test_a_fresh_model_predicts_zero(config: DiTConfig) -> None:
    assert build_dit(config)(*inputs()).abs().max() == 0


@pytest.mark.parametrize("config", [HEAD, PLAIN])
def test_training_mode_changes_nothing(config: DiTConfig) -> None:
    model, arguments = awake(config), inputs()
    first = model.train()(*arguments)
    assert torch.equal(first, model(*arguments))
    assert torch.equal(first, model.eval()(*arguments))
    assert first.std() > 0.01


@pytest.mark.parametrize("config", [HEAD, PLAIN])
@pytest.mark.parametrize("argument", [0, 1, 2])
def test_a_sample_depends_on_its_own_inputs_and_on_each_of_them(config: DiTConfig, argument: int) -> None:
    model, arguments = awake(config), inputs()
    changed = list(arguments)
    changed[argument] = arguments[argument].clone()
    changed[argument][0] = 0 if argument == 2 else arguments[argument][0] + 0.3
    moved = (model(*changed) - model(*arguments)).abs().amax((1, 2, 3))
    assert moved[0] > 1e-4
    assert moved[1:].max() == 0


@pytest.mark.parametrize("config", [HEAD, PLAIN])
def test_constants_are_saved_but_not_trained(config: DiTConfig) -> None:
    model = build_dit(config)
    trained = {name for name, _ in model.named_parameters()}
    constant = {name for name in model.state_dict() if "pos_embed" in name or "rope" in name or name.endswith(".W")}
    assert len(constant) >= 4
    assert trained.isdisjoint(constant)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("config", [HEAD, PLAIN])
def test_checkpointed_gradients_are_the_gradients(config: DiTConfig) -> None:
    model, arguments = awake(config), inputs()
    gradients = []
    for model.grad_checkpoint in (False, True):
        model.zero_grad()
        model(*arguments).square().mean().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


@pytest.mark.parametrize("config", [HEAD, PLAIN])
def test_bf16_autocast_keeps_the_residual_stream_in_float32(config: DiTConfig) -> None:
    model, arguments = awake(replace(config, use_qknorm=True)), inputs()
    streams = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, given, out: streams.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(*arguments)
    assert streams == [torch.float32] * len(model.blocks)
    exact = model(*arguments)
    assert (rough - exact).norm() < 0.03 * exact.norm()


@pytest.mark.parametrize("config", [HEAD, PLAIN])
def test_the_whole_model_is_one_graph(config: DiTConfig) -> None:
    model, arguments = awake(config), inputs()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*arguments), model(*arguments))


@pytest.mark.parametrize("config", [HEAD, PLAIN])
def test_an_unconditional_model_takes_label_zero(config: DiTConfig) -> None:
    x, t, _ = inputs()
    config = replace(config, num_classes=0, class_dropout_prob=0.0)
    assert config.has_null_label
    assert awake(config)(x, t, torch.zeros(3, dtype=torch.int64)).shape == x.shape


def test_the_label_table_has_a_last_row_for_no_label_where_labels_are_dropped() -> None:
    assert build_dit(HEAD).state_dict()["y_embedder.embedding_table.weight"].shape[0] == 6
    always = replace(HEAD, class_dropout_prob=0.0)
    assert build_dit(always).state_dict()["y_embedder.embedding_table.weight"].shape[0] == 5


def test_body_and_head_of_one_width_need_no_projection() -> None:
    model = build_dit(replace(HEAD, hidden_size=(32, 32), num_heads=(4, 4)))
    assert not [key for key in model.state_dict() if key.startswith("s_projector")]


@pytest.mark.parametrize("config", [HEAD, PLAIN])
def test_patches_of_two(config: DiTConfig) -> None:
    config = replace(config, patch_size=2)
    assert config.grid == 2
    assert config.token_width == 24
    assert awake(config)(*inputs()).shape == (3, 6, 4, 4)


def test_patches_are_embedded_as_a_convolution_does() -> None:
    embed = PatchEmbed(6, 2, 8)
    x = torch.randn(2, 6, 4, 4)
    torch.testing.assert_close(embed(x), embed.proj(x).flatten(2).transpose(1, 2))


def test_unpatchify_lays_patches_out_by_rows_with_channels_innermost() -> None:
    grid, size, channels = 2, 2, 3
    image = torch.arange(channels * 16.0).view(1, channels, 4, 4)
    tokens = torch.stack(
        [
            image[0, :, row * size : (row + 1) * size, column * size : (column + 1) * size].permute(1, 2, 0).flatten()
            for row in range(grid)
            for column in range(grid)
        ]
    )
    assert torch.equal(unpatchify(tokens[None], grid, size), image)


def test_rotary_products_depend_on_the_offset_alone() -> None:
    positions = RotaryPositions(8, 4)
    query, key = torch.randn(2, 8)
    turned = [positions(vector.expand(1, 1, 16, 8))[0, 0].view(4, 4, 8) for vector in (query, key)]
    product = torch.einsum("ijk,mnk->ijmn", *turned)
    torch.testing.assert_close(product[0, 1, 2, 2], product[1, 2, 3, 3])
    torch.testing.assert_close(product[3, 0, 1, 3], product[2, 0, 0, 3])
    assert not torch.isclose(product[0, 0, 0, 1], product[0, 0, 1, 0])


def test_rms_norm_is_computed_in_float32() -> None:
    norm = RMSNorm(64)
    x = torch.full((1, 64), 300.0, dtype=torch.float16)  # 300^2 overflows float16
    assert norm(x).dtype == torch.float16
    torch.testing.assert_close(norm(x), torch.ones_like(x))


@pytest.mark.parametrize("config", [HEAD, PLAIN])
def test_a_configuration_survives_json(config: DiTConfig) -> None:
    assert DiTConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"hiden_size": [16, 32]}, "did you mean `hidden_size`"),
        ({"model": "DiT"}, "`model`"),
        ({"depth": [2]}, "`depth` needs 2"),
        ({"num_heads": [3, 4]}, "not a multiple"),
        ({"patch_size": 3}, "`patch_size`"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(change: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        DiTConfig.from_dict(HEAD.to_dict() | change)


def test_a_missing_size_is_named() -> None:
    values = HEAD.to_dict()
    del values["num_classes"]
    with pytest.raises(ConfigError, match="lacks `num_classes`"):
        DiTConfig.from_dict(values)
