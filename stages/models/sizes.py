"""The sizes that papers call S, B, L and XL, as the numbers they stand for. Light: no torch."""

import difflib
from collections.abc import Mapping
from typing import Any

Size = Mapping[str, int | tuple[int, ...]]

# The decoder (RAE paper, section 3); the MLP of XL is as wide as that of L.
VIT_SIZES: dict[str, dict[str, int]] = {
    "S": {"hidden_size": 384, "depth": 12, "num_heads": 6, "intermediate_size": 1536},
    "B": {"hidden_size": 768, "depth": 12, "num_heads": 12, "intermediate_size": 3072},
    "L": {"hidden_size": 1024, "depth": 24, "num_heads": 16, "intermediate_size": 4096},
    "XL": {"hidden_size": 1152, "depth": 28, "num_heads": 16, "intermediate_size": 4096},
}

# The transformer: a DiT body (Peebles and Xie, 2023, table 1), for DiT-DH with the head of the RAE paper's section 5.
_BODIES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}
_HEAD = (2048, 2, 16)
_KEYS = ("hidden_size", "depth", "num_heads")
DIT_SIZES: dict[str, dict[str, dict[str, tuple[int, ...]]]] = {
    "LightningDiT": {
        name: {key: (number,) for key, number in zip(_KEYS, body, strict=True)} for name, body in _BODIES.items()
    },
    "DiT-DH": {name: dict(zip(_KEYS, zip(body, _HEAD, strict=True), strict=True)) for name, body in _BODIES.items()},
}


def expand_size(settings: Any, sizes: Mapping[str, Size]) -> Any:
    """Settings whose `size`, if they have one, is replaced by the numbers that it stands for in `sizes`.

    Settings are not changed but copied; what is no mapping is left for others to refuse.

    Raises:
        ValueError: an unknown size, or one beside a number that it stands for.
    """
    if not isinstance(settings, Mapping) or "size" not in settings:
        return settings
    others = {key: value for key, value in settings.items() if key != "size"}
    if settings["size"] is None:
        return others
    size = str(settings["size"])
    if size not in sizes:
        near = difflib.get_close_matches(size.upper(), sizes, n=1, cutoff=0.5)
        guess = f" (did you mean `{near[0]}`?)" if near else ""
        raise ValueError(f"there is no `size` {size}{guess}: it is one of {', '.join(sizes)}")
    if given := [key for key in sizes[size] if others.get(key) is not None]:
        raise ValueError(
            f"`size` {size} says what `{given[0]}` is: give one of them (null takes back what a preset says)"
        )
    return {**others, **sizes[size]}
