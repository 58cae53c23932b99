"""The whole pipeline where Linux's own calls are not: on macOS, and on file systems without hard links."""

import builtins
import ctypes
import errno
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rae.store import range_cache
from tests.conftest import Rae


@pytest.fixture
def without_linux(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide what Linux has and macOS has not."""
    for name in (
        "posix_fadvise",
        "sched_getaffinity",
        "sched_setaffinity",
        "copy_file_range",
        "sendfile",
        "memfd_create",
    ):
        monkeypatch.delattr(os, name, raising=False)

    class OtherLibrary:
        def __init__(self, name: str | None, *options: Any, **named: Any) -> None:
            self._library = real(name, *options, **named)

        def __getattr__(self, name: str) -> Any:
            if name == "renameat2":
                raise AttributeError(name)
            return getattr(self._library, name)

    real = ctypes.CDLL
    monkeypatch.setattr(ctypes, "CDLL", OtherLibrary)

    def hidden(open_it: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, *words: Any, **options: Any) -> Any:
            if (
                isinstance(path, str | os.PathLike)
                and os.fspath(path).startswith("/proc/")
                and not str(path).endswith("/maps")
            ):
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
            return open_it(path, *words, **options)

        return call

    # Of /proc, the list of a process's libraries stays: threadpoolctl has another way to it on a Mac.
    for module, name in ((os, "open"), (io, "open"), (builtins, "open"), (os, "listdir")):
        monkeypatch.setattr(module, name, hidden(getattr(module, name)))


@pytest.fixture
def without_links(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without hard links, such as exFAT on an external disk."""

    def refuse(*names: object, **options: object) -> None:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(os, "link", refuse)


@pytest.mark.usefixtures("without_linux")
def test_everything_runs_without_the_calls_that_macos_lacks(finished: Rae, rae: Rae) -> None:
    with pytest.raises(FileNotFoundError):
        Path("/proc/self/status").read_text()
    rae.verb("run").succeeded()
    for kind in ("latents", "decoder", "dit", "samples", "scores"):
        assert rae.payload(kind) == finished.payload(kind), kind
    assert range_cache.range_folder().name == os.uname().nodename
    rae("verify", "latents/tiny", "-w", rae.workspace).succeeded()


@pytest.mark.usefixtures("without_links")
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "renameat2"), reason="this C library has no renameat2")
def test_everything_runs_without_hard_links(finished: Rae, rae: Rae) -> None:
    rae.verb("run").succeeded()
    for kind in ("latents", "dit", "samples"):
        assert rae.payload(kind) == finished.payload(kind), kind
