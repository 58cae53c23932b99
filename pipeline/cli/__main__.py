"""The `rae` command for torchrun, which starts modules: `torchrun -m rae.pipeline.cli`."""

import os
import sys

from rae.pipeline.cli import main

try:
    main()
    code = 0
except SystemExit as done:
    code = int(done.code or 0)
sys.stdout.flush()
sys.stderr.flush()
os._exit(code)  # gloo's threads can abort an interpreter that shuts down around them, after all is done
