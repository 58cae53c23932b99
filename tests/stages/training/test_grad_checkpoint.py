"""Recomputed activations: less memory in both trainers, and the same result to the bit."""

from collections.abc import Callable

import pytest
from torch import Tensor, nn

from rae.stages.models.decoder import DecoderBlock
from rae.stages.models.layers import Block
from tests.conftest import TINY, Rae


@pytest.mark.parametrize(
    ("verb", "kind", "block"), [("train-decoder", "decoder", DecoderBlock), ("train-dit", "dit", Block)]
)
def test_a_trainer_recomputes_and_ends_with_the_same_bits(
    verb: str,
    kind: str,
    block: type[nn.Module],
    rae_with: Callable[..., Rae],
    finished: Rae,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls, forward = [], block.forward

    def counted(self: nn.Module, *arguments: object) -> Tensor:
        calls.append(self)
        return forward(self, *arguments)

    monkeypatch.setattr(block, "forward", counted)
    section = verb.replace("-", "_")
    plain, checkpointed = rae_with("shards", "latents"), rae_with("shards", "latents")
    plain.verb(verb).succeeded()
    once = len(calls)
    checkpointed.verb(verb, "-s", f"{section}.grad_checkpoint=true").succeeded()
    assert len(calls) - once == 2 * once
    assert once >= TINY[section]["steps"]
    assert checkpointed.content(kind) == plain.content(kind) == finished.content(kind)
