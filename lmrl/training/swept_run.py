"""A run of a sweep, which saves and ends if the sweep is gone: `python -m lmrl.training.swept_run SWEEP train ...`.

SWEEP: the process id of the sweep.
"""

from __future__ import annotations

import os
import signal
import sys

from lmrl.cli import main
from lmrl.parent_process import when_parent_ends

if __name__ == "__main__":
    when_parent_ends(int(sys.argv.pop(1)), lambda: os.kill(os.getpid(), signal.SIGTERM))
    main()
