"""The shapes that transformers, transport and samplers promise, as signatures that are checked (see shapes.py)."""

import pytest
import torch
from jaxtyping import Float32, TypeCheckError
from torch import Tensor, nn

from rae.stages.models import dit, layers, samplers, sde, transport
from rae.stages.models.transport import Coefficients, Transport, create_transport
from tests.stages.models.shapes import BATCHES, Labels, Latents, Times, checked, draw, every_size, tiny_dit

# ---- transformers ---------------------------------------------------------------------------------------------------


@checked
def predict(model: nn.Module, x: Latents, t: Times, y: Labels) -> Latents:
    return model(x, t, y)


@checked
def position_table(width: int, grid: int) -> Float32[Tensor, "1 {grid}**2 {width}"]:
    return layers.sincos_positions(width, grid)


@checked
def patchify(embed: layers.PatchEmbed, x: Latents, P: int, D: int) -> Float32[Tensor, "B (H//{P})**2 {D}"]:
    return embed(x)


@checked
def unpatchify(
    tokens: Float32[Tensor, "B {grid}**2 {P}**2*{C}"], grid: int, P: int, C: int
) -> Float32[Tensor, "B {C} {grid}*{P} {grid}*{P}"]:
    return layers.unpatchify(tokens, grid, P)


@checked
def turn(positions: layers.RotaryPositions, x: Float32[Tensor, "B heads N K"]) -> Float32[Tensor, "B heads N K"]:
    return positions(x)


@checked
def attend(
    attention: layers.Attention, x: Float32[Tensor, "B N D"], positions: layers.RotaryPositions
) -> Float32[Tensor, "B N D"]:
    return attention(x, positions)


@checked
def modulated(
    block: layers.Block,
    x: Float32[Tensor, "B N D"],
    condition: Float32[Tensor, "B #N D"],
    positions: layers.RotaryPositions,
) -> Float32[Tensor, "B N D"]:
    return dit.run_blocks([block, block], block(x, condition, positions), condition, positions, False)


@checked
def finish(
    layer: layers.FinalLayer, x: Float32[Tensor, "B N D"], condition: Float32[Tensor, "B #N D"], numbers: int
) -> Float32[Tensor, "B N {numbers}"]:
    return layer(x, condition)


@checked
def same_shape(layer: layers.RMSNorm | layers.SwiGLU, x: Float32[Tensor, "*shape D"]) -> Float32[Tensor, "*shape D"]:
    return layer(x)


@checked
def embed(layer: layers.TimeEmbed | layers.LabelEmbed, x: Times | Labels, D: int) -> Float32[Tensor, "B {D}"]:
    return layer(x)


@every_size
@pytest.mark.parametrize("model", ["DiT-DH", "LightningDiT"])
@pytest.mark.parametrize("patch", [1, 2])
def test_transformers(model: str, batch: int, grid: int, patch: int) -> None:
    predict(tiny_dit(model, grid, patch), draw(batch, 4, grid, grid), draw(batch), torch.arange(batch) + 3)


@every_size
def test_layers(batch: int, grid: int) -> None:
    positions, tokens = layers.RotaryPositions(4, grid), draw(batch, grid**2, 8)
    turn(positions, draw(batch, 2, grid**2, 4))
    position_table(8, grid)
    for use_qknorm in (False, True):
        attend(layers.Attention(8, 2, use_qknorm), tokens, positions)
    for condition in (draw(batch, 1, 8), tokens):
        modulated(layers.Block(8, 2, 4.0, False), tokens, condition, positions)
        finish(layers.FinalLayer(8, 12), tokens, condition, 12)
    for layer in (layers.RMSNorm(8), layers.SwiGLU(8, 5)):
        same_shape(layer, tokens)
    for patch in (1, 2):
        patchify(layers.PatchEmbed(3, patch, 8), draw(batch, 3, grid, grid), patch, 8)
        unpatchify(draw(batch, grid**2, patch**2 * 3), grid, patch, 3)
    embed(layers.TimeEmbed(8), draw(batch), 8)
    embed(layers.LabelEmbed(6, 8), torch.arange(batch), 8)


# ---- transport and samplers -----------------------------------------------------------------------------------------


@checked
def coefficients(law: Transport, t: Times, like: Latents) -> tuple[Float32[Tensor, "B 1 1 1"], ...]:
    return tuple(law.coefficients(t, like))


@checked
def path(law: Transport, x1: Latents, noise: Latents, t: Times) -> tuple[Latents, Latents]:
    return law.path(x1, noise, t)


@checked
def elementwise(
    law: Transport, t: Float32[Tensor, "*shape"], normal: Float32[Tensor, "*shape"]
) -> tuple[Float32[Tensor, "*shape"], ...]:
    drawn = law.sample_times(t), law.sample_times(t, normal)
    return *drawn, law.weight(t), transport.shift_time(t, 2.0), *law.coefficients(t), law.coefficients(t).determinant


@checked
def a_path(function: object, t: Float32[Tensor, "*shape"]) -> tuple[Float32[Tensor, "*shape"], ...]:
    assert callable(function)
    assert isinstance(function(t), Coefficients)
    return tuple(function(t))


@checked
def sampling_times(law: Transport, num_steps: int) -> Float32[Tensor, " {num_steps}"]:
    return law.sampling_times(num_steps)


@checked
def training_losses(law: Transport, model: object, x1: Latents, y: Labels, t: Times | None) -> Float32[Tensor, " B"]:
    return law.training_losses(model, x1, y, t=t)


@checked
def meaning(law: Transport, output: Latents, x: Latents, t: Times) -> tuple[Latents, Latents]:
    return law.velocity(output, x, t), law.score(output, x, t)


@checked
def guided(model: object, x: Latents, time: Float32[Tensor, ""], y: Labels, guide: object) -> Latents:
    return samplers.guided(model, x, time, y, 1.5, (0.1, 0.9), 5, guide)


@checked
def sample_ode(model: object, noise: Latents, y: Labels, law: Transport, sampler: str) -> Latents:
    return samplers.sample_ode(model, noise, y, transport=law, sampler=sampler, num_steps=3, null_label=5)


@checked
def sample_sde(model: object, noise: Latents, y: Labels, law: Transport, last_step: str | None) -> Latents:
    given = {"transport": law, "num_steps": 3, "last_step": last_step, "null_label": 5}
    return sde.sample_sde(model, noise, y, step_noise=lambda step: torch.ones_like(noise), **given)


@checked
def sde_times(law: Transport, num_steps: int, last_step: str | None) -> Float32[Tensor, " {num_steps}"]:
    return sde.sde_times(law, num_steps, last_step, 0.04)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("path_type", ["Linear", "GVP", "VP"])
@pytest.mark.parametrize("prediction", ["velocity", "noise", "score", "data"])
def test_transport_and_samplers(path_type: str, prediction: str, batch: int) -> None:
    law = create_transport(path_type, prediction, time_dist_type="logit-normal", time_dist_shift=2.0)
    model, x, t, y = tiny_dit("DiT-DH", 2), draw(batch, 4, 2, 2), 0.1 + 0.8 * draw(batch), torch.arange(batch)
    coefficients(law, t, x)
    path(law, x, x, t)
    elementwise(law, t, t)
    elementwise(law, 0.1 + 0.8 * draw(batch, 2, 3), draw(batch, 2, 3))
    a_path(transport.PATHS[path_type], t)
    sampling_times(law, 7)
    meaning(law, x, x, t)
    for times in (t, None):
        training_losses(law, model, x, y, times)
    for guide in (model, None):
        guided(model, x, torch.tensor(0.5), y, guide)
    for sampler in ("euler", "heun", "adaptive"):
        sample_ode(model, x, y, law, sampler)
    for last_step in ("Mean", "Tweedie", "Euler", None):
        sde_times(law, 5, last_step)
        sample_sde(model, x, y, law, last_step)


# ---- the checks can fail --------------------------------------------------------------------------------------------


def test_a_wrong_shape_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    law, model, x, labels = create_transport(), tiny_dit("DiT-DH", 2), draw(3, 4, 2, 2), torch.arange(3)
    with pytest.raises(TypeCheckError, match="parameter"):
        predict(model, x, draw(3, 1), labels)
    with pytest.raises(TypeCheckError, match="parameter"):
        predict(model, x, draw(3), labels[:2])
    monkeypatch.setattr(Transport, "weight", lambda self, t: t[:, None])
    with pytest.raises(TypeCheckError, match="return"):
        training_losses(law, model, x, labels, None)
