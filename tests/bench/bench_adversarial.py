"""One adversarial step of the decoder against the straightforward order, and what its parts take.

The straightforward order is the official trainer's: the losses' gradients at the last layer by two passes, then the sum
backwards through losses and decoder again, and the images encoded again for the discriminator's step. Same models, in
one process, drawn weights: ViT-B decoder, VGG-16 for LPIPS, DINO S/8, DINOv2-B; batch 4, 256 px, float32, no DiffAug.
Online the images are encoded, cached they are not. `python tests/bench/bench_adversarial.py`; it wants a machine that
does nothing else, and minutes.
"""

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rounds import interleaved, table
from torch import Tensor
from torchvision.models import vgg16
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from rae.stages.models.decoder import DecoderConfig, ViTDecoder
from rae.stages.models.diffaug import DRAWS
from rae.stages.models.discriminator import IMAGENET_MEAN, IMAGENET_STD, DinoDiscriminator
from rae.stages.models.gan_losses import adaptive_weight, discriminator_loss, generator_loss
from rae.stages.models.perceptual import LpipsDistance
from rae.stages.models.sizes import VIT_SIZES
from rae.stages.training.adversarial import AdversarialLearner
from rae.stages.training.ranks import Ranks
from rae.stages.training.sections import TrainDecoderSection

B, SIDE, GRID, C = 4, 256, 16, 768
SECTION = TrainDecoderSection(steps=10**6, batch_size=B, disc_start_step=0, gan_start_step=0, augment_prob=0.0)


@dataclass
class Batch:
    images: Tensor
    clean: Tensor
    augment_draws: Tensor
    keys: tuple[str, ...] = ()


class Models:
    """The networks of a step, with drawn weights."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        self.encoder = (
            Dinov2WithRegistersModel(Dinov2WithRegistersConfig(image_size=224, patch_size=14))
            .requires_grad_(False)
            .eval()
        )
        vgg = {f"features.{name}": weight for name, weight in vgg16(weights=None).features.state_dict().items()}
        torch.save(vgg, folder / "vgg.pth")
        self.lpips = LpipsDistance(folder / "vgg.pth")
        config = DecoderConfig(
            C, GRID, patch_size=16, image_mean=IMAGENET_MEAN, image_std=IMAGENET_STD, **VIT_SIZES["B"]
        )
        self.decoder, self.discriminator = ViTDecoder(config), DinoDiscriminator("S_8")
        images = torch.rand(B, 3, SIDE, SIDE)
        self.batch = Batch(images, self.encode(images), torch.zeros(3, B, len(DRAWS)))

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        shown = torch.nn.functional.interpolate(images, 224, mode="bicubic")
        tokens = self.encoder(shown).last_hidden_state[:, 5:]
        return tokens.transpose(1, 2).unflatten(2, (GRID, GRID))

    def reconstruction(self, made: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        l1 = (made - batch.images).abs().mean()
        return l1 + self.lpips(made, batch.images).mean(), {"l1": l1}


def noised(clean: Tensor) -> Tensor:
    return clean + 0.4 * torch.randn_like(clean)


def learner_of(models: Models, encode: Callable[[Tensor], Tensor]) -> AdversarialLearner[Batch]:
    def tokens(batch: Batch) -> tuple[Tensor, Tensor]:
        clean = encode(batch.images)
        return clean, noised(clean)

    nets, device = (models.decoder, models.discriminator), torch.device("cpu")
    return AdversarialLearner(*nets, tokens, models.reconstruction, SECTION, rows=B, ranks=Ranks(), device=device)


def straightforward(models: Models, learner: AdversarialLearner[Batch]) -> None:
    batch, decoder, discriminator = models.batch, learner.model, models.discriminator
    learner.optimizer.zero_grad()
    learner.heads.eval()
    made = decoder(noised(models.encode(batch.images)))
    loss, _ = models.reconstruction(made, batch)
    generator = generator_loss(discriminator(2 * made - 1))
    at_last = [torch.autograd.grad(one, learner.last_layer, retain_graph=True)[0] for one in (loss, generator)]
    weight = adaptive_weight(*at_last, SECTION.max_d_weight)
    (loss + SECTION.disc_weight * weight * generator).backward()
    learner.optimizer.step()
    learner.ema.update(decoder)
    learner.disc_optimizer.zero_grad()
    learner.heads.train()
    with torch.no_grad():
        fakes = decoder(models.encode(batch.images)).clamp(0, 1).mul(255).round().div(255)
    fake, real = (discriminator(2 * images - 1) for images in (fakes, batch.images))
    (discriminator_loss("hinge", real, real=True) + discriminator_loss("hinge", fake, real=False)).backward()
    learner.disc_optimizer.step()


def parts(models: Models, learner: AdversarialLearner[Batch]) -> dict[str, Callable[[], object]]:
    """What a step consists of; each part takes what the ones before have left."""
    left: dict[str, Tensor] = {}
    batch = models.batch

    def forward() -> None:
        left["made"] = learner.model(noised(batch.clean))
        left["image"] = left["made"].detach().requires_grad_()

    def reconstruction() -> None:
        loss, _ = models.reconstruction(left["image"], batch)
        (left["gradient"],) = torch.autograd.grad(loss, left["image"])

    def judged() -> None:
        learner.heads.eval()
        loss = generator_loss(models.discriminator(2 * left["image"] - 1))
        (left["adversarial"],) = torch.autograd.grad(loss, left["image"])

    def weigh() -> None:
        left["weight"] = learner._adaptive_weight(left["made"], left["gradient"], left["adversarial"])

    def update() -> None:
        learner.optimizer.step()
        learner.ema.update(learner.model)

    return {
        "encoder": lambda: models.encode(batch.images),
        "decoder forwards": forward,
        "L1 + LPIPS, gradient at the image": reconstruction,
        "generator's loss, gradient at the image": judged,
        "adaptive weight at the last layer": weigh,
        "decoder backwards": lambda: left["made"].backward(left["gradient"]),
        "AdamW and EMA": update,
        "discriminator's step": lambda: learner._discriminator_step(batch.clean, batch, 0),
    }


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--threads", type=int, default=2)
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        models = Models(Path(folder))
    feeds: dict[str, Callable[[Tensor], Tensor]] = {"online": models.encode, "cached": lambda _: models.batch.clean}
    learners = {name: learner_of(models, encode) for name, encode in feeds.items()}
    cases: dict[str, Callable[[], object]] = {
        "straightforward, online": lambda: straightforward(models, learners["online"])
    }
    cases |= {name: partial(learner.step, models.batch, 0) for name, learner in learners.items()}
    seconds = interleaved(cases, options.rounds)
    slowest = seconds["straightforward, online"]
    rows = [(name, f"{taken:.1f}", f"{slowest / taken:.2f}") for name, taken in seconds.items()]
    print(table("An adversarial step", ("order", "seconds", "times faster"), rows))
    split = interleaved(parts(models, learners["cached"]), options.rounds)
    whole = sum(split.values())
    rows = [(name, f"{taken:.2f}", f"{taken / whole:.0%}") for name, taken in split.items()]
    print(table("By part, online", ("part", "seconds", "share"), rows))


if __name__ == "__main__":
    main()
