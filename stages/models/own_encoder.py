"""An encoder of your own: a module instead of files, handed over in Python or found by the name of an entry point.

Light: what needs torch imports it when it is called, since an encoder of files needs none of this.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, Literal

from rae.store.errors import ConfigError, RaeError
from rae.store.manifest import canonical

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

Triple = tuple[float, float, float]
ENTRY_POINTS = "rae.encoders"


@dataclass(frozen=True, eq=False)
class OwnEncoder:
    """A module that maps images [B, 3, S, S] in [0, 1] to tokens [B, C, H, W], and what names its results.

    Attributes:
        name: of its entry point, else of its class.
        module: it is run as it is handed over, and never changed: in eval mode, without gradients to its weights.
        version: its author's word for what its code computes, since the digest covers weights alone.
        input_size: side in pixels that images are resized to for it; None takes them as they are.
        mean, std: of [0, 1] pixels, per channel; a decoder's output is un-normalised with them. The module itself gets
            images in [0, 1].
    """

    name: str
    module: "nn.Module"
    version: str
    input_size: int | None
    mean: Triple
    std: Triple
    kind: Literal["own"] = "own"

    @cached_property
    def digests(self) -> dict[str, str]:
        """What determines the tokens: class, version, preprocessing, and the sha256 of the state dict.

        Raises:
            ConfigError: the state dict holds what has no digest.
        """
        import torch

        from rae.stages.models.saving import digest_weights

        state = self.module.state_dict()
        if other := [key for key, value in state.items() if not isinstance(value, torch.Tensor)]:
            raise ConfigError(f"the state dict of the encoder `{self.name}` holds `{other[0]}`, which is no tensor")
        preprocessing = {"input_size": self.input_size, "mean": self.mean, "std": self.std}
        return {
            "class": class_name(self.module),
            "version": self.version,
            "preprocessing": canonical(preprocessing).decode(),
            "state_dict": digest_weights(state),
        }

    @property
    def digest(self) -> str:
        """One sha256 for all of them."""
        return hashlib.sha256(canonical(self.digests)).hexdigest()

    def tokens(self, images: "Tensor") -> "Tensor":
        """Tokens [B, C, H, W] of images [B, 3, S, S] in [0, 1], where the module lies; raises as `checked` does."""
        with evaluating(self.module):
            return checked(self.module(images.to(_device(self.module))), images, self.name)

    def geometry(self, input_size: int) -> tuple[int, tuple[int, int]]:
        """Token width and grid (rows, columns) for images of `input_size` pixels, from a forward pass of two images.

        Raises:
            ConfigError: it fails on them, or returns what are no tokens or not finite.
        """
        import torch

        images = torch.linspace(0, 1, 6 * input_size**2).reshape(2, 3, input_size, input_size)
        try:
            with torch.no_grad():
                tokens = self.tokens(images)
        except RaeError:
            raise
        except Exception as error:
            raise ConfigError(
                f"the encoder `{self.name}` fails on images {list(images.shape)} ({_in_a_line(error)})"
            ) from error
        if not tokens.isfinite().all():
            raise ConfigError(f"the encoder `{self.name}` returns tokens that are not finite")
        _, channels, rows, columns = tokens.shape
        return channels, (rows, columns)


def own_encoder(module: "nn.Module", version: str | None = None, name: str | None = None) -> OwnEncoder:
    """Describe a module of one's own.

    Args:
        module: maps images [B, 3, S, S] in [0, 1] to tokens [B, C, H, W]. It may have the attributes `version`,
            `input_size` (default: images as they are), `mean` and `std` (default: 0.5 per channel).
        version: what stands for its code; by default the module's attribute. A change of either makes other artifacts.
        name: what messages and manifests call it; by default its class.

    Raises:
        ConfigError: no module, no version, or an attribute that is not what it should be.
    """
    from torch import nn

    name = name or class_name(module)
    if not isinstance(module, nn.Module):
        raise ConfigError(f"the encoder `{name}` is a {type(module).__name__} and no torch.nn.Module")
    version = getattr(module, "version", None) if version is None else version
    if not isinstance(version, str) or not version:
        raise ConfigError(
            f"the encoder `{name}` declares no version, which stands for its code in what is made with it: give it an"
            ' attribute `version = "1"`, or say `version="1"` where you hand it over'
        )
    input_size = getattr(module, "input_size", None)
    if input_size is not None and (type(input_size) is not int or input_size < 1):
        raise ConfigError(f"`input_size` of the encoder `{name}` is no number of pixels: {input_size!r}")
    return OwnEncoder(name, module, version, input_size, _triple(module, "mean", name), _triple(module, "std", name))


def find_entry_point(name: str) -> OwnEncoder | None:
    """The encoder that an installed package offers under `name` in the group `rae.encoders`; None if none does.

    Raises:
        ConfigError: several packages offer the name, or what it names makes no module.
    """
    found = list(entry_points(group=ENTRY_POINTS, name=name))
    if not found:
        return None
    if len(found) > 1:
        places = ", ".join(sorted(entry.value for entry in found))
        raise ConfigError(f"several installed packages offer an encoder `{name}`: {places}")
    try:
        module = found[0].load()()
    except RaeError:
        raise
    except Exception as error:
        raise ConfigError(
            f"the encoder `{name}` cannot be made by its entry point {found[0].value} ({_in_a_line(error)})"
        ) from error
    return own_encoder(module, name=name)


def entry_point_names() -> list[str]:
    """The encoders that installed packages offer."""
    return sorted(entry_points(group=ENTRY_POINTS).names)


def checked(tokens: Any, images: "Tensor", name: str) -> "Tensor":
    """What the encoder `name` returned for `images`, if it is tokens [B, C, H, W] of real numbers; else ConfigError."""
    import torch

    if not isinstance(tokens, torch.Tensor) or not tokens.is_floating_point():
        what = f"a tensor of {tokens.dtype}" if isinstance(tokens, torch.Tensor) else f"a {type(tokens).__name__}"
        raise ConfigError(f"the encoder `{name}` returns {what}; tokens are a tensor [B, C, H, W] of floats")
    if tokens.dim() != 4 or len(tokens) != len(images) or 0 in tokens.shape:
        raise ConfigError(
            f"the encoder `{name}` returns {list(tokens.shape)} for images {list(images.shape)}; tokens are"
            f" [B, C, H, W], here [{len(images)}, C, H, W]"
        )
    return tokens


@contextmanager
def evaluating(module: "nn.Module") -> Iterator[None]:
    """`module` in eval mode, then each of its parts in the mode that it had."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def _device(module: "nn.Module") -> "torch.device | str":
    return next((tensor.device for tensor in module.state_dict().values()), "cpu")


def _in_a_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def class_name(module: "nn.Module") -> str:
    """Where the module's class is defined, as `package.module.Class`."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _triple(module: "nn.Module", key: str, name: str) -> Triple:
    values = getattr(module, key, (0.5, 0.5, 0.5))
    try:
        first, second, third = (float(value) for value in values)
    except (TypeError, ValueError):
        raise ConfigError(f"`{key}` of the encoder `{name}` is not three numbers: {values!r}") from None
    if key == "std" and not min(first, second, third) > 0:
        raise ConfigError(f"`{key}` of the encoder `{name}` is not three numbers above zero: {values!r}")
    return first, second, third
