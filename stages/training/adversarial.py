"""The decoder's adversarial training (RAE paper, section 3; VQGAN's adaptive weight), with no work done twice.

The encoder runs once: noised tokens make the image that the generator's step judges, clean ones the image that the
discriminator learns from. The made image is a leaf, at which each loss is differentiated once. Both gradients are
pulled back to the decoder's last weight alone to weigh them, and their sum goes through the decoder once.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from rae.stages.models.decoder import ViTDecoder
from rae.stages.models.diffaug import DRAWS, diff_augment
from rae.stages.models.discriminator import Discriminator
from rae.stages.models.gan_losses import adaptive_weight, discriminator_loss, generator_loss
from rae.stages.training.checkpoints import Groups
from rae.stages.training.learner import Batch, NonFinite, Trainee, finite, mean_numbers
from rae.stages.training.optimizer import build_optimizer, descend, load_optimizer, optimizer_tensors
from rae.stages.training.parallel import agree, averaging, spread
from rae.stages.training.randomness import uniform
from rae.stages.training.ranks import Ranks
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


@dataclass(frozen=True)
class _Judged:
    """Losses of made images, 0-dim: the reconstruction's, and all parts to log.

    `at_image` are the gradients [B, 3, S, S] of reconstruction and generator there, `at_last_layer` [2, *layer] those
    at the decoder's last weight, if the generator counts yet.
    """

    loss: Tensor
    made_of: dict[str, Tensor]
    at_image: tuple[Tensor, Tensor]
    at_last_layer: Tensor | None


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
        self.judge = spread(agree(self.discriminator, ranks), "ddp", ranks, device)
        self.disc_optimizer = build_optimizer(self.heads, section)
        self.disc_start, self.gan_start = (section.start_step(part, self.schedule[0]) for part in ("disc", "gan"))
        if section.compile:
            # By block, so that a gradient at the last layer does not run through what is compiled.
            for block in (*decoder.decoder_layers, *discriminator.blocks):
                block.compile()

    def step(self, batch: S, step: int) -> dict[str, float | Tensor]:
        """Teach the decoder, then the discriminator; what has not begun counts and is logged as 0.

        As of every `Trainee`; but `NonFinite` of the discriminator leaves only the discriminator as it was, since the
        decoder, whose images it was shown, has learnt by then.
        """
        parts = self.parts(batch)
        with torch.no_grad(), self.autocast():
            clean, noised = zip(*(self.tokens(part) for part in parts), strict=True)
        return self._decoder_step(noised, parts, batch, step) | self._discriminator_step(clean, parts, batch, step)

    def _decoder_step(
        self, noised: Sequence[Tensor], parts: Sequence[S], batch: S, step: int
    ) -> dict[str, float | Tensor]:
        """The generator's weight is the whole batch's, so every part is judged before any goes backwards.

        A batch of one part keeps its graph for that. Of several, the images are made again, for the price of one more
        forward pass through the decoder: every loss is still computed once.
        """
        self.optimizer.zero_grad()
        self.heads.eval()
        kept: Tensor | None = None
        judged = []
        for tokens, part in zip(noised, parts, strict=True):
            with self.autocast():
                made = self.forward(tokens) if len(parts) == 1 else self.model(tokens)
            judged.append(self._judge(made, part, step))
            kept = made if len(parts) == 1 else None
            del made
        d_weight = self._adaptive_weight([one.at_last_layer for one in judged])
        numbers: list[dict[str, float | Tensor]] = []
        for part, one in zip(parts, judged, strict=True):
            loss = one.loss + self.section.disc_weight * d_weight * one.made_of["gen_loss"]
            value = finite("loss", loss.item(), part, step, self.ranks, one.made_of)
            numbers.append({"loss": value, **one.made_of, "d_weight": d_weight})
        for tokens, part, one in zip(noised, parts, judged, strict=True):
            reconstruction, generator = one.at_image
            gradient = reconstruction + self.section.disc_weight * d_weight * generator
            with averaging(self.forward, last=part is parts[-1]):
                with self.autocast():
                    made = self.forward(tokens) if kept is None else kept
                made.backward(gradient / len(parts))
        check = self.check_norm("grad_norm", batch, step)
        norm = descend(self.optimizer, self.model, self.rate(step), self.section.clip_grad, check)
        self.ema.update(self.model)
        return {**mean_numbers(numbers), "grad_norm": norm}

    def _judge(self, made: Tensor, batch: S, step: int) -> "_Judged":
        """Both losses of made images, and their gradients there and at the last layer."""
        image = made.detach().requires_grad_()
        with self.autocast():
            loss, made_of = self.reconstruction(image, batch)
        (reconstruction,) = torch.autograd.grad(loss, image)
        generator, adversarial = torch.zeros((), device=self.device), torch.zeros_like(reconstruction)
        at_last_layer = None
        if step >= self.gan_start:
            with self.autocast():
                generator = generator_loss(self.discriminator(self._view(image, batch.augment_draws[0])))
            (adversarial,) = torch.autograd.grad(generator, image)
            gradients = [
                torch.autograd.grad(made, self.last_layer, at_image, retain_graph=True)[0]
                for at_image in (reconstruction, adversarial)
            ]
            at_last_layer = torch.stack(gradients)
        numbers = {name: part.detach() for name, part in (made_of | {"gen_loss": generator}).items()}
        return _Judged(loss.detach(), numbers, (reconstruction, adversarial), at_last_layer)

    def _adaptive_weight(self, at_last_layer: Sequence[Tensor | None]) -> Tensor:
        """The generator's weight, of the global batch on every rank; 0 before it begins."""
        gradients = [gradient for gradient in at_last_layer if gradient is not None]
        if not gradients:
            return torch.zeros((), device=self.device)
        mean = self.ranks.all_reduce_mean(sum(gradients[1:], gradients[0]) / len(gradients))
        return adaptive_weight(mean[0], mean[1], self.section.max_d_weight)

    def _discriminator_step(
        self, clean: Sequence[Tensor], parts: Sequence[S], batch: S, step: int
    ) -> dict[str, float | Tensor]:
        if step < self.disc_start:
            return dict.fromkeys(("disc_loss", "logits_real", "logits_fake", "disc_grad_norm"), 0.0)
        vectors = {name: vector.clone() for name, vector in self.heads.named_buffers()}
        try:
            return self._teach_discriminator(clean, parts, batch, step)
        except NonFinite:
            for name, vector in self.heads.named_buffers():
                vector.copy_(vectors[name])  # the forward passes have moved those of the spectral norms
            raise

    def _teach_discriminator(
        self, clean: Sequence[Tensor], parts: Sequence[S], batch: S, step: int
    ) -> dict[str, float | Tensor]:
        self.disc_optimizer.zero_grad()
        numbers: list[dict[str, Tensor]] = [{} for _ in parts]
        losses: list[Tensor] = []
        for real in (False, True):  # made images first: what the last pass sends to other ranks is the sum of both
            for tokens, part, of_part in zip(clean, parts, numbers, strict=True):
                # A pass of a batch is one step of the spectral norms' power iteration, as officially: its first part's.
                self.heads.train(part is parts[0])
                last = real and part is parts[-1]
                with averaging(self.judge, last=last):
                    losses.append(self._tell(real, tokens, part, of_part))
                    # The halves' gradients all but cancel, so a batch of one part goes backwards once, as officially.
                    if last or len(parts) > 1:
                        (sum(losses[1:], losses[0]) / len(parts)).backward()  # type: ignore[no-untyped-call]
                        losses.clear()
        for part, of_part in zip(parts, numbers, strict=True):
            of_part["disc_loss"] = of_part.pop("loss_real") + of_part.pop("loss_fake")
            finite("discriminator's loss", float(of_part["disc_loss"]), part, step, self.ranks)
        # Its own updates alone count for its rate; it is not clipped, as officially.
        rate, check = self.rate(step - self.disc_start), self.check_norm("disc_grad_norm", batch, step)
        norm = descend(self.disc_optimizer, self.heads, rate, 0, check)
        return {**mean_numbers(numbers), "disc_grad_norm": norm}

    def _tell(self, real: bool, tokens: Tensor, part: S, numbers: dict[str, Tensor]) -> Tensor:
        """The discriminator's loss on real images, or on those made of clean tokens; notes its numbers."""
        kind = "real" if real else "fake"
        images = part.images if real else self._as_file(tokens)
        with self.autocast():
            logits = self.judge(self._view(images, part.augment_draws[VIEWS.index(kind)]))
            loss = discriminator_loss(self.section.disc_loss, logits, real)
        numbers |= {f"loss_{kind}": loss.detach(), f"logits_{kind}": logits.detach().mean()}
        return loss

    def _as_file(self, tokens: Tensor) -> Tensor:
        """Images made of clean tokens, as they would be read from a file."""
        with torch.no_grad(), self.autocast():
            made: Tensor = self.forward(tokens)
        return made.float().clamp(0, 1).mul(255).round().div(255)

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
