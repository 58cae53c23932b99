"""Leases: objects that say what somebody is at work on, so that `rae gc` stays away from it.

WORKSPACE/leases/RANDOM.json    {"holds": ["KIND/ID", ...]}, written anew while the work goes on

Nothing is correct because of a lease: who works takes none away from others, and what a lease that lapsed too early
let vanish is made again.
"""

import json
import logging
import secrets
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from rae.store.errors import RaeError
from rae.store.remote import ObjectStore, Stored

RENEWED_EVERY_S = 30.0
LAPSES_AFTER_S = 600.0

_FOLDER = "leases"
logger = logging.getLogger(__name__)


@contextmanager
def held(objects: ObjectStore, refs: Iterable[str]) -> Iterator[None]:
    """Keep `KIND/ID`s from being collected while the body runs, and what they were made from."""
    key, data = f"{_FOLDER}/{secrets.token_hex(8)}.json", json.dumps({"holds": sorted(refs)}).encode()
    done = threading.Event()

    def renew() -> None:
        while not done.wait(RENEWED_EVERY_S):
            try:
                objects.replace(key, data)
            except (OSError, RaeError) as error:  # the work itself will tell what a person has to do
                logger.warning("the lease %s could not be renewed (%s)", key, error)

    objects.replace(key, data)
    thread = threading.Thread(target=renew, name="lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        try:
            objects.remove(key)
        except (OSError, RaeError) as error:  # it lapses by itself, and must not hide how the work ended
            logger.warning("the lease %s could not be removed (%s)", key, error)


def leased(objects: ObjectStore) -> set[str]:
    """The `KIND/ID`s that somebody is at work on."""
    held = (objects.read(one.key) for one in _leases(objects) if not _has_lapsed(one))
    return {ref for data in held if data is not None for ref in _holds(data)}


def lapsed(objects: ObjectStore) -> list[str]:
    """The keys of leases that nobody has renewed for ten minutes: their processes were killed."""
    return [one.key for one in _leases(objects) if _has_lapsed(one)]


def _leases(objects: ObjectStore) -> Iterator[Stored]:
    return (one for one in objects.below(_FOLDER) if one.key.endswith(".json"))


def _has_lapsed(lease: Stored) -> bool:
    return time.time() - lease.written >= LAPSES_AFTER_S


def _holds(data: bytes) -> set[str]:
    try:
        return {str(ref) for ref in json.loads(data)["holds"]}
    except (ValueError, KeyError, TypeError):
        logger.warning("a lease cannot be read: %.40r", data)
        return set()
