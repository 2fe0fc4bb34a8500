"""``cmdgpu`` for a test that must be in time: ``<seconds of every unit> <grace in seconds> <arguments>``."""

import signal
import sys
from unittest.mock import patch

from cmdgpu.cli import main
from tests.executors.world import write_slowly

if __name__ == "__main__":
    signal.alarm(120)
    seconds, grace = map(float, sys.argv[1:3])
    del sys.argv[1:3]
    write_slowly(seconds)
    patch("cmdgpu.fitting.GRACE_S", grace).start()
    main()
