"""JSON that others may have written: parsed, or refused with the place that it stands at."""

import json
from typing import Any

from rae.store.errors import CorruptData


def parse_json(data: bytes, where: str) -> Any:
    """The value in the bytes that stand at `where`; `CorruptData` for what is not JSON, or too deep to be read."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CorruptData(f"{where} is not JSON ({error})") from error


def parse_object(data: bytes, where: str) -> dict[str, Any]:
    """As `parse_json`; `CorruptData` also for what is no JSON object."""
    value = parse_json(data, where)
    if not isinstance(value, dict):
        raise CorruptData(f"{where} holds no JSON object")
    return value
