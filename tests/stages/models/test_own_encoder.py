"""An encoder of your own: what it must declare, what names its results, and that it is left as it was."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rae as api
from rae.stages.models.encoders import describe, encoder_geometry, load_encoder
from rae.stages.models.geometry import input_size_for
from rae.stages.models.own_encoder import OwnEncoder, own_encoder
from rae.stages.models.weights import locate_encoder
from rae.store.errors import ConfigError, StaleInput


class Patches(nn.Module):
    """Tokens of 8-pixel patches: 6 channels of a fixed convolution, with noise unless it is in eval mode."""

    version = "1"

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.conv = nn.Conv2d(3, 6, 8, stride=8)
        self.dropout = nn.Dropout(0.5)

    def forward(self, images: Tensor) -> Tensor:
        tokens: Tensor = self.dropout(self.conv(images))
        return tokens


class Answer(nn.Module):
    """Gives whatever it is told to."""

    version = "1"

    def __init__(self, answer: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, images: Tensor) -> Any:
        return self.answer(images)


def images(count: int = 2, size: int = 32) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def test_its_tokens_are_those_of_the_module_in_eval_mode() -> None:
    module = Patches()
    encoder = load_encoder(own_encoder(module), 32)
    assert (encoder.token_dim, encoder.grid) == encoder_geometry(own_encoder(module), 32) == (6, (4, 4))
    torch.testing.assert_close(encoder(images()), module.conv(images()))  # images in [0, 1], as they are
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    shown = images().requires_grad_()
    encoder(shown).square().sum().backward()
    assert shown.grad is not None  # which a perceptual loss needs


def test_the_module_is_left_as_it_was() -> None:
    module = Patches().train()
    module.dropout.eval()
    load_encoder(own_encoder(module), 32)(images())
    api.encode(images(), module)
    assert module.training
    assert not module.dropout.training
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_encoding_arrays_runs_it_where_it_lies() -> None:
    module = Patches().double()
    module.forward = lambda shown: module.conv(shown.double())  # type: ignore[method-assign]
    tokens = api.encode(images(), module, version="2")
    assert (tokens.shape, tokens.dtype) == ((2, 6, 4, 4), torch.float32)
    assert api.encode(images(), Patches(), input_size=64).shape == (2, 6, 8, 8)
    module.input_size = 16
    assert api.encode(images(), module).shape == (2, 6, 2, 2)


def test_description_says_what_it_is() -> None:
    module = Patches()
    module.input_size, module.mean, module.std = 48, (0.4, 0.5, 0.6), [0.1, 0.2, 0.3]
    source = own_encoder(module, version="2 beta", name="patches")
    assert input_size_for(source, 256) == 48
    assert input_size_for(source, 256, asked=64) == 64
    assert describe(load_encoder(source)) == {
        "name": "patches",
        "kind": "own",
        "token_dim": 6,
        "grid": [6, 6],
        "input_size": 48,
        "mean": [0.4, 0.5, 0.6],
        "std": [0.1, 0.2, 0.3],
        "digest": source.digest,
        "feature_index": None,
        "version": "2 beta",
    }


def test_without_attributes_images_are_taken_as_they_are() -> None:
    source = own_encoder(Patches())
    assert (source.mean, source.std) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert input_size_for(source, 40) == 40
    with pytest.raises(ConfigError, match="no attribute `input_size`"):
        load_encoder(source)


class Renamed(Patches):
    pass


def test_the_digest_covers_weights_class_version_and_preprocessing() -> None:
    resized, tinted = Patches(), Patches()
    resized.input_size = 64
    tinted.mean = (0, 0, 0)
    others = [Patches(seed=1), Patches().bfloat16(), Renamed(), resized, tinted]
    digests = [own_encoder(module).digest for module in (Patches(), *others)]
    digests.append(own_encoder(Patches(), version="2").digest)
    assert len(set(digests)) == 7
    assert own_encoder(Patches(), name="other").digest == own_encoder(Patches()).digest == digests[0]


def test_a_state_that_has_no_digest_is_refused() -> None:
    module = Patches()
    module.dropout.__class__ = type("Stateful", (nn.Dropout,), {"get_extra_state": lambda _: "words"})
    with pytest.raises(ConfigError, match=r"holds `dropout\._extra_state`, which is no tensor"):
        own_encoder(module).digest  # noqa: B018


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"version": None}, r"Patches` declares no version.*`version = \"1\"`"),
        ({"version": 3}, "declares no version"),
        ({"input_size": "large"}, "`input_size` of the encoder `.*Patches` is no number of pixels: 'large'"),
        ({"mean": 0.5}, "`mean` of the encoder `.*Patches` is not three numbers: 0.5"),
        ({"std": (1, 2)}, "`std` of the encoder `.*Patches` is not three numbers"),
        ({"std": (1, 0, 1)}, "`std` of the encoder `.*Patches` is not three numbers above zero"),
    ],
)
def test_what_it_must_declare(change: dict[str, Any], says: str) -> None:
    module = Patches()
    for key, value in change.items():
        setattr(module, key, value)
    with pytest.raises(ConfigError, match=says):
        own_encoder(module)
    with pytest.raises(ConfigError, match=says):
        api.encode(images(), module)


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (lambda shown: shown.flatten(2), r"returns \[2, 3, 1024\] for images \[2, 3, 32, 32\]"),
        (lambda shown: shown[:1], r"returns \[1, 3, 32, 32\] .* here \[2, C, H, W\]"),
        (lambda shown: [shown], "returns a list; tokens are a tensor"),
        (lambda shown: shown.long(), r"returns a tensor of torch\.int64"),
        (lambda shown: shown / 0, "returns tokens that are not finite"),
        (lambda shown: shown @ shown[:, :, :5], r"fails on images \[2, 3, 32, 32\] \(RuntimeError"),
    ],
)
def test_what_is_no_tokens_is_refused_before_anything_is_encoded(answer: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load_encoder(own_encoder(Answer(answer)), 32)


def test_a_function_is_no_module() -> None:
    with pytest.raises(ConfigError, match=r"is a function and no torch\.nn\.Module"):
        own_encoder(images, version="1")  # type: ignore[arg-type]


def test_feature_index_is_timms() -> None:
    with pytest.raises(ConfigError, match="`feature_index` chooses a map of a timm encoder"):
        encoder_geometry(own_encoder(Patches()), 32, feature_index=1)


PACKAGE = """
import torch
from torch import nn

class Mean(nn.AvgPool2d):
    version = "7"

def mean():
    return Mean(8)

def broken():
    raise RuntimeError("no weights\\nhere")

def words():
    return "words"
"""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package on the path that offers encoders, as pip would have installed it."""
    (tmp_path / "averages.py").write_text(PACKAGE)
    metadata = tmp_path / "averages-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: averages\nVersion: 1.0\n")
    names = ("mean", "broken", "words", "missing")
    (metadata / "entry_points.txt").write_text(
        "[rae.encoders]\n" + "".join(f"{name} = averages:{name}\n" for name in names)
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "averages", raising=False)


@pytest.mark.usefixtures("installed")
def test_an_entry_point_is_found_by_its_name() -> None:
    source = locate_encoder("mean")
    assert isinstance(source, OwnEncoder)
    assert (source.name, source.version) == ("mean", "7")
    assert source.digests["class"] == "averages.Mean"
    assert api.encode(images(), "mean").shape == (2, 3, 4, 4)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("broken", r"cannot be made by its entry point averages:broken \(RuntimeError: no weights here\)"),
        ("missing", r"cannot be made by its entry point averages:missing \(AttributeError"),
        ("words", r"the encoder `words` is a str and no torch\.nn\.Module"),
        ("meen", "or an entry point of the group `rae.encoders`; did you mean `mean`"),
    ],
)
def test_entry_points_that_make_no_encoder(name: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        locate_encoder(name)


def test_the_same_name_from_two_packages_is_refused(
    installed: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    metadata = other / "others-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: others\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[rae.encoders]\nmean = others:mean\n")
    monkeypatch.syspath_prepend(other)
    with pytest.raises(ConfigError, match="several installed packages offer an encoder `mean`: averages:mean, others:"):
        locate_encoder("mean")


def test_stale_input_names_what_changed() -> None:
    from rae.stages.models.compatible import check_compatible

    one, other = (describe(load_encoder(own_encoder(Patches(seed)), 32)) for seed in (0, 1))
    check_compatible(one, one)
    with pytest.raises(StaleInput, match=r"encoder\.digest"):
        check_compatible(one, other, "this encoder")
