"""Files for other programs: written aside and moved into the folder when all are there, over no other file."""

import filecmp
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rae.pipeline.console import Console
from rae.store.errors import StaleInput


@contextmanager
def exported(out: Path, console: Console) -> Iterator[Path]:
    """A folder to write into, whose files end in `out`; nothing does if the block fails.

    Raises:
        StaleInput: `out` holds another file of one of the names.
    """
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".exporting-") as partial:
        yield Path(partial)
        written = sorted(Path(partial).iterdir())
        for path in written:
            there = out / path.name
            if there.exists() and not filecmp.cmp(there, path, shallow=False):
                raise StaleInput(f"{there} is there already, and is another: export into another folder")
        for path in written:
            os.replace(path, out / path.name)
            console.say(f"wrote {out / path.name}")
