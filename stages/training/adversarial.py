"""The decoder's adversarial training (RAE paper, section 3; VQGAN's adaptive weight), with no work done twice.

The encoder runs once: noised tokens make the image that the generator's step judges, clean ones the image that the
discriminator learns from. The made image is a leaf, at which each loss is differentiated once. Both gradients are
pulled back to the decoder's last weight alone to weigh them, and their sum goes through the decoder once.
"""

from collections.abc import Callable
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from rae.stages.models.decoder import ViTDecoder
from rae.stages.models.diffaug import DRAWS, diff_augment
from rae.stages.models.discriminator import Discriminator
from rae.stages.models.gan_losses import adaptive_weight, discriminator_loss, generator_loss
from rae.stages.training.checkpoints import Groups
from rae.stages.training.loop import Batch, NonFinite, Trainee, finite
from rae.stages.training.optimizer import build_optimizer, descend, load_optimizer, optimizer_tensors
from rae.stages.training.randomness import uniform
from rae.stages.training.ranks import Ranks, wrap
from rae.stages.training.sections import TrainDecoderSection

# What the discriminator is shown: made images to judge, then made and real ones to learn from.
VIEWS = ("judged", "fake", "real")


class Shown(Batch, Protocol):
    """A batch of images, with what decides how the discriminator is shown them."""

    @property
    def images(self) -> Tensor:
        """[B, 3, S, S] in [0, 1]"""

    @property
    def augment_draws(self) -> Tensor:
        """[3, B, 7] in [0, 1), from the function of that name"""


S = TypeVar("S", bound=Shown)


def augment_draws(seed: int, epoch: int, rows: np.ndarray) -> Tensor:
    """Draws [3, B, 7] for `diff_augment`, one per view in `VIEWS`: a function of (seed, epoch, row)."""
    views = [[uniform(seed, f"augment_{view}_{what}", epoch, rows) for what in DRAWS] for view in VIEWS]
    return torch.stack([torch.stack(columns, dim=1) for columns in views])


class AdversarialLearner(Trainee[S]):
    """A decoder against a discriminator, each with its optimizer; only the discriminator's heads learn.

    `tokens(batch)` gives the images' clean tokens and noised ones; `reconstruction(made, batch)` the mean loss between
    made images and the batch's, 0-dim, and its parts to log.
    """

    section: TrainDecoderSection

    def __init__(
        self,
        decoder: ViTDecoder,
        discriminator: Discriminator,
        tokens: Callable[[S], tuple[Tensor, Tensor]],
        reconstruction: Callable[[Tensor, S], tuple[Tensor, dict[str, Tensor]]],
        section: TrainDecoderSection,
        *,
        rows: int,
        ranks: Ranks,
        device: torch.device,
    ) -> None:
        super().__init__(decoder, section, rows=rows, ranks=ranks, device=device)
        self.last_layer = decoder.last_layer
        self.discriminator, self.tokens, self.reconstruction = discriminator.to(device), tokens, reconstruction
        self.heads = self.discriminator.heads
        self.judge = wrap(self.discriminator, ranks, device)
        self.disc_optimizer = build_optimizer(self.heads, section)
        self.disc_start, self.gan_start = (section.start_step(part, self.schedule[0]) for part in ("disc", "gan"))
        if section.compile:
            # By block, so that a gradient at the last layer does not run through what is compiled.
            for block in (*decoder.decoder_layers, *discriminator.blocks):
                block.compile()

    def step(self, batch: S, step: int) -> dict[str, float | Tensor]:
        """Teach the decoder, then the discriminator; parts that have not begun count and are logged as 0.

        As of every `Trainee`; but `NonFinite` of the discriminator leaves only the discriminator as it was, since the
        decoder, whose images it was shown, has learnt by then.
        """
        with torch.no_grad(), self.autocast():
            clean, noised = self.tokens(batch)
        return self._decoder_step(noised, batch, step) | self._discriminator_step(clean, batch, step)

    def _decoder_step(self, noised: Tensor, batch: S, step: int) -> dict[str, float | Tensor]:
        self.optimizer.zero_grad()
        self.heads.eval()
        with self.autocast():
            made = self.forward(noised)
            image = made.detach().requires_grad_()
            loss, parts = self.reconstruction(image, batch)
        (gradient,) = torch.autograd.grad(loss, image)
        generator = d_weight = torch.zeros((), device=self.device)
        if step >= self.gan_start:
            with self.autocast():
                generator = generator_loss(self.discriminator(self._view(image, batch.augment_draws[0])))
            (adversarial,) = torch.autograd.grad(generator, image)
            d_weight = self._adaptive_weight(made, gradient, adversarial)
            loss = loss + self.section.disc_weight * d_weight * generator
            gradient = gradient + self.section.disc_weight * d_weight * adversarial
        numbers = {name: part.detach() for name, part in (parts | {"gen_loss": generator}).items()}
        value = finite("loss", loss.item(), batch, step, self.ranks, numbers)
        made.backward(gradient)
        check = self.check_norm("grad_norm", batch, step)
        norm = descend(self.optimizer, self.model, self.rate(step), self.section.clip_grad, check)
        self.ema.update(self.model)
        return {"loss": value, **numbers, "d_weight": d_weight, "grad_norm": norm}

    def _adaptive_weight(self, made: Tensor, reconstruction: Tensor, generator: Tensor) -> Tensor:
        """The generator's weight from both gradients at the made image, of the global batch on every rank."""
        gradients = [
            torch.autograd.grad(made, self.last_layer, at_image, retain_graph=True)[0]
            for at_image in (reconstruction, generator)
        ]
        of_reconstruction, of_generator = self.ranks.all_reduce_mean(torch.stack(gradients))
        return adaptive_weight(of_reconstruction, of_generator, self.section.max_d_weight)

    def _discriminator_step(self, clean: Tensor, batch: S, step: int) -> dict[str, float | Tensor]:
        if step < self.disc_start:
            return dict.fromkeys(("disc_loss", "logits_real", "logits_fake", "disc_grad_norm"), 0.0)
        vectors = {name: vector.clone() for name, vector in self.heads.named_buffers()}
        try:
            return self._teach_discriminator(clean, batch, step)
        except NonFinite:
            for name, vector in self.heads.named_buffers():
                vector.copy_(vectors[name])  # the forward passes have moved those of the spectral norms
            raise

    def _teach_discriminator(self, clean: Tensor, batch: S, step: int) -> dict[str, float | Tensor]:
        self.disc_optimizer.zero_grad()
        self.heads.train()
        with torch.no_grad(), self.autocast():
            made = self.forward(clean)
        made = made.float().clamp(0, 1).mul(255).round().div(255)  # as it would be read from a file
        _, for_fake, for_real = batch.augment_draws
        with self.autocast():
            # One pass each, as officially: a pass is one step of the spectral norms' power iteration.
            fake = self.judge(self._view(made, for_fake))
            real = self.judge(self._view(batch.images, for_real))
            loss = discriminator_loss(self.section.disc_loss, real, fake)
        value = finite("discriminator's loss", loss.item(), batch, step, self.ranks)
        loss.backward()  # type: ignore[no-untyped-call]
        # Its own updates alone count for its rate; it is not clipped, as officially.
        rate, check = self.rate(step - self.disc_start), self.check_norm("disc_grad_norm", batch, step)
        norm = descend(self.disc_optimizer, self.heads, rate, 0, check)
        logits = {"logits_real": real.detach().mean(), "logits_fake": fake.detach().mean()}
        return {"disc_loss": value, **logits, "disc_grad_norm": norm}

    def _view(self, images: Tensor, draws: Tensor) -> Tensor:
        """Images in [0, 1] as the discriminator is shown them: in [-1, 1], augmented."""
        return diff_augment(2 * images - 1, draws, self.section.augment_prob)

    def tensors(self) -> Groups:
        """What a checkpoint must hold to continue; of the discriminator its heads, spectral norms' vectors included."""
        disc_optimizer = optimizer_tensors(self.disc_optimizer, self.heads)
        return super().tensors() | {"heads": self.heads.state_dict(), "disc_optimizer": disc_optimizer}

    def _take_over(self, tensors: Groups) -> None:
        super()._take_over(tensors)
        self.heads.load_state_dict(tensors["heads"])
        load_optimizer(self.disc_optimizer, self.heads, tensors["disc_optimizer"])
