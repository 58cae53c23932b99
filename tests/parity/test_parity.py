"""Every fixture in a folder: what we compute is what the official release computes.

`RAE_PARITY_DIR` names another folder of such files; shapes and sizes are read from them.
"""

import os
from pathlib import Path

import pytest

from parity.fixture import fixtures
from parity.walk import CHECKS, check, kind_of

FOLDER = Path(os.environ.get("RAE_PARITY_DIR") or Path(__file__).parent)


@pytest.mark.parametrize("path", fixtures(FOLDER), ids=lambda path: str(path.relative_to(FOLDER)))
def test_equals_the_official_release(path: Path) -> None:
    assert kind_of(path) in CHECKS, f"no check for {path}"
    check(path)
