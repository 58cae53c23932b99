"""What caching is worth: seconds saved per epoch and run against disk, from measured times and nothing else.

Measured are what earlier stages of this workspace noted (the pace of an encode, the speed of a training of the same
sizes), or a few batches and steps, timed now. Training without the store would encode one view of every image in every
epoch; with it every view is encoded once.
"""

from rae.pipeline import launch
from rae.pipeline.console import Console, duration, size
from rae.pipeline.plan import Pipeline
from rae.stages.sections import EncodeSection
from rae.stages.training.sections import TrainDitSection
from rae.store.errors import RaeError
from rae.store.layout import LatentLayout
from rae.store.manifest import Artifact, Json
from rae.store.order import steps_per_epoch

# Below this share of a step, encoding on the fly is not what a training waits for.
WORTHWHILE = 0.1
_ENCODES_ALIKE = ("feature_index", "image_size", "encoder_input_size", "precision", "crops", "horizontal_flip")
_TRAINS_ALIKE = ("model", "hidden_size", "depth", "num_heads", "mlp_ratio", "use_qknorm", "precision", "batch_size")


def break_even(pipeline: Pipeline, device: str | None = None) -> Json | None:
    """The account for `rae plan`; None for a configuration that does not both encode and train a transformer.

    With `device` encoder and transformer are timed there; without, what the workspace knows is taken. Where something
    is not known, the account is {"unknown": what, "next": the command that measures it}.
    """
    if pipeline.config.encode is None or pipeline.config.train_dit is None:
        return None
    try:
        rows = len(pipeline.train)
        found = _recorded(pipeline) if device is None else _timed(pipeline, device)
    except RaeError as error:  # the plan's rows say the same and more
        return {"unknown": error.message, "next": error.next_command or pipeline.command("plan") + " --measure"}
    if isinstance(found, str):
        return {"unknown": found, "next": pipeline.command("plan") + " --measure"}
    encode, train = pipeline.section("encode", EncodeSection), pipeline.section("train_dit", TrainDitSection)
    channels, height, width = found["shape"]
    layout = LatentLayout(encode.views, channels, height, width, rows_per_part=1, dtype=encode.dtype)
    epochs = (
        train.epochs
        if train.epochs is not None
        else (train.steps or 0) / max(1, steps_per_epoch(rows, train.batch_size))
    )
    encoder, transformer = found["encoder_seconds_per_view"], found["transformer_seconds_per_image"]
    share = encoder / (encoder + transformer)
    account = {
        "encoder_share_of_step": share,
        "seconds_saved_per_epoch": rows * encoder,
        "seconds_to_encode": rows * encode.views * encoder,
        "seconds_saved": rows * (epochs - encode.views) * encoder,
        "epochs": epochs,
        "break_even_epochs": encode.views,
        "bytes": rows * encode.views * layout.latent_bytes,
        "pays": share >= WORTHWHILE and epochs > encode.views,
    }
    return found | account


def say_break_even(account: Json, console: Console) -> None:
    """The account in sentences."""
    if "unknown" in account:
        console.say(f"what caching saves is not known: {account['unknown']}; to measure it: {account['next']}")
        return
    share = f"{100 * account['encoder_share_of_step']:.3g} % of a step"
    epochs, views = account["epochs"], account["break_even_epochs"]
    lines = [
        f"encoding on the fly would be {share}: {1e3 * account['encoder_seconds_per_view']:.3g} ms a view and"
        f" {1e3 * account['transformer_seconds_per_image']:.3g} ms of training an image ({account['measured']})",
        f"the latents cost {duration(account['seconds_to_encode'])} once and {size(account['bytes'])} of disk, and save"
        f" {duration(account['seconds_saved_per_epoch'])} an epoch: even after {views} of {epochs:.3g} epochs",
    ]
    saved = account["seconds_saved"]
    if account["pays"]:
        lines.append(f"caching pays: {duration(saved)} over the run")
    else:
        why = f"the encoder is only {share}" if epochs > views else f"{epochs:.3g} epochs encode no more than it does"
        over = f"it saves {duration(saved)} over the run" if saved >= 0 else f"it costs {duration(-saved)} over the run"
        lines.append(
            f"caching does not pay by its time: {why}, {over}; what remains is image decoding, the encoder's memory and"
            " every further run on the same latents"
        )
    for line in lines:
        console.say(line)


def _recorded(pipeline: Pipeline) -> Json | str:
    """Seconds per view and per image as this workspace's artifacts of the same sizes noted them, or what is missing."""
    encode, train = (pipeline.config.model_dump(mode="json")[name] for name in ("encode", "train_dit"))
    alike = [one for one in pipeline.workspace.artifacts("latents") if _encoded_alike(one, encode, pipeline)]
    paces = [one for one in alike if one.manifest.metrics.get("images_per_second")]
    if not paces:
        return "nothing has been encoded here by this encoder at this size"
    latents = {one.id for one in alike}
    speeds = [
        one
        for one in pipeline.workspace.artifacts("dit")
        if one.manifest.inputs.get("latents", {}).get("id") in latents
        and one.manifest.metrics.get("images_per_s")
        and _same(one.manifest.config.get("train_dit", {}), train, _TRAINS_ALIKE)
    ]
    pairs = [(pace, speed) for pace in paces for speed in speeds if _machine(pace) == _machine(speed)]
    if not pairs:
        where = "on the device and the number of processes that encoded" if speeds else "on these latents here"
        return f"no transformer of this size and batch has been trained {where}"
    pace, speed = max(pairs, key=lambda pair: [str(one.manifest.provenance.get("created")) for one in pair])
    numbers = speed.manifest.metrics
    return {
        "encoder_seconds_per_view": 1 / pace.manifest.metrics["images_per_second"] / pace.manifest.metrics["views"],
        "transformer_seconds_per_image": (1 - numbers.get("data_wait", 0.0)) / numbers["images_per_s"],
        "shape": pace.manifest.metrics["shape"],
        "measured": f"as latents/{pace.id} and dit/{speed.id} noted, on {_machine(pace)}",
    }


def _encoded_alike(artifact: Artifact, encode: Json, pipeline: Pipeline) -> bool:
    recipe = artifact.manifest.recipe
    settings = artifact.manifest.config.get("encode", {})
    return recipe.get("weights") == pipeline.encoder_source.digests and _same(settings, encode, _ENCODES_ALIKE)


def _same(one: Json, other: Json, keys: tuple[str, ...]) -> bool:
    return all(one.get(key) == other.get(key) for key in keys if key in one)


def _machine(artifact: Artifact) -> str:
    told = artifact.manifest.provenance
    return f"{told.get('device')}, {told.get('processes', 1)} process(es)"


def _timed(pipeline: Pipeline, device: str) -> Json:
    """Seconds per view and per image of a few batches and steps on this machine."""
    from rae.stages.encode import time_encoding
    from rae.stages.train_dit import time_step

    kind = launch.device_of(device)
    encode, train = pipeline.section("encode", EncodeSection), pipeline.section("train_dit", TrainDitSection)
    token_dim, grid = pipeline.geometry()
    num_classes = train.num_classes if train.num_classes is not None else pipeline.train.num_classes
    images_per_second = time_encoding(encode, pipeline.train, pipeline.encoder_source, kind)
    return {
        "encoder_seconds_per_view": 1 / images_per_second / encode.views,
        "transformer_seconds_per_image": time_step(train, (token_dim, *grid), num_classes, kind) / train.batch_size,
        "shape": [token_dim, *grid],
        "measured": f"timed now on {launch.device_name(kind)}",
    }
