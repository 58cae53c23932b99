"""Plays Slurm to the sbatch files in docs/slurm: its variables, its commands on PATH, and its signals."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

SCRIPTS = Path(__file__).parents[1] / "docs" / "slurm"
_COMMANDS = {
    "rae": 'exec "$PLAYED_PYTHON" -m rae.pipeline.cli "$@"',
    "torchrun": 'exec "$PLAYED_PYTHON" -m torch.distributed.run "$@"',
    # A step: the command once on each node.
    "srun": """
while [[ $1 == --* ]]; do shift; done
for ((node = 0; node < SLURM_NNODES; node++)); do
    SLURM_NODEID=$node SLURM_PROCID=$node "$@" &
    pids+=($!)
    echo $! >> "$PLAYED/step"
done
code=0
for pid in "${pids[@]}"; do
    wait "$pid"
    status=$?
    ((status > code)) && code=$status
done
exit "$code"
""",
    "scontrol": """
if [[ $1 == show ]]; then
    tr , "\\n" <<< "$3"
else
    echo "$2" >> "$PLAYED/requeued"
fi
""",
    "scancel": 'exec "$PLAYED_PYTHON" "$PLAYED_SLURM" "$PLAYED/step" "${1#--signal=}"',
}


class Job:
    """One attempt at a batch script."""

    def __init__(self, folder: Path, script: str, words: list[str], nodes: int = 1, **variables: object) -> None:
        self.script, self.folder = SCRIPTS / script, folder
        commands = folder / "bin"
        commands.mkdir(parents=True)
        for name, text in _COMMANDS.items():
            (commands / name).write_text(f"#!/bin/bash\n{text.strip()}\n")
            (commands / name).chmod(0o755)
        hosts = ",".join(["localhost"] * nodes)
        played = {"PLAYED": folder, "PLAYED_PYTHON": sys.executable, "PLAYED_SLURM": __file__}
        slurm = {"SLURM_NNODES": nodes, "SLURM_JOB_NODELIST": hosts, "SLURM_GPUS_ON_NODE": 1, **variables}
        environment = os.environ | {name: str(value) for name, value in (played | slurm).items()}
        environment |= {"PATH": f"{commands}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
        self._output = folder / "output"
        with open(self._output, "w") as output:
            self._process = subprocess.Popen(
                ["bash", self.script, *words], env=environment, stdout=output, stderr=output
            )

    @property
    def output(self) -> str:
        return self._output.read_text()

    @property
    def requeued(self) -> bool:
        return (self.folder / "requeued").exists()

    def wait_for(self, seen: Callable[[], bool], seconds: float = 120) -> None:
        until = time.monotonic() + seconds
        while not seen():
            assert time.monotonic() < until, self.output
            assert self._process.poll() is None, self.output
            time.sleep(0.005)

    def near_its_limit(self) -> None:
        """Send what `#SBATCH --signal` asks for to whom it asks for."""
        (asked,) = re.findall(r"^#SBATCH --signal=(B:)?(\w+)@\d+$", self.script.read_text(), re.MULTILINE)
        to_shell, name = asked
        if to_shell:
            self._process.send_signal(signal.Signals[f"SIG{name}"])
        else:
            signal_step(self.folder / "step", name)

    def wait(self, seconds: float = 120) -> int:
        return self._process.wait(seconds)


def signal_step(step: Path, name: str) -> None:
    """Signal all processes of a step, as Slurm does."""
    for pid in map(int, step.read_text().split()):
        if psutil.pid_exists(pid):
            process = psutil.Process(pid)
            for one in (*process.children(recursive=True), process):
                one.send_signal(signal.Signals[f"SIG{name}"])


if __name__ == "__main__":  # scancel
    signal_step(Path(sys.argv[1]), sys.argv[2])
