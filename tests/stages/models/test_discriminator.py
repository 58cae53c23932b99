"""The discriminator trains its heads alone, and passes gradients on to the image."""

from pathlib import Path

import pytest
import torch

from rae.stages.models.discriminator import DinoDiscriminator, EncoderDiscriminator
from rae.stages.models.encoders import Encoder, load_encoder
from rae.stages.models.weights import locate_encoder
from rae.store.errors import ConfigError, CorruptData


@pytest.fixture(scope="module")
def discriminator() -> DinoDiscriminator:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return DinoDiscriminator("S_16")


def images(count: int = 2) -> torch.Tensor:
    return 2 * torch.rand(count, 3, 64, 64, generator=torch.Generator().manual_seed(0)) - 1


def test_one_logit_a_head_and_patch(discriminator: DinoDiscriminator) -> None:
    with torch.inference_mode():
        assert discriminator.eval()(images()).shape == (2, 5 * 14 * 14)


def test_logits_of_an_image_do_not_depend_on_its_batch(discriminator: DinoDiscriminator) -> None:
    discriminator.eval()
    with torch.inference_mode():
        together, alone = discriminator(images())[:1], discriminator(images()[:1])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)


def test_gradients_reach_heads_and_image_and_leave_the_backbone(discriminator: DinoDiscriminator) -> None:
    batch = images(1).requires_grad_()
    discriminator.eval()(batch).mean().backward()
    assert batch.grad is not None
    assert batch.grad.abs().sum() > 0
    assert all(parameter.grad is not None for parameter in discriminator.heads.parameters())
    assert all(parameter.grad is None for parameter in discriminator.backbone.parameters())


def test_only_training_moves_the_spectral_norms(discriminator: DinoDiscriminator) -> None:
    def vectors() -> torch.Tensor:
        return torch.cat([value.clone() for key, value in discriminator.heads.state_dict().items() if "_u" in key])

    before = vectors()
    with torch.no_grad():
        discriminator.eval()(images(1))
        assert torch.equal(vectors(), before)
        discriminator.train()(images(1))
    assert not torch.equal(vectors(), before)


def test_other_backbones_are_refused(discriminator: DinoDiscriminator, tmp_path: Path) -> None:
    weights = DinoDiscriminator("S_8").backbone.state_dict()
    torch.save(weights, tmp_path / "dino.pth")
    with pytest.raises(CorruptData, match="does not fit the discriminator's backbone"):
        discriminator.load_backbone(tmp_path / "dino.pth")


# ---- on an encoder --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return load_encoder(locate_encoder("efficientnet-lite0"), 64, 3)


def test_an_encoder_has_a_head_per_feature_map(encoder: Encoder) -> None:
    judge = EncoderDiscriminator(encoder).eval()
    with torch.no_grad():
        logits = judge(images())
        sides = [feature.shape[-1] for feature in encoder.features(images())]
    assert sides == [32, 16, 8, 4]
    assert logits.shape == (2, sum(side**2 for side in sides))
    assert judge.description == "the 4 finest feature maps of efficientnet-lite0 at 64 pixels"


def test_it_sees_what_the_encoder_sees(encoder: Encoder) -> None:
    judge = EncoderDiscriminator(encoder)
    with torch.no_grad():
        for seen, wanted in zip(judge.features(2 * images() - 1), encoder.features(images()), strict=True):
            torch.testing.assert_close(seen, wanted.flatten(2), atol=1e-4, rtol=1e-4)


def test_its_gradients_reach_heads_and_image_and_leave_the_encoder(encoder: Encoder) -> None:
    judge, batch = EncoderDiscriminator(encoder), images(1).requires_grad_()
    judge(batch).mean().backward()
    assert batch.grad is not None
    assert batch.grad.abs().sum() > 0
    assert all(parameter.grad is not None for parameter in judge.heads.parameters())
    assert all(parameter.grad is None for parameter in encoder.parameters())


def test_groups_of_channels_need_widths_that_can_be_grouped(encoder: Encoder) -> None:
    with pytest.raises(ConfigError, match="32 groups of channels, and the features of efficientnet-lite0 have 16, 24"):
        EncoderDiscriminator(encoder, norm_type="gn")


def test_a_kernel_is_no_longer_than_the_smallest_map_wrapped_around(encoder: Encoder) -> None:
    fewest = encoder.grid[0] * encoder.grid[1]
    widest = 2 * fewest + 1
    assert EncoderDiscriminator(encoder, ks=widest)(images(1)).isfinite().all()
    with pytest.raises(ConfigError, match=rf"the {fewest} positions of .*take {widest} or less"):
        EncoderDiscriminator(encoder, ks=widest + 2)
