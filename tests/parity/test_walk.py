"""The walk leaves nothing out: a fixture that differs by one number fails, and so does one that no check claims."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import save_file

from parity.fixture import fixtures, read
from parity.walk import check, kind_of

HERE = Path(__file__).parent
KINDS = sorted({kind_of(path) for path in fixtures(HERE)})
# What each kind of fixture says that our numbers must be. Of weights after training one stands for all.
OUTPUTS = {
    "DiTwDDTHead": r"io/(forward|cfg|autoguidance|ode).*",
    "LightningDiT": r"io/(forward|cfg|autoguidance|ode).*",
    "center_crop": r"out/.*",
    "decoder": r"io/(logits|image)",
    "decoder_training": r"ema/decoder_pred.weight",
    "discriminator": r"logits",
    "dit_training": r"io/(losses|lrs|grad_norms)|(final|ema)/x_embedder.proj.weight",
    "encoder": r"latent",
    "official_state_dicts": r".*",
    "transport": r"(loss|xt|ut|score|ode_drift|shifted_time)/.*",
}


def smallest(kind: str) -> Path:
    """Our smallest fixture of a kind."""
    return min(
        (path for path in fixtures(HERE) if kind_of(path) == kind), key=lambda path: numbers(path).stat().st_size
    )


def numbers(path: Path) -> Path:
    """The file with a fixture's inputs and outputs."""
    return path / "parity.safetensors" if path.is_dir() else path


def outputs(path: Path) -> list[str]:
    """Names of the outputs in a fixture."""
    file = numbers(path)
    if file.suffix == ".safetensors":
        names = list(read(file)[1])
    else:
        names = list(json.loads(file.read_text())) if file.suffix == ".json" else np.load(file).files
    return [name for name in names if re.fullmatch(OUTPUTS[kind_of(path)], name)]


def alter(path: Path, output: str) -> None:
    """Change the last number of one output, beyond every tolerance."""
    file = numbers(path)
    if file.suffix == ".json":
        state_dicts = json.loads(file.read_text())
        *_, shape = state_dicts[output].values()
        shape[-1] += 1
        file.write_text(json.dumps(state_dicts))
    elif file.suffix == ".npz":
        arrays = dict(np.load(file))
        arrays[output].flat[-1] ^= 1
        np.savez(file, **arrays)
    else:
        about, tensors = read(file)
        last = tensors[output].view(-1)[-1:]
        last += 0.01 * (1 + last.abs())
        save_file(tensors, file, about)


def copied(path: Path, target: Path) -> Path:
    if path.is_dir():
        shutil.copytree(path, target, dirs_exist_ok=True)
    else:
        shutil.copy(path, target)
    return target


@pytest.mark.parametrize("kind", KINDS)
def test_every_output_counts(kind: str, tmp_path: Path) -> None:
    original = smallest(kind)
    names = outputs(original)
    assert names
    for name in names:
        altered = copied(original, tmp_path / original.name)
        alter(altered, name)
        with pytest.raises(AssertionError):
            check(altered)


@pytest.mark.parametrize("name", ["mystery.safetensors", "mystery.npz", "mystery.json"])
def test_a_file_that_no_check_claims_fails(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if path.suffix == ".safetensors":
        save_file(read(smallest("discriminator"))[1], path)
    else:
        path.write_text("{}")
    assert fixtures(tmp_path) == [path]
    with pytest.raises(AssertionError, match="no check claims"):
        check(path)


def test_an_unknown_output_fails(tmp_path: Path) -> None:
    for kind, known, unknown in (("transport", "ut/VP", "sde/VP"), ("DiTwDDTHead", "io/forward", "io/forward_twice")):
        about, tensors = read(smallest(kind))
        save_file(tensors | {unknown: tensors[known].clone()}, tmp_path / f"{kind}.safetensors", about)
        with pytest.raises(AssertionError, match="unknown output"):
            check(tmp_path / f"{kind}.safetensors")


def test_a_folder_without_fixtures_fails(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("what these files are")
    assert fixtures(tmp_path) == [tmp_path]
    with pytest.raises(AssertionError, match="no fixture"):
        check(tmp_path)


def test_folders_below_are_walked(tmp_path: Path) -> None:
    encoder, decoder = smallest("encoder"), smallest("decoder")
    (tmp_path / "more" / "ours").mkdir(parents=True)
    copies = [copied(encoder, tmp_path / "more" / "vit"), copied(decoder, tmp_path / "more" / "ours" / decoder.name)]
    assert sorted(fixtures(tmp_path)) == sorted(copies)
    for copy in copies:
        check(copy)


@pytest.mark.parametrize("kind", ["DiTwDDTHead", "LightningDiT", "decoder", "dit_training"])
def test_a_fixture_without_a_kind_is_known_by_its_name(kind: str, tmp_path: Path) -> None:
    original = smallest(kind)
    about, tensors = read(original)
    del about["kind"]
    save_file(tensors, tmp_path / original.name, about)
    check(tmp_path / original.name)
