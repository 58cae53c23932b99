"""The keys of the official release's YAML files and ours for them, and a reader that accounts for every one."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from rae.pipeline.config import closest
from rae.pipeline.interchange.official_yaml import number
from rae.stages.section import Section
from rae.stages.sections import EncodeSection, SampleSection, ShardsSection
from rae.stages.training.sections import TrainDecoderSection, TrainDitSection
from rae.store.manifest import Json

SECTIONS: Mapping[str, type[Section]] = {
    "shards": ShardsSection,
    "encode": EncodeSection,
    "train_decoder": TrainDecoderSection,
    "train_dit": TrainDitSection,
    "sample": SampleSection,
}
# Official key, ours, and the official default of an absent key where ours is another.
Keys = tuple[tuple[str, str, Any], ...]
TRAINING: Keys = (
    ("training.epochs", "epochs", None),
    ("training.global_batch_size", "batch_size", None),
    ("training.ema_decay", "ema_decay", None),
    ("training.clip_grad", "clip_grad", 1.0),
    ("training.global_seed", "seed", None),
    ("training.num_workers", "workers", None),
    ("training.log_interval", "log_every", None),
    ("training.optimizer.lr", "lr", None),
    ("training.optimizer.betas", "betas", None),
    ("training.optimizer.weight_decay", "weight_decay", None),
)
SCHEDULER: Keys = (
    ("training.scheduler.type", "schedule", "linear"),
    ("training.scheduler.base_lr", "lr", None),
    ("training.scheduler.decay_end_epoch", "decay_end_epoch", None),
    ("training.scheduler.final_lr", "final_lr", None),
)
# Of the 512 px file: the official trainer reads other names, and without a scheduler block keeps lr constant.
OLDER: Keys = (
    ("training.base_lr", "lr", None),
    ("training.beta", "betas", None),
    ("training.wd", "weight_decay", None),
    ("training.schedule_type", "schedule", None),
    ("training.decay_start_epoch", "decay_start_epoch", None),
    ("training.decay_end_epoch", "decay_end_epoch", None),
    ("training.final_lr", "final_lr", None),
    ("training.log_every", "log_every", None),
    ("training.ckpt_every", "checkpoint_every", None),
)
GAN: Keys = (
    ("gan.loss.perceptual_weight", "perceptual_weight", 0.0),
    ("gan.loss.lpips_start", "perceptual_start_epoch", None),
    ("gan.loss.disc_weight", "disc_weight", 0.0),
    ("gan.loss.max_d_weight", "max_d_weight", None),
    ("gan.loss.disc_loss", "disc_loss", None),
    ("gan.loss.disc_upd_start", "disc_start_epoch", 0),
    ("gan.loss.disc_start", "gan_start_epoch", 0),
    ("gan.disc.arch.recipe", "recipe", None),
    ("gan.disc.arch.ks", "ks", 3),
    ("gan.disc.arch.norm_type", "norm_type", None),
    ("gan.disc.arch.using_spec_norm", "using_spec_norm", None),
    ("gan.disc.augment.prob", "augment_prob", None),
)
ADAPTIVE: Keys = (("sampler.params.atol", "atol", None), ("sampler.params.rtol", "rtol", None))
SDE: Keys = (
    ("sampler.params.num_steps", "num_steps", 250),
    ("sampler.params.diffusion_form", "diffusion_form", "SBDM"),
    ("sampler.params.diffusion_norm", "diffusion_norm", None),
    ("sampler.params.last_step_size", "last_step_size", None),
)
# torchdiffeq's names of methods, and our samplers.
ODE_METHODS: Mapping[str, str] = {"euler": "euler", "heun2": "heun", "dopri5": "adaptive"}
# Keys with the one value that has a meaning here, which need not be said.
ALWAYS: Mapping[str, Any] = {
    "stage_1.target": "stage1.RAE",
    "stage_1.params.reshape_to_2d": True,
    "stage_1.params.encoder_params.normalize": True,
    "training.grad_accum_steps": 1,
    "training.optimizer.type": "adamw",
    "sampler.params.reverse": False,
    "gan.loss.gen_loss": "vanilla",
    "gan.loss.disc_updates": 1,
    "gan.disc.augment.cutout": 0.0,
}
WITHOUT: Mapping[str, str] = {
    "training.checkpoint_interval": "it counts epochs, and `checkpoint_every` optimizer steps",
    "training.sample_every": "nothing is sampled while training",
    "training.batch_size": "it is per process, and `batch_size` is of all processes together",
    "eval.eval_interval": "nothing is scored while training",
    "eval.eval_model": "`sample.weights: model` samples the weights that are not averaged",
    "eval.metrics": "`rae evaluate` takes all its scores",
    "eval.reference_npz_path": "`rae evaluate` scores against held-out images",
    "transport.params.time_dist_shift": "the official trainer drops it too: `misc` says the shift",
}


@dataclass
class Reading:
    """An official file, read key by key: `settings` are ours, `notes` what a person should know."""

    official: Json
    settings: Json = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)  # what the configuration needs to be imported first

    def __post_init__(self) -> None:
        self._left = dict(_leaves(self.official))
        self._known = {*ALWAYS, *WITHOUT}

    def take(self, key: str, default: Any = None) -> Any:
        """The value of a dotted official key, which is then accounted for."""
        self._known.add(key)
        return self._left.pop(key, default)

    def number(self, key: str, default: float) -> float:
        """`take` for a number; `ConfigError` for anything else."""
        return number(self.take(key, default), key)

    def path(self, key: str) -> str | None:
        """`take` for the path of a file; None where there is none."""
        value = self.take(key)
        return None if value is None else str(value)

    def take_below(self, prefix: str) -> None:
        """Account for all that stands below a key: somebody else reads it."""
        self._left = {key: value for key, value in self._left.items() if not key.startswith(f"{prefix}.")}

    def put(self, section: str, ours: str, value: Any) -> None:
        """Set one of our keys, unless there is nothing to say."""
        if value is None:
            return
        model = SECTIONS[section]
        if ours in (*model.model_fields, *model.shorthands):
            self.settings.setdefault(section, {})[ours] = value
        else:
            self.notes.append(f"no counterpart in this version: `{section}.{ours}: {value}`")

    def move(self, section: str, keys: Keys) -> None:
        """Take each official key and set ours."""
        for official, ours, default in keys:
            self.put(section, ours, self.take(official, default))

    def finish(self) -> None:
        """Name everything that has not been taken."""
        for key, value in self._left.items():
            if key in ALWAYS:
                if value != ALWAYS[key]:
                    self.notes.append(f"no counterpart: `{key}: {value}`; here it is always {ALWAYS[key]}")
            elif key in WITHOUT:
                self.notes.append(f"no counterpart: `{key}: {value}`; {WITHOUT[key]}")
            else:
                guess = closest(key, sorted(self._known))
                self.notes.append(f"unknown and left out: `{key}: {value}`{guess}")


def _leaves(value: Json, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, inner in value.items():
        if isinstance(inner, dict):
            yield from _leaves(inner, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", inner
