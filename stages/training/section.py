"""What both trainers can be told; what each alone can stands in `rae.stages.training.sections`."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from rae.stages.section import Location, Positive, Precision, Rate, Runtime, Section

Parallel = Literal["ddp", "fsdp2"]
Tracker = Literal["tensorboard", "wandb", "trackio"]


class TrainingSection(Section):
    """What both trainers share: length, optimizer, schedule, EMA, checkpoints, where it begins and what it publishes.

    `publish_at` are steps whose weights become artifacts while training goes on. `continue_from` is a REF to a finished
    run, which goes on to this one's length; `init_from` one to a model whose weights, `init_weights`, training begins
    with. `max_skipped_steps` is how many steps may come to nothing because a loss or gradient is not finite; the next
    one, by default the first, stops the training.

    `grad_accum_steps` cuts each rank's share of a global batch into as many parts, one after another: less memory, the
    same step. `parallel` says how ranks hold the model: `ddp`, each all of it, or `fsdp2`, each a slice. Like the
    number of ranks, both change results in their rounding only, and are in no recipe.

    `trackers` are told the numbers of `metrics.jsonl`, images and settings, too. A rank that is in the same step for
    `hang_report_s` seconds says where.
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
    max_skipped_steps: Annotated[int, Field(ge=0)] = 0
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.9995
    precision: Precision = "float32"
    compile: Annotated[bool, Runtime] = False
    grad_checkpoint: Annotated[bool, Runtime] = False  # less memory, a third more time
    grad_accum_steps: Annotated[int, Field(gt=0), Runtime] = 1
    parallel: Annotated[Parallel, Runtime] = "ddp"
    workers: Annotated[int, Field(ge=0), Runtime] = 2
    log_every: Annotated[int, Field(gt=0), Runtime] = 50
    trackers: Annotated[tuple[Tracker, ...], Runtime] = ()
    hang_report_s: Annotated[float, Field(gt=0), Runtime] = 600.0
    checkpoint_every: Annotated[int, Field(gt=0), Runtime] = 1000
    keep_checkpoints: Annotated[int, Field(gt=0), Runtime] = 2
    publish_at: Annotated[tuple[Positive, ...], Runtime] = ()
    continue_from: Location = None
    init_from: Location = None
    init_weights: Literal["ema", "model"] = "ema"

    def in_recipe(self) -> dict[str, Any]:
        """Without the choice among weights that no training begins with, and a patience that there is none of."""
        settings = super().in_recipe()
        if not self.max_skipped_steps:
            del settings["max_skipped_steps"]
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
    def _parts_are_whole(self) -> Self:
        if self.batch_size % self.grad_accum_steps:
            raise ValueError(
                f"`batch_size` {self.batch_size} does not divide into `grad_accum_steps` {self.grad_accum_steps} parts"
            )
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

    @model_validator(mode="after")
    def _decay_has_a_schedule(self) -> Self:
        for key in ("decay_start_epoch", "decay_end_epoch", "final_lr") if self.schedule == "constant" else ():
            value, default = getattr(self, key), type(self).model_fields[key].default
            if value != default:
                leave = "null" if default is None else default
                raise ValueError(
                    f"`{key}` {value} has no effect: `schedule` is constant, and the learning rate stays at `lr` after"
                    f" the warm-up; take `schedule: linear` or `cosine`, or leave `{key}` at {leave}"
                )
        return self
