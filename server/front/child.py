"""What a replica does besides serving: it ends with its front, or it would keep its GPU."""

import ctypes
import os
import signal
import sys

FRONT = "QJAX_FRONT"  # of the environment: the front's process id
_PR_SET_PDEATHSIG = 1  # of Linux' prctl


def follow_front() -> None:
    """From now on this process is killed when the front ends, however that ends. Does nothing in other processes."""
    if FRONT not in os.environ or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(os.environ[FRONT]):  # it had ended before
        raise SystemExit(1)
