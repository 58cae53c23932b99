"""What comes from other places lies in a folder of this machine's own: RAE_CACHE, by default ~/.cache/rae."""

import os
from pathlib import Path

from rae.store.errors import ConfigError


def cache_folder() -> Path:
    """The cache's folder; it need not exist yet. `ConfigError` if there is no home for it."""
    if configured := os.environ.get("RAE_CACHE"):
        return Path(configured).absolute()
    # The XDG specification has relative paths ignored.
    shared = os.environ.get("XDG_CACHE_HOME", "")
    try:
        return (Path(shared) if os.path.isabs(shared) else Path.home() / ".cache") / "rae"
    except RuntimeError as error:
        raise ConfigError("there is no home folder to cache in; name a folder with RAE_CACHE") from error
