"""The image files that the rows of a latent store were made of, found again and held against their digests."""

import hashlib

import numpy as np

from rae.store.errors import StaleInput
from rae.store.latents import LatentStore
from rae.store.latents_index import PARTS_FILE, PARTS_SCHEMA, integers, read_columns
from rae.store.source import Source


class StoredImages:
    """The images of the rows of `store`, read from `source`, wherever its shards stand there now.

    A shard is found by its digest, a sample by its place in it. Raises `StaleInput` if the source lacks a shard.
    """

    def __init__(self, store: LatentStore, source: Source) -> None:
        self._store, self._source, self._digests = store, source, store.image_digests
        parts = read_columns(store.folder / PARTS_FILE, PARTS_SCHEMA, ["source_sha256", "first_sample"])
        firsts = {shard.sha256: shard.first for shard in source.shards}
        made_of = parts["source_sha256"].to_pylist()
        if missing := {digest for digest in made_of if digest not in firsts}:
            raise StaleInput(
                f"the latents {store.folder} were made of other images: {len(missing)} of their {len(set(made_of))}"
                f" source shards are not among the {len(firsts)} that are given (sha256 {min(missing)[:16]}...)"
            )
        self._first_row = np.array([firsts[digest] for digest in made_of]) + integers(parts, "first_sample")

    def read(self, row: int) -> bytes:
        """The image file of a row of the store, of the very bytes that were encoded; `StaleInput` names any other."""
        part, place = (int(found[0]) for found in self._store.places(np.array([row])))
        data = self._source.read(int(self._first_row[part]) + place)
        if hashlib.sha256(data).digest() != self._digests[row].tobytes():
            (key,) = self._store.keys_of([row])
            raise StaleInput(f"the image `{key}` is not the one that was encoded: its bytes have another sha256")
        return data
