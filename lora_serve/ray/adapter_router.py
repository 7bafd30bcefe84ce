"""Ray's request router with LoRA affinity: it asks `replicas/affinity.py` in which order to try the replicas."""

from __future__ import annotations

from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from lora_serve.replicas.affinity import ReplicaLoad, SentAdapters, rank, residency_level
from lora_serve.replicas.forwarding import ForwardedRequest, without_base

SEPARATOR = "+"  # between the adapters of one request in Ray's model id; not in an adapter's name


class AdapterRouter(RequestRouter):  # type: ignore[misc]  # Ray's types are not read
    """Chooses the replica of a request by its adapters, and by how many requests the replicas have.

    The adapters come as Ray's multiplexed model id. Which adapters a replica has in memory is in its routing
    statistics, and in what this router sent to it lately.
    """

    def initialize_state(self, spill_at: int = 32, **_: Any) -> None:
        """Called by Ray with `request_router_kwargs`; see `rank`."""
        self._spill_at = spill_at
        self._sent = SentAdapters()

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The replicas, best first; each is tried before the next is."""
        named = () if pending_request is None else _named(pending_request)
        loads = [self._load(replica, named) for replica in candidate_replicas]
        bases = [base for replica in candidate_replicas for base in _statistics(replica).get("base", ())]
        adapter = SEPARATOR.join(without_base(named, bases))
        request = next(iter(pending_request.args), None) if pending_request is not None else None
        avoid = request.avoid if isinstance(request, ForwardedRequest) else ()
        by_id = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        return [[by_id[id]] for id in rank(adapter, loads, self._spill_at, avoid)]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """Called by Ray when a replica has accepted a request."""
        for name in _named(pending_request):
            self._sent.note(name, replica_id.unique_id)

    def _load(self, replica: RunningReplica, named: tuple[str, ...]) -> ReplicaLoad:
        statistics, id = _statistics(replica), replica.replica_id.unique_id
        adapters = without_base(named, statistics.get("base", ()))
        lately = {adapter for adapter in adapters if self._sent.holds(adapter, id)}
        level = residency_level(adapters, {*lately, *statistics.get("device", ())}, statistics.get("host", ()))
        # None where Ray has not heard of it for a while: then it has nothing to do.
        in_flight = self.replica_queue_len_cache.get(replica.replica_id) or 0
        return ReplicaLoad(id, in_flight, level, statistics.get("ready", True))


def _statistics(replica: RunningReplica) -> dict[str, Any]:
    found: dict[str, Any] = replica.routing_stats or {}
    return found


def _named(pending_request: PendingRequest) -> tuple[str, ...]:
    model_id: str = pending_request.metadata.multiplexed_model_id
    return tuple(model_id.split(SEPARATOR)) if model_id else ()
