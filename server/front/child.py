"""What a replica does besides serving: it ends with its front, or it would keep its GPU."""

import ctypes
import os
import signal
import sys

from qjax.logs import REPLICA

_PR_SET_PDEATHSIG = 1  # of Linux' prctl


def follow_front() -> None:
    """From now on this process is killed when the front ends, however that ends. Does nothing in other processes."""
    if REPLICA not in os.environ or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() == 1:  # it had ended before
        raise SystemExit(1)
