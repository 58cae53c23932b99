"""An artifact of a bucket as a folder of this machine's cache, which holds what was asked for, each file verified.

`lies_at.json` in such a folder says where the artifact lies, so that whoever opens latents there reads the latents
themselves by range. It holds a URL and a key, and nothing that opens them.
"""

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rae.store.cache import cache_folder
from rae.store.errors import CorruptData
from rae.store.remote import LocalFolder, ObjectStore, open_objects

LIES_AT = "lies_at.json"
_TRANSFERS = 8


def mirror_root(place: str) -> Path:
    """The folder of the cache that a workspace at a URL is shown in."""
    return _mirrors() / hashlib.sha256(place.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Mirror:
    """`folder` shows what lies below `key` in `objects`."""

    objects: ObjectStore
    key: str
    folder: Path

    def begin(self, manifest: bytes) -> None:
        """Make the folder, with a manifest in it."""
        folder, where = LocalFolder(self.folder), {"place": self.objects.place, "key": self.key}
        for name, data in (("manifest.json", manifest), (LIES_AT, json.dumps(where).encode())):
            if folder.read(name) != data:
                folder.replace(name, data)

    def bring(self, files: Sequence[dict[str, Any]]) -> None:
        """Fetch files, as a manifest lists them, that are not there; `CorruptData` for one that is not as listed."""
        missing = [entry for entry in files if not _is_there(self.folder / entry["path"], entry["bytes"])]
        if not missing:
            return
        folder = LocalFolder(self.folder)

        def fetch(entry: dict[str, Any]) -> None:
            path, size, sha256 = (entry[key] for key in ("path", "bytes", "sha256"))
            folder.write(path, self.objects.stream(f"{self.key}/{path}"), size, sha256)

        with ThreadPoolExecutor(_TRANSFERS) as pool:
            for _ in pool.map(fetch, missing):
                pass


def mirror_at(folder: Path) -> Mirror | None:
    """What `folder` shows, if it is a mirror; None if latents lie in it themselves."""
    path = folder / LIES_AT
    if not folder.is_relative_to(_mirrors()):  # nobody else's folder sends us elsewhere
        return None
    try:
        where = json.loads(path.read_bytes())
        return Mirror(open_objects(where["place"]), where["key"], folder)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError) as error:
        raise CorruptData(f"{path} does not say where these latents lie ({error!r})", f"rm -r {folder}") from error


def _mirrors() -> Path:
    return cache_folder() / "workspaces"


def _is_there(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except FileNotFoundError:
        return False
