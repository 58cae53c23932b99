"""Hints about files that were hashed before, in the user's cache folder, so that nobody waits for it twice.

A hint is found by path, size and modification time, and believed no further than that: readers check what they read
against it. A cache that can't be read or written costs time, nothing else.
"""

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from rae.store.cache import cache_folder
from rae.store.errors import ConfigError


def load(name: str) -> Any:
    """The JSON document remembered under `name`, or None."""
    try:
        return json.loads(_place(name).read_bytes())
    except (OSError, ConfigError, ValueError):
        return None


def save(name: str, document: Any) -> None:
    """Remember a JSON document under `name`, if the cache can be written."""
    try:
        place = _place(name)
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=place.parent, suffix=".partial", delete=False) as file:
            try:
                json.dump(document, file, separators=(",", ":"))
                file.close()
                os.replace(file.name, place)
            except BaseException:
                os.unlink(file.name)
                raise
    except (OSError, ConfigError):
        return


def stamp(path: Path) -> tuple[int, int]:
    """What must be unchanged for a hint to be used: size in bytes, modification time in ns."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _place(name: str) -> Path:
    return cache_folder() / "index" / f"{hashlib.sha256(os.fsencode(name)).hexdigest()[:32]}.json"
