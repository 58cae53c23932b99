"""The most memory that a process has held."""

import resource
import sys
from pathlib import Path


def peak_memory_bytes() -> int:
    """Since the process's program was loaded.

    Linux counts into `ru_maxrss` what the parent held when it started the process; VmHWM is the program's own.
    """
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
