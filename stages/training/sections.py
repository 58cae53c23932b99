"""What each of the two trainers can be told."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from rae.stages.models.sizes import DIT_SIZES, VIT_SIZES, expand_size
from rae.stages.section import Fraction, Location, Positive, Rate, Runtime, SigmaRel, Start, StartStep
from rae.stages.training.section import TrainingSection
from rae.store.errors import ConfigError

_OF_THE_DISCRIMINATOR = {
    *("disc_weight", "max_d_weight", "disc_loss", "disc_start_epoch", "disc_start_step", "gan_start_epoch"),
    *("gan_start_step", "ks", "norm_type", "using_spec_norm", "augment_prob"),
}


class TrainDecoderSection(TrainingSection):
    """The ViT decoder (RAE paper, section 3): sizes, noise on its tokens, losses. ViT-B by default.

    `size` S, B, L or XL stands for `hidden_size`, `depth`, `num_heads` and `intermediate_size`.

    `feed` is what it learns from: `online`, random crops of images resized to `resize_size`, through the live encoder
    (the paper); `cached`, stored latents of the centre crop and its flip, without the encoder; `crops`, those of random
    crops (`encode.crops`). The latents are those that this configuration encodes, or those that the REF `latents`
    names. docs/train_decoder.md says what each costs.

    `perceptual_loss` and `adversarial_loss` rest on networks whose weights are files to be had (`lpips`, `dino`, as the
    paper), or on the encoder that is there anyway (`encoder`).

    A loss of weight 0 is as good as `none`: its networks are neither built nor trained, and their files not needed.

    Losses begin at an epoch (a fraction will do), or at the optimizer step `*_start_step` where that is given:
    `perceptual` and `gan` are the decoder's terms, `disc` is the discriminator's own training.
    """

    shorthands = ("size",)

    hidden_size: Positive = 768
    depth: Positive = 12
    num_heads: Positive = 12
    intermediate_size: Positive = 3072
    feed: Literal["online", "cached", "crops"] = "online"
    latents: Location = None
    resize_size: Positive | None = None
    noise_tau: Annotated[float, Field(ge=0)] = 0.8
    perceptual_loss: Literal["lpips", "encoder", "none"] = "lpips"
    perceptual_weight: Annotated[float, Field(ge=0)] = 1.0
    perceptual_start_epoch: Start = 0.0
    perceptual_start_step: StartStep = None
    lpips_weights: Location = None
    adversarial_loss: Literal["dino", "encoder", "none"] = "dino"
    disc_weight: Annotated[float, Field(ge=0)] = 0.75
    max_d_weight: Annotated[float, Field(ge=0)] = 1e4
    disc_loss: Literal["hinge", "vanilla"] = "hinge"
    disc_start_epoch: Start = 6.0
    disc_start_step: StartStep = None
    gan_start_epoch: Start = 8.0
    gan_start_step: StartStep = None
    recipe: Literal["S_8", "S_16", "B_16"] = "S_8"
    ks: Positive = 9
    norm_type: Literal["bn", "gn"] = "bn"
    using_spec_norm: bool = True
    augment_prob: Fraction = 1.0
    disc_weights: Location = None
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.9978

    @property
    def needs_encoder(self) -> bool:
        """Whether the encoder runs in training: to make tokens, or in a loss."""
        return "encoder" in (self.perceptual_loss, self.adversarial_loss) or self.feed == "online"

    def in_recipe(self) -> dict[str, Any]:
        """Without what another feed or another loss alone reads, and without the paper's feed."""
        settings = super().in_recipe()
        idle = {"feed" if self.feed == "online" else "resize_size"}
        if self.perceptual_loss == "none":
            idle |= {"perceptual_weight", "perceptual_start_epoch", "perceptual_start_step"}
        if self.adversarial_loss != "dino":
            idle.add("recipe")
        if self.adversarial_loss == "none":
            idle |= _OF_THE_DISCRIMINATOR
        return {key: value for key, value in settings.items() if key not in idle}

    def check_views(self, stored: Literal["flips", "crops"]) -> None:
        """Refuse stored latents whose views are not those that `feed` reads."""
        if (self.feed == "crops") != (stored == "crops"):
            hint = "encode with `encode.crops`, or name such latents" if stored == "flips" else "set it to crops"
            raise ConfigError(f"`train_decoder.feed` is {self.feed}, and the latents' views are {stored}: {hint}")

    def start_step(self, part: Literal["perceptual", "disc", "gan"], steps_per_epoch: int) -> int:
        """The optimizer step, counted from 0, at which a loss begins."""
        step: int | None = getattr(self, f"{part}_start_step")
        epoch: float = getattr(self, f"{part}_start_epoch")
        return round(epoch * steps_per_epoch) if step is None else step

    def check_sizes(self, image_size: int, grid: tuple[int, int]) -> None:
        """Refuse an image that is not a whole patch per token, and crops larger than what they are cut from."""
        if grid[0] != grid[1] or image_size % grid[0]:
            raise ConfigError(
                f"`encode.image_size` {image_size} is not a multiple of the encoder's {grid[0]}x{grid[1]} grid of"
                " tokens"
            )
        if self.feed == "online" and self.resize_size is not None and self.resize_size < image_size:
            raise ConfigError(
                f"`train_decoder.resize_size` {self.resize_size} is less than `encode.image_size` {image_size}: crops"
                " of that side do not fit the resized images"
            )

    @model_validator(mode="before")
    @classmethod
    def _size(cls, settings: Any) -> Any:
        return expand_size(settings, VIT_SIZES)

    @model_validator(mode="before")
    @classmethod
    def _losses_that_count(cls, settings: Any) -> Any:
        if not isinstance(settings, dict):
            return settings
        weights = {"perceptual_loss": "perceptual_weight", "adversarial_loss": "disc_weight"}
        return settings | {loss: "none" for loss, weight in weights.items() if settings.get(weight) == 0}

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        for what, divisor in (("`num_heads`", self.num_heads), ("what its positions need,", 4)):
            if self.hidden_size % divisor:
                raise ValueError(f"`hidden_size` {self.hidden_size} is not a multiple of {what} {divisor}")
        return self

    @model_validator(mode="after")
    def _latents_are_read(self) -> Self:
        if self.latents is not None and self.feed == "online":
            raise ValueError("`latents` are read by `feed: cached` or `crops`, and `feed` is online")
        return self

    @model_validator(mode="after")
    def _last_layer_is_whole(self) -> Self:
        if self.parallel == "fsdp2" and self.adversarial_loss != "none":
            raise ValueError(
                "`parallel: fsdp2` needs `adversarial_loss: none`: the adaptive weight is taken at the decoder's last"
                " layer, which must lie whole on every rank; `ddp` trains decoders of every size here"
            )
        return self

    @model_validator(mode="after")
    def _kernel_is_centred(self) -> Self:
        if self.ks % 2 == 0:
            raise ValueError(f"`ks` {self.ks} must be odd: the kernel of the discriminator's heads has a middle")
        return self


class TrainDitSection(TrainingSection):
    """The diffusion transformer and its transport (RAE paper, sections 4 and 5). DiTDH-S by default.

    It trains on the latents that this configuration encodes, or on those that the REF `latents` names.
    For `DiT-DH`, `hidden_size`, `depth` and `num_heads` are pairs: body, head. For `LightningDiT` one number each.
    `size` S, B, L or XL stands for all three. `shuffle: windowed` permutes the store's parts, and the rows of every
    `window_parts` of them: for disks that are slow at random reads.

    `conditioning: vectors` is on those kept beside the latents (`encode.conditioning`) in place of labels; both are
    dropped at `class_dropout_prob`.

    Every `evaluate_every` steps samples are drawn and scored as `sample` and `evaluate` say, with the EMA and with the
    last weights; `keep_best` publishes the step whose EMA scores best so far, as dit/NAME-best.

    `ema_sigma_rel` are lengths of power-function averages (EDM2, section 3) that are tracked beside the EMA, and kept
    every `ema_snapshot_every` steps, so that `sample.ema_sigma_rel` can be any length afterwards: [0.05, 0.1].
    """

    shorthands = ("size",)

    latents: Location = None
    model: Literal["DiT-DH", "LightningDiT"] = "DiT-DH"
    hidden_size: tuple[Positive, ...] = (384, 2048)
    depth: tuple[Positive, ...] = (12, 2)
    num_heads: tuple[Positive, ...] = (6, 16)
    mlp_ratio: Rate = 4.0
    shuffle: Literal["global", "windowed"] = "global"
    window_parts: Positive = 16
    num_classes: Annotated[int, Field(ge=0)] | None = None
    conditioning: Literal["labels", "vectors"] = "labels"
    class_dropout_prob: Fraction = 0.1
    use_qknorm: bool = False
    path_type: Literal["Linear", "GVP", "VP"] = "Linear"
    prediction: Literal["velocity", "noise", "score", "data"] = "velocity"
    loss_weight: Literal["velocity", "likelihood"] | None = None
    time_dist_type: Literal["uniform", "logit-normal"] = "uniform"
    time_dist_shift: Rate | Literal["auto"] = "auto"
    evaluate_every: Annotated[Positive | None, Runtime] = None
    keep_best: Annotated[Literal["frechet_distance"] | None, Runtime] = None
    ema_sigma_rel: tuple[SigmaRel, ...] = ()
    ema_snapshot_every: Positive | None = None
    allow_narrow: Annotated[bool, Runtime] = False
    allow_crops: Annotated[bool, Runtime] = False

    def in_recipe(self) -> dict[str, Any]:
        """Without the windows of an order that has none, and averages that nothing is kept of."""
        settings = super().in_recipe()
        if self.conditioning == "labels":
            del settings["conditioning"]
        if not self.ema_sigma_rel:
            del settings["ema_sigma_rel"], settings["ema_snapshot_every"]
        if self.shuffle == "global":
            del settings["window_parts"]
        return settings

    @model_validator(mode="after")
    def _one_condition(self) -> Self:
        if self.conditioning == "vectors" and self.num_classes:
            raise ValueError("`conditioning: vectors` takes the place of classes: leave `num_classes` out")
        return self

    @model_validator(mode="after")
    def _best_is_known(self) -> Self:
        if self.keep_best is not None and self.evaluate_every is None:
            raise ValueError("`keep_best` keeps what `evaluate_every` finds best: give both, or neither")
        return self

    @model_validator(mode="after")
    def _lengths_fit(self) -> Self:
        if bool(self.ema_sigma_rel) != (self.ema_snapshot_every is not None):
            raise ValueError("`ema_sigma_rel` are kept every `ema_snapshot_every` steps: give both, or neither")
        if self.ema_sigma_rel and len(set(self.ema_sigma_rel)) < 2:
            raise ValueError("`ema_sigma_rel` needs two lengths or more to make others of, such as [0.05, 0.1]")
        if len(set(self.ema_sigma_rel)) < len(self.ema_sigma_rel):
            raise ValueError(f"`ema_sigma_rel` {list(self.ema_sigma_rel)} has a length twice")
        return self

    @model_validator(mode="before")
    @classmethod
    def _size(cls, settings: Any) -> Any:
        plain = isinstance(settings, dict) and settings.get("model") == "LightningDiT"
        return expand_size(settings, DIT_SIZES["LightningDiT" if plain else "DiT-DH"])

    @field_validator("hidden_size", "depth", "num_heads", mode="before")
    @classmethod
    def _number_alone(cls, value: Any) -> Any:
        return (value,) if isinstance(value, int) else value

    @model_validator(mode="after")
    def _parts_match(self) -> Self:
        parts = 2 if self.model == "DiT-DH" else 1
        for key in ("hidden_size", "depth", "num_heads"):
            if len(getattr(self, key)) != parts:
                raise ValueError(f"`{key}` needs {parts} number(s) for {self.model}, got {list(getattr(self, key))}")
        for hidden_size, num_heads in zip(self.hidden_size, self.num_heads, strict=True):
            if hidden_size % (4 * num_heads):
                raise ValueError(
                    f"`hidden_size` {hidden_size} is not a multiple of 4 x `num_heads` {num_heads} (rotary positions"
                    " turn pairs of numbers along two axes)"
                )
        return self

    @model_validator(mode="after")
    def _weight_is_finite(self) -> Self:
        # As `transport` finds for itself, with torch; a test compares them.
        if (self.loss_weight, self.prediction) == ("likelihood", "velocity") and self.path_type != "VP":
            raise ValueError(
                f"`loss_weight` likelihood is infinite at t = 0 for velocity prediction on the {self.path_type} path:"
                " take `loss_weight: velocity`, `prediction: noise`, or `path_type: VP`"
            )
        return self

    def check_views(self, stored: Literal["flips", "crops"]) -> None:
        """Refuse latents of random crops: off-centre pictures, objects cut in half, would be what the model samples.

        Scores compare samples with centre crops.
        """
        if stored == "crops" and not self.allow_crops:
            raise ConfigError(
                "these latents are of random crops, made for a decoder: a transformer would learn to make off-centre"
                " pictures of parts of things; name others with `train_dit.latents`, or set `train_dit.allow_crops`"
            )

    def check_width(self, token_dim: int) -> None:
        """Refuse a transformer narrower than the `token_dim` channels of a token (RAE paper, section 4.1, Theorem 1).

        The outputs of a model of width d span d of a token's n dimensions, so its loss stays above the sum of the n - d
        least eigenvalues of the velocity's covariance, however long one trains. For DiT-DH the head's width counts.
        """
        width = self.hidden_size[-1]
        if width < token_dim and not self.allow_narrow:
            part = "the head" if self.model == "DiT-DH" else "the transformer"
            raise ConfigError(
                f"{part} is {width} wide and a token has {token_dim} channels: narrower than a token it cannot fit the"
                " noise (Theorem 1 of the paper); widen `train_dit.hidden_size`, or set `train_dit.allow_narrow`"
            )
