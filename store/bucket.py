"""Objects of S3, GCS or Azure, through obstore: what `rae.store.remote` promises, kept with conditional requests.

A web server's files (http, https) can be read as well.
"""

import contextlib
import datetime
import hashlib
import os
import random
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

from rae.store.errors import ConfigError, MissingInput, PartialResult
from rae.store.remote import BLOCK_BYTES, Stored, check_same, checked

T = TypeVar("T")

_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|SAS", re.IGNORECASE)
_ATTEMPTS = 5


@dataclass(frozen=True)
class Bucket:
    """A bucket, or what lies below a prefix in it. Objects carry their sha256 as metadata."""

    place: str

    def __getstate__(self) -> dict[str, str]:
        return {"place": self.place}  # other processes connect for themselves

    def create(self, key: str, data: bytes) -> bool:
        import obstore

        about: Any = {"sha256": hashlib.sha256(data).hexdigest()}
        try:
            self._ask(key, lambda: obstore.put(self._store, key, data, mode="create", attributes=about))
        except FileExistsError:
            # A request that was sent again after its answer was lost meets what it has stored itself.
            return self.read(key) == data
        return True

    def replace(self, key: str, data: bytes) -> None:
        import obstore

        about: Any = {"sha256": hashlib.sha256(data).hexdigest()}
        self._ask(key, lambda: obstore.put(self._store, key, data, attributes=about))

    def read(self, key: str) -> bytes | None:
        import obstore

        try:
            return self._ask(key, lambda: bytes(obstore.get(self._store, key).bytes()))
        except FileNotFoundError:
            return None

    def read_ranges(self, key: str, starts: Sequence[int], sizes: Sequence[int]) -> list[Any]:
        import obstore

        try:
            return self._ask(key, lambda: list(obstore.get_ranges(self._store, key, starts=starts, lengths=sizes)))
        except FileNotFoundError as error:
            raise MissingInput(f"{self.place}/{key} is missing") from error

    def stream(self, key: str) -> Iterator[bytes]:
        import obstore

        try:
            size = self._ask(key, lambda: obstore.head(self._store, key))["size"]
        except FileNotFoundError as error:
            raise MissingInput(f"{self.place}/{key} is missing") from error
        # By range, so that a connection that breaks costs a block and not all of it.
        for start in range(0, size, BLOCK_BYTES):
            yield bytes(self.read_ranges(key, [start], [min(BLOCK_BYTES, size - start)])[0])

    def write(self, key: str, blocks: Iterable[bytes], size: int, sha256: str) -> None:
        import obstore

        where = f"{self.place}/{key}"
        if size <= BLOCK_BYTES:
            if not self.create(key, b"".join(checked(blocks, size, sha256, where))):
                check_same(self, key, sha256)
            return
        # What takes several requests can't create-if-absent: who writes such objects has claimed their names before.
        if self.digest(key) is not None:
            check_same(self, key, sha256)
            return
        about: Any = {"sha256": sha256}
        with self._translated(key):
            obstore.put(self._store, key, checked(blocks, size, sha256, where), attributes=about)

    def below(self, prefix: str) -> Iterator[Stored]:
        import obstore

        with self._translated(prefix):
            for some in obstore.list(self._store, prefix or None):
                for one in some:
                    yield Stored(one["path"], one["size"], one["last_modified"].timestamp())

    def folders(self, prefix: str) -> list[str]:
        import obstore

        found = self._ask(prefix, lambda: obstore.list_with_delimiter(self._store, prefix or None))
        return sorted(path.rpartition("/")[2] for path in found["common_prefixes"])

    def digest(self, key: str) -> str | None:
        import obstore

        try:
            found = self._ask(key, lambda: obstore.get(self._store, key, options={"head": True}))
        except FileNotFoundError:
            return None
        if (known := found.attributes.get("sha256")) is not None:
            return str(known)
        digest = hashlib.sha256()  # it was stored by others
        for block in self.stream(key):
            digest.update(block)
        return digest.hexdigest()

    def written(self, key: str) -> float | None:
        import obstore

        try:
            found = self._ask(key, lambda: obstore.head(self._store, key))
        except FileNotFoundError:
            return None
        return float(found["last_modified"].timestamp())

    def version(self, key: str) -> tuple[int, str] | None:
        """An object's size in bytes, and what changes with its content; None if there is none."""
        import obstore

        try:
            found = self._ask(key, lambda: obstore.head(self._store, key))
        except FileNotFoundError:
            return None
        return int(found["size"]), str(found["e_tag"] or found["last_modified"])

    def remove(self, key: str) -> None:
        import obstore

        # A key that is a prefix of others is a folder: S3 knows none, and lists by whole segments.
        for one in [key, *(stored.key for stored in self.below(key))]:
            with contextlib.suppress(FileNotFoundError):
                self._ask(one, lambda one=one: obstore.delete(self._store, one))  # type: ignore[misc]

    @cached_property
    def _store(self) -> Any:
        try:
            from obstore.store import from_url
        except ImportError as error:
            raise MissingInput(
                f"{self.place} needs a package that is not installed (obstore)", "pip install 'rae-pipeline[remote]'"
            ) from error
        retries: Any = {
            "max_retries": 20,
            "retry_timeout": datetime.timedelta(seconds=_patience_s()),
            "backoff": {
                "init_backoff": datetime.timedelta(milliseconds=100),
                "max_backoff": datetime.timedelta(seconds=10),
                "base": 2,
            },
        }
        client: Any = {"connect_timeout": "10s", "timeout": "120s", "pool_max_idle_per_host": "64"}
        if any(url.startswith("http://") for url in (self.place, os.environ.get("AWS_ENDPOINT_URL", ""))):
            client["allow_http"] = True
        with self._translated(""):
            return from_url(self.place, client_options=client, retry_config=retries)

    def _ask(self, key: str, request: Callable[[], T]) -> T:
        """The answer to a request that may be sent twice. `FileNotFoundError` and `FileExistsError` are answers.

        The library sends again what was refused or not answered at all; here are those whose answer broke off.
        """
        if _parents_runtime:
            raise ConfigError(
                f"{self.place} can't be read in a process that was forked from one that read from a bucket: start"
                " workers with multiprocessing_context='spawn', or read batches in threads"
            )
        began = time.monotonic()
        for attempt in range(_ATTEMPTS):
            try:
                with self._translated(key):
                    return request()
            except PartialResult:
                if attempt + 1 == _ATTEMPTS or time.monotonic() - began > _patience_s():
                    raise
                time.sleep(random.uniform(0.05, 0.1) * 2**attempt)
        raise AssertionError("unreachable: the last attempt returns or raises")

    @contextlib.contextmanager
    def _translated(self, key: str) -> Iterator[None]:
        """The library's errors in a person's words, without what they quote of requests."""
        from obstore import exceptions

        where = f"{self.place}/{key}" if key else self.place
        try:
            yield
        except exceptions.AlreadyExistsError as error:
            raise FileExistsError(where) from error
        except (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError) as error:
            hint = "are the credentials in the environment (AWS_ACCESS_KEY_ID, ...) for it?"
            hint = "it must be public" if self.place.startswith("http") else hint
            raise MissingInput(f"{where}: access is refused; {hint}") from error
        except exceptions.NotSupportedError as error:
            raise MissingInput(f"{where}: the server answers no requests for ranges of a file") from error
        except (exceptions.UnknownConfigurationKeyError, exceptions.InvalidPathError) as error:
            raise ConfigError(f"{where} can't be opened ({_reason(error)})") from error
        except exceptions.BaseError as error:
            if re.search(r"/latest/|metadata\.google|/metadata/identity", str(error)):  # where machines of a cloud ask
                raise MissingInput(
                    f"no credentials for {self.place} are in the environment (AWS_ACCESS_KEY_ID, ...), and this machine"
                    " has none of its own"
                ) from error
            raise PartialResult(f"{where} does not answer ({_reason(error)}); what is done is kept") from error


_parents_runtime: list[int] = []


def _forked() -> None:
    """The library's threads stay with the parent, and requests of the child would wait for them for ever."""
    if "obstore" in sys.modules:
        _parents_runtime.append(os.getppid())


os.register_at_fork(after_in_child=_forked)


def _patience_s() -> float:
    """Seconds for which a place that does not answer is asked again."""
    return float(os.environ.get("RAE_REMOTE_PATIENCE_S", "60"))


def _reason(error: Exception) -> str:
    """One line of an error, without anything that the environment keeps secret."""
    text = str(error).partition("\n")[0]
    for name, value in os.environ.items():
        if _SECRET.search(name) and len(value) > 3:
            text = text.replace(value, "***")
    return text if len(text) <= 200 else text[:197] + "..."
