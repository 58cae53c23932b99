"""Stores that are far larger than this machine's memory, by simulation; tests/bench/scale.py has the full size."""

import json
import subprocess
import sys
from pathlib import Path

SCALE = Path(__file__).parents[1] / "bench" / "scale.py"


def scale(*words: object) -> dict[str, float]:
    ran = subprocess.run([sys.executable, SCALE, *map(str, words)], capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(ran.stdout)
    return found


def test_finishing_holds_a_row_group_and_a_line_per_part(tmp_path: Path) -> None:
    small, large = (scale("records", tmp_path / name, rows) for name, rows in (("small", 140_000), ("large", 420_000)))
    assert large["finish_mb"] < small["finish_mb"] + 20
    assert scale("open", tmp_path / "large")["rows"] == 420_352


def test_a_million_rows_open_without_being_read(tmp_path: Path) -> None:
    scale("tables", tmp_path / "few", 10_000)
    scale("tables", tmp_path / "million", 1_000_000)
    few, million = scale("open", tmp_path / "few"), scale("open", tmp_path / "million")
    assert million["rows"] == 1_000_448
    for peak in ("open_mb", "first_batch_mb", "verify_mb"):  # the index alone, read, would be 100 MB and more
        assert million[peak] < few[peak] + 30
