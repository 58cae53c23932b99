"""Memory does not grow with the number of images."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np


def test_five_times_as_many_images_take_no_more_memory(tmp_path: Path) -> None:
    peak_mb = {}
    for count in (2_000, 10_000):
        np.savez(tmp_path / "images.npz", np.random.default_rng(0).integers(0, 256, (count, 64, 64, 3), np.uint8))
        command = [sys.executable, Path(__file__).with_name("large_set.py"), tmp_path / "images.npz", str(count)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [*command, tmp_path / str(count)], capture_output=True, text=True, env=environment, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]
        peak_mb[count] = float(done.stdout)
    held_mb = 8_000 * 64 * 64 * 3 / 2**20
    assert peak_mb[2_000] + held_mb > 1.1 * peak_mb[2_000], "images that are kept would be seen"
    assert peak_mb[10_000] < 1.1 * peak_mb[2_000]
