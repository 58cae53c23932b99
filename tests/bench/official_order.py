"""A plain transformer, training step and sampling loop in the official order of operations, to measure ours against.

It walks the modules of our own transformer, so both have the same weights, and computes as the release does: norms
written out in float32, the body's modulation repeated for every token, patches by a convolution, AdamW and the EMA a
tensor at a time, draws from torch's global generator, both branches of guidance on a doubled batch in every step.
"""

import copy
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rae.stages.models.dit import DiTDH
from rae.stages.models.layers import Attention, Block, PatchEmbed, RMSNorm, RotaryPositions, SwiGLU
from rae.stages.models.transport import shift_time

LR, BETAS, CLIP, DECAY = 2e-4, (0.9, 0.95), 1.0, 0.9995


def norm(layer: RMSNorm, x: Tensor) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + layer.eps)).type_as(x) * layer.weight


def for_each_token(modulation: Tensor, tokens: int) -> Tensor:
    repeats = tokens // modulation.shape[1]
    return modulation if repeats == 1 else modulation.repeat_interleave(repeats, dim=1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + for_each_token(scale, x.shape[1])) + for_each_token(shift, x.shape[1])


def turned(positions: RotaryPositions, x: Tensor) -> Tensor:
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    return x * positions.freqs_cos + torch.stack((-second, first), dim=-1).flatten(-2) * positions.freqs_sin


def attention(layer: Attention, x: Tensor, positions: RotaryPositions) -> Tensor:
    batch, tokens, width = x.shape
    qkv = layer.qkv(x).reshape(batch, tokens, 3, layer.num_heads, width // layer.num_heads)
    query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    query, key = (turned(positions, one).to(value.dtype) for one in (query, key))
    attended = F.scaled_dot_product_attention(query, key, value)
    return layer.proj(attended.transpose(1, 2).reshape(batch, tokens, width))


def swiglu(layer: SwiGLU, x: Tensor) -> Tensor:
    gate, value = layer.w12(x).chunk(2, dim=-1)
    return layer.w3(F.silu(gate) * value)


def through(block: Block, x: Tensor, condition: Tensor, positions: RotaryPositions) -> Tensor:
    shift1, scale1, gate1, shift2, scale2, gate2 = block.adaLN_modulation(condition).chunk(6, dim=-1)
    attended = attention(block.attn, modulate(norm(block.norm1, x), shift1, scale1), positions)
    x = x + attended * for_each_token(gate1, x.shape[1])
    mixed = swiglu(block.mlp, modulate(norm(block.norm2, x), shift2, scale2))
    return x + mixed * for_each_token(gate2, x.shape[1])


def embedded(layer: PatchEmbed, x: Tensor) -> Tensor:
    return layer.proj(x).flatten(2).transpose(1, 2)


def predict(dit: DiTDH, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """What `dit(x, t, y)` gives."""
    phase = t[:, None] * dit.t_embedder.W[None, :] * 2 * torch.pi
    time = dit.t_embedder.mlp(torch.cat([torch.sin(phase), torch.cos(phase)], dim=-1))
    condition = F.silu(time + dit.y_embedder.embedding_table(y)).unsqueeze(1)
    body = embedded(dit.s_embedder, x) + dit.pos_embed
    depth = dit.config.depth[0]
    for block in dit.blocks[:depth]:
        body = through(block, body, condition, dit.enc_feat_rope)
    per_token = dit.s_projector(F.silu(time.unsqueeze(1).repeat(1, body.shape[1], 1) + body))
    head = embedded(dit.x_embedder, x)
    for block in dit.blocks[depth:]:
        head = through(block, head, per_token, dit.dec_feat_rope)
    shift, scale = dit.final_layer.adaLN_modulation(per_token).chunk(2, dim=-1)
    out = dit.final_layer.linear(modulate(norm(dit.final_layer.norm_final, head), shift, scale))
    side = dit.config.grid
    return out.reshape(-1, side, side, 1, 1, out.shape[-1]).permute(0, 5, 1, 3, 2, 4).reshape(x.shape)


class OfficialTraining:
    """A copy of `dit`, trained as the release trains."""

    def __init__(self, dit: DiTDH, shift: float, bf16: bool = False) -> None:
        self.dit, self.shift, self.bf16 = copy.deepcopy(dit).train(), shift, bf16
        self.ema = copy.deepcopy(dit).eval().requires_grad_(False)
        self.optimizer = torch.optim.AdamW(self.dit.parameters(), lr=LR, betas=BETAS, weight_decay=0.0)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1.0)

    def draw(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Labels with some dropped, times, noise."""
        t = torch.sigmoid(torch.randn(len(x))).clamp(0, 0.999)
        dropped = torch.rand(len(y)) < self.dit.config.class_dropout_prob
        return torch.where(dropped, self.dit.config.num_classes, y), shift_time(t, self.shift), torch.randn_like(x)

    def step(self, x: Tensor, y: Tensor, t: Tensor, noise: Tensor) -> float:
        """One step; returns the loss."""
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            at = t.view(-1, 1, 1, 1)
            output = predict(self.dit, (1 - at) * x + at * noise, t, y)
            loss = ((output - (noise - x)) ** 2).mean(dim=(1, 2, 3)).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(self.dit.parameters(), CLIP)
        self.optimizer.step()
        self.scheduler.step()
        averages = dict(self.ema.named_parameters())
        with torch.no_grad():
            for name, weight in self.dit.named_parameters():
                averages[name].mul_(DECAY).add_(weight.data, alpha=1 - DECAY)
        return loss.item()


@torch.no_grad()
def sample(
    dit: DiTDH,
    noise: Tensor,
    y: Tensor,
    times: Tensor,
    scale: float = 1.0,
    interval: tuple[float, float] = (0.0, 1.0),
    guide: DiTDH | None = None,
) -> Tensor:
    """Euler from noise along `times`, guided in every step by `guide` or, on a doubled batch, without label."""
    doubled = scale != 1.0 and guide is None
    x = torch.cat([noise, noise]) if doubled else noise
    labels = torch.cat([y, torch.full_like(y, dit.config.num_classes)]) if doubled else y
    for time, following in pairwise(times):
        t = time.expand(len(x))
        output = predict(dit, x, t, labels)
        if scale != 1.0:
            strong, weak = output.chunk(2) if guide is None else (output, predict(guide, x, t, labels))
            inside = ((t >= interval[0]) & (t <= interval[1]))[: len(y)].view(-1, 1, 1, 1)
            output = torch.where(inside, weak + scale * (strong - weak), strong)
            output = torch.cat([output, output]) if doubled else output
        x = x + (following - time) * output
    return x[: len(y)]
