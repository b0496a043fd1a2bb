"""A server of a fake engine in a process of its own, for clients that block."""

import contextlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of a server whose engine answers at once, with every endpoint on.

    Args:
      folder: of a tokenizer.
    """
    command = [sys.executable, "-m", "tests.server.fake_engine", str(folder), "0", "short", "0.1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            yield re.search(r"http://[\w.:]+", process.stdout.readline())[0]
        finally:
            process.kill()
