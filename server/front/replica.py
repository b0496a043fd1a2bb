"""`Replica`: a server process of the front's, started again when it ends, and what the front knows of it."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

import aiohttp

from qjax.server.prefix_routing import PrefixMemory

log = logging.getLogger("qjax.server")

LOADING_POLL_SECONDS, POLL_SECONDS = 0.25, 1.0  # between two looks at its /health
SILENT_SECONDS = 10.0  # without an answer from /health, after which it gets no more requests
FIRST_DELAY, MAX_DELAY = 1.0, 60.0  # before it is started again, doubled from failure to failure
STABLE_SECONDS = 60.0  # of serving, after which earlier failures are forgotten
CONNECT_SECONDS = 10.0


class Replica:
    """One process, one unix socket, one KV cache.

    Args:
      patience: seconds that it may answer /health with an error, or not at all, once it has served; it is then killed
        and started again. 0: for ever.

    Attributes:
      status: "starting" (no answer yet), what its /health says ("loading", "ready", "sleeping", "stalled", "failed",
        "stopping"), "silent", or "ended".
      detail: the rest of what /health says.
      num_running: requests that the front has given it and that are not answered yet.
      memory: the beginnings of prompts that it was sent since its start.
      num_failures: ends in a row, none of them after a minute of serving.
      has_started: its first start is over, well or not.
    """

    def __init__(self, index: int, command: Sequence[str], environment: Mapping[str, str], uds: str, patience: float):
        self.index = index
        self.status = "starting"
        self.detail: dict[str, Any] = {}
        self.num_running = 0
        self.memory = PrefixMemory()
        self.num_starts = self.num_failures = 0
        self.exit_code: int | None = None
        self.has_started = asyncio.Event()
        self._command, self._environment = command, environment
        self._patience = patience
        self._process: asyncio.subprocess.Process | None = None
        self._served_since: float | None = None
        self._bad_since: float | None = None
        self._stopping = asyncio.Event()
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS)
        skipped = ("Accept", "Accept-Encoding", "User-Agent", "Content-Type")
        connector = aiohttp.UnixConnector(uds, limit=0)
        self.session = aiohttp.ClientSession(
            "http://replica", connector=connector, timeout=timeout, auto_decompress=False, skip_auto_headers=skipped
        )

    def __str__(self) -> str:
        return f"replica {self.index}"

    @property
    def can_serve(self) -> bool:
        return self.status in ("ready", "sleeping")

    @property
    def health(self) -> dict[str, Any]:
        """For the front's own /health."""
        more = {"failures": self.num_failures, "exit_code": self.exit_code} if self.num_failures else {}
        pid = {"pid": self._process.pid} if self._process and self.status != "ended" else {}
        return {"replica": self.index, "status": self.status, **self.detail, "running": self.num_running, **pid, **more}

    async def keep(self) -> None:
        """Runs the process, again and again, until `stop`."""
        try:
            while not self._stopping.is_set():
                self.exit_code = await self._run()
                if not self._stopping.is_set():
                    await self._pause()
        finally:
            if self._process is not None and self._process.returncode is None:
                self._process.kill()
            self.has_started.set()
            await self.session.close()

    async def _run(self) -> int:
        """One life of the process."""
        self.status, self.detail, self.memory = "starting", {}, PrefixMemory()
        self._served_since = self._bad_since = None
        self.num_starts += 1
        self._process = await self._start()
        if self._stopping.is_set():
            self._process.terminate()
        watch = asyncio.ensure_future(self._watch())
        try:
            return await self._process.wait()
        finally:
            watch.cancel()
            self.status, self.detail = "ended", {}
            self.has_started.set()

    async def _start(self) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            *self._command,
            env=self._environment,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,  # "qjax serves … at": it is the front that serves
            start_new_session=True,  # Ctrl-C in a terminal is for the front, which ends its replicas in order
        )

    async def _pause(self) -> None:
        """After the process has ended by itself: says so, and waits before the next start."""
        if self._served_since is not None and time.monotonic() - self._served_since > STABLE_SECONDS:
            self.num_failures = 0
        self.num_failures += 1
        delay = min(FIRST_DELAY * 2 ** (self.num_failures - 1), MAX_DELAY)
        when = "" if self._served_since is not None else " before it could serve"
        again = f", the {self.num_failures}th time in a row" if self.num_failures > 1 else ""
        log.error("%s ended%s (exit code %s)%s: next start in %g s", self, when, self.exit_code, again, delay)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stopping.wait(), delay)

    async def _watch(self) -> None:
        while True:
            await self.look()
            self._judge()
            await asyncio.sleep(LOADING_POLL_SECONDS if self._served_since is None else POLL_SECONDS)

    async def look(self) -> None:
        """Asks for its health."""
        try:
            async with asyncio.timeout(SILENT_SECONDS), self.session.get("/health") as response:
                body = await response.json()
        except (TimeoutError, aiohttp.ClientError, OSError, ValueError):
            if self._served_since is not None and self.status != "ended":
                self.status, self.detail = "silent", {}
            return
        if self.status == "ended":
            return
        self.status, self.detail = body.pop("status"), body
        if self.can_serve and self._served_since is None:
            self._served_since = time.monotonic()
            self.has_started.set()
            log.info("%s serves", self)

    def _judge(self) -> None:
        """Kills a process that has not been well for too long: the front is well while another is, so nobody else
        would."""
        if self.can_serve or self._served_since is None or self._stopping.is_set():
            self._bad_since = None
            return
        self._bad_since = self._bad_since or time.monotonic()
        seconds = time.monotonic() - self._bad_since
        if self._patience and seconds >= self._patience and self._process is not None:
            log.error("%s has been %s for %.0f s (--watchdog-timeout): it is killed", self, self.status, seconds)
            self._process.kill()

    def stop(self) -> None:
        """Lets the process end in order, and starts no other. The second call hurries it."""
        self._stopping.set()
        if self._process is not None and self._process.returncode is None:
            self._process.terminate()

    def kill(self) -> None:
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
