"""The class names that lie beside images: a JSON list of strings, in the order of the labels."""

from pathlib import Path

from rae.store.errors import CorruptData
from rae.store.json_data import parse_json


def read_classes(path: Path) -> tuple[str, ...] | None:
    """The names in `path`, or None if there is no such file. Raises `CorruptData` if it is no list of names."""
    try:
        return parse_classes(path.read_bytes(), str(path))
    except FileNotFoundError:
        return None


def parse_classes(data: bytes, where: str) -> tuple[str, ...]:
    """The names in the bytes of a file that lies at `where`; raises as `read_classes` does."""
    names = parse_json(data, where)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CorruptData(f"{where} is not a list of class names")
    return tuple(names)
