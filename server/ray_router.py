"""`PrefixRouter`: Ray Serve's request router, with `prefix_routing.choose` as its policy.

It runs where requests are passed on (`ray_ingress`), and knows what went through that process alone. A request counts
from its choice on, before it is sent: of many that come at once each sees where the others go.
"""

import asyncio
from collections import Counter
from functools import partial
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from qjax.server.prefix_routing import PrefixMemory, choose


class PrefixRouter(RequestRouter):
    """Ranks the replicas for a request whose keyword `blocks` has the hashes of its beginning."""

    def initialize_state(self, **kwargs: Any) -> None:
        self._memories: dict[ReplicaID, PrefixMemory] = {}
        self._requests: dict[ReplicaID, set[str]] = {}  # that each replica is at
        self._offered: dict[asyncio.Future, ReplicaID] = {}  # what was chosen for requests on their way

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Ranks, best first: Ray takes the first replica that has room for a request."""
        if not candidate_replicas:
            return []
        replicas = {replica.replica_id: replica for replica in candidate_replicas}
        request = pending_request
        offered = Counter(id for future, id in self._offered.items() if request is None or future is not request.future)
        best = choose(
            request.kwargs.get("blocks", []) if request else [],
            {id: self._memories.setdefault(id, PrefixMemory()) for id in replicas},
            {id: len(self._requests.get(id, ())) + offered[id] for id in replicas},
        )
        if request is not None:
            request.routing_context.should_backoff = True  # all are offered: Ray waits before it asks again
            if request.future not in self._offered:
                request.future.add_done_callback(partial(self._settle, request.metadata.internal_request_id))
            self._offered[request.future] = best
        return [[replicas.pop(best)], list(replicas.values())]

    def _settle(self, id: str, future: asyncio.Future) -> None:
        """A replica has been found, or nobody waits for one any more."""
        del self._offered[future]
        if not future.cancelled():
            self._requests.setdefault(future.result().replica_id, set()).add(id)

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        self._memories.setdefault(replica_id, PrefixMemory()).add(pending_request.kwargs.get("blocks", []))

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        self._requests.get(replica_id, set()).discard(internal_request_id)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        there = {replica.replica_id for replica in replicas}
        for known in (self._memories, self._requests):
            for gone in known.keys() - there:
                del known[gone]  # type: ignore[attr-defined]
