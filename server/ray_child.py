"""What a replica on Ray runs: `qjax serve` in a process of its own, with options from standard input.

A process of its own, so that the engine's Python shares no lock with Ray's, and what Ray sees of it is what any
supervisor sees: /health, SIGTERM, the exit code. It ends when its standard input does: with the replica, however
that died.
"""

import json
import logging
import os
import shutil
import signal
import sys
import threading
from dataclasses import asdict
from io import FileIO
from pathlib import Path

from qjax import logs
from qjax.config import EngineConfig, ServerConfig
from qjax.server import lifecycle


def to_line(engine: EngineConfig, server: ServerConfig) -> bytes:
    """The options as the line that `main` reads; keys and tokens are in it, so it is no argument of the process."""
    return json.dumps([asdict(engine), asdict(server)]).encode() + b"\n"


def main() -> int:
    given = FileIO(0, closefd=False)  # without a buffer, whose lock a thread would hold at the end
    engine, server = json.loads(given.readline())
    threading.Thread(target=_end_with, args=(given,), daemon=True).start()
    logging.basicConfig(level="WARNING")
    logging.getLogger("qjax").setLevel(os.environ.get("QJAX_LOG_LEVEL", "info").upper())
    logs.set_format(server["log_format"])
    try:
        return lifecycle.run(EngineConfig(**engine), ServerConfig(**server))
    except ValueError as error:
        print(f"qjax: error: {error}", file=sys.stderr)
        return 2
    finally:
        shutil.rmtree(Path(server["uds"]).parent, ignore_errors=True)  # made for this process; its maker may be dead


def _end_with(given: FileIO) -> None:
    given.read(1)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
