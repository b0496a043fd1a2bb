"""`Front`: the replicas, the choice of one for a request, and what is counted."""

import asyncio
import contextlib
from collections.abc import Iterator, Sequence, Set

from aiohttp import web
from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest

from qjax.config import ServerConfig
from qjax.server.errors import ApiError, unavailable
from qjax.server.front.replica import Replica
from qjax.server.prefix_routing import choose


class Front:
    """What all handlers share.

    Attributes:
      is_stopping: no new requests are taken.
    """

    def __init__(self, replicas: Sequence[Replica], config: ServerConfig):
        self.replicas = replicas
        self.config = config
        self.is_stopping = False
        self._num_requests = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._registry = CollectorRegistry()
        name = ["replica"]
        self._up = Gauge("qjax:replica_up", "1 while it serves.", name, registry=self._registry)
        self._starts = Gauge("qjax:replica_starts", "Times it was started.", name, registry=self._registry)
        self._running = Gauge("qjax:replica_requests_running", "Given to it.", name, registry=self._registry)
        self._remembered = Counter("qjax:front_requests", "By what chose the replica.", ["by"], registry=self._registry)
        self.retries = Counter("qjax:front_retries", "Requests that were sent to another.", registry=self._registry)
        self.lost = Counter("qjax:front_lost", "Requests that ended with their replica.", registry=self._registry)

    @property
    def serving(self) -> list[Replica]:
        return [replica for replica in self.replicas if replica.can_serve]

    @property
    def status(self) -> str:
        """One word for all: "ready" while one of them is."""
        if self.is_stopping:
            return "stopping"
        found = {replica.status for replica in self.replicas}
        words = ("ready", "sleeping", "loading", "starting", "stalled", "silent", "failed", "ended")
        return next((word for word in words if word in found), "stopping")

    def check_ready(self) -> None:
        """Raises ApiError 503 unless a replica can serve."""
        if self.is_stopping:
            raise unavailable("The server is stopping and takes no new requests.")
        if not self.serving:
            words = ", ".join(f"{replica} {replica.status}" for replica in self.replicas)
            raise unavailable(f"No replica can serve: {words}.")

    @contextlib.contextmanager
    def chosen(self, blocks: Sequence[int], tried: Set[Replica]) -> Iterator[Replica]:
        """The replica for a request, and its load while the request is there. One that sleeps only if all do.

        Args:
          blocks: of the prompt's beginning.
          tried: those that have failed this request.

        Raises:
          ApiError: 503, there is none.
        """
        self.check_ready()
        left = [r for r in self.serving if r not in tried]
        awake = [r for r in left if r.status == "ready"] or left
        if not awake:
            raise unavailable("All replicas that could serve have refused the request.")
        replica = choose(blocks, {r: r.memory for r in awake}, {r: r.num_running for r in awake})
        self._remembered.labels(by="prefix" if replica.memory.num_known(blocks) else "load").inc()
        replica.memory.add(blocks)
        replica.num_running += 1
        try:
            yield replica
        finally:
            replica.num_running -= 1

    @contextlib.contextmanager
    def request(self) -> Iterator[None]:
        """Counts a request until it has been answered."""
        self._num_requests += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._num_requests -= 1
            if not self._num_requests:
                self._idle.set()

    async def wait_idle(self, timeout: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), timeout)

    def render_metrics(self) -> str:
        for replica in self.replicas:
            name = str(replica.index)
            self._up.labels(name).set(replica.can_serve)
            self._starts.labels(name).set(replica.num_starts)
            self._running.labels(name).set(replica.num_running)
        return generate_latest(self._registry).decode()


FRONT: web.AppKey[Front] = web.AppKey("front", Front)


def lost(what: str, request_id: str) -> ApiError:
    """A request whose replica ended. It may be sent again."""
    return unavailable(f"{what}. Please send the request again (request id {request_id}).")
