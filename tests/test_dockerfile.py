"""The Dockerfile against the Makefile. No engine is needed: it is plain enough to be read."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
INDEX = "https://download.pytorch.org/whl/cpu"


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions and their arguments, in order."""
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    assert not any(line.endswith("\\") for line in lines), "one instruction a line, so that a test can read it"
    split = [line.partition(" ") for line in lines if line and not line.startswith("#")]
    return [(word, rest.strip()) for word, _, rest in split]


def of(word: str) -> list[str]:
    return [rest for one, rest in instructions() if one == word]


def test_it_uses_plain_instructions_alone() -> None:
    words = sorted({word for word, _ in instructions()})
    assert words == ["ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "FROM", "RUN", "USER", "WORKDIR"]


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_it_installs_as_the_makefile_does() -> None:
    # Quiet about folders, which it names when a `make test` around this test runs it.
    command = [
        "make",
        "--no-print-directory",
        "-n",
        "-B",
        ".venv/installed",
        "PYTHON=python3.11",
        f"TORCH_INDEX={INDEX}",
    ]
    asked = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60, cwd=ROOT).stdout
    steps = [step for step in asked.splitlines() if not step.startswith("touch ")]
    # An image needs no editable install and no quickstart, and keeps no cache.
    steps = [re.sub(r' -e "\.\[\w+\]"$', " .", step) for step in steps]
    runs = [run.replace("$TORCH_INDEX", INDEX).replace(" --no-cache-dir", "") for run in of("RUN")]
    assert [run for run in runs if ".venv" in run] == steps
    assert len(steps) == 2


def test_cpu_and_cuda_are_a_build_argument() -> None:
    assert of("ARG") == [f"TORCH_INDEX={INDEX}"]
    text = (ROOT / "Dockerfile").read_text()
    assert re.search(r"^#.*--build-arg TORCH_INDEX=https://download\.pytorch\.org/whl/cu\d+", text, re.MULTILINE)


def test_it_runs_as_somebody_without_rights() -> None:
    words = [word for word, _ in instructions()]
    (user,) = of("USER")
    assert user not in ("root", "0")
    assert any(f"useradd --create-home {user} " in run for run in of("RUN"))
    assert "RUN" not in words[words.index("USER") :]
    assert words.index("USER") < words.index("ENTRYPOINT")
    workspace = dict(pair.split("=", 1) for pair in of("ENV")[0].split())["RAE_WORKSPACE"]
    assert any(f"chown {user} {workspace}" in run for run in of("RUN"))


def test_no_weights_are_inside() -> None:
    assert of("COPY") == [". ."]
    assert not re.search(r"quickstart|curl|wget|huggingface|hf download|https?://(?!download\.pytorch)", str(of("RUN")))
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert {".git", ".venv", "rae-workspace"} <= set(ignored)
    weights = [path for suffix in ("safetensors", "pth", "bin", "ckpt") for path in (ROOT / "rae").rglob(f"*.{suffix}")]
    assert not weights


def test_it_starts_the_command() -> None:
    assert of("ENTRYPOINT") == ['["rae"]']
    assert "/rae/.venv/bin:" in of("ENV")[0]
    assert of("WORKDIR") == ["/rae"]
