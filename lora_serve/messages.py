"""The typed messages between the API process and the engine process.

One connection, both directions, msgpack by msgspec. Order is kept in each direction, which is what makes a lease
atomic: a `Generate` sent before a delete of its adapter is admitted before it.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from lora_serve.errors import Failure
from lora_serve.request import Event, Request

# --- to the engine -----------------------------------------------------------------------------------------------


class Generate(msgspec.Struct, frozen=True, tag="generate"):
    """Serve this request; events follow under its id."""

    request: Request


class Abort(msgspec.Struct, frozen=True, tag="abort"):
    """The client is gone. Unknown or finished ids are ignored."""

    request_id: str


class Publish(msgspec.Struct, frozen=True, tag="publish"):
    """Read, check and store the PEFT folder `folder` as a version of `name`; the folder is consumed.

    `replace` allows a name that exists to get a new version. Answers with an `AdapterInfo`.
    """

    name: str
    folder: str
    replace: bool = False
    source: str = ""


class Inspect(msgspec.Struct, frozen=True, tag="inspect"):
    """Read and check the PEFT folder `folder` as publishing would, and keep nothing. Answers with an `Inspection`."""

    folder: str


class ListAdapters(msgspec.Struct, frozen=True, tag="list"):
    """Answers with a list of `AdapterInfo`, by name."""


class DescribeAdapter(msgspec.Struct, frozen=True, tag="describe"):
    """Answers with one `AdapterInfo`."""

    name: str


class LoadAdapter(msgspec.Struct, frozen=True, tag="load"):
    """Bring the newest version into host memory and, where a slot is free, onto the device.

    Answers with `AdapterInfo` when done.
    """

    name: str


class EvictAdapter(msgspec.Struct, frozen=True, tag="evict"):
    """Out of host and device memory, once no sequence uses it; stays in the store. Answers `AdapterInfo`."""

    name: str


class PinAdapter(msgspec.Struct, frozen=True, tag="pin"):
    """Load, and never evict by LRU. `pinned=False` lifts it. Answers `AdapterInfo`."""

    name: str
    pinned: bool


class DeleteAdapter(msgspec.Struct, frozen=True, tag="delete"):
    """Unlist at once, remove from all tiers when its last lease is released. Answers `AdapterInfo` as it was."""

    name: str


class Drain(msgspec.Struct, frozen=True, tag="drain"):
    """Take no new requests; finish those that run. Answered (with None) when nothing runs any more."""


Operation = (
    Publish | Inspect | ListAdapters | DescribeAdapter | LoadAdapter | EvictAdapter | PinAdapter | DeleteAdapter | Drain
)


class Call(msgspec.Struct, frozen=True, tag="call"):
    """An operation that wants one `Reply` under its id."""

    id: int
    operation: Operation


class Exit(msgspec.Struct, frozen=True, tag="exit"):
    """Stop now: what still runs is ended with a terminal event, then the process exits 0."""


ToEngine = Generate | Abort | Call | Exit

# --- from the engine ---------------------------------------------------------------------------------------------


Report = Annotated[
    dict[str, Any],
    msgspec.Meta(
        description="for people: method, features, ranks, modules touched, size, what became what, whether it can be "
        "composed, base_model_name_or_path, warnings"
    ),
]


class AdapterVersion(msgspec.Struct, frozen=True):
    """One immutable content of an adapter. Sizes in bytes; `last_used` in seconds since the epoch."""

    digest: str
    created: float
    rank: int
    modules: int
    file_bytes: int
    memory_bytes: int
    tiers: list[str]
    leases: int
    last_used: float | None = None
    report: Report = {}


class Inspection(msgspec.Struct, frozen=True):
    """What a version of this content would be. Sizes in bytes."""

    digest: str
    rank: int
    modules: int
    file_bytes: int
    memory_bytes: int
    report: Report


class AdapterInfo(msgspec.Struct, frozen=True):
    """An adapter by name; `versions` newest first, the rest still held by running requests."""

    name: str
    pinned: bool
    versions: list[AdapterVersion]


class EngineInfo(msgspec.Struct, frozen=True):
    """What the API must know of the base, sent once when the engine is ready. `created` in seconds since the epoch."""

    model: str
    root: str
    device: str
    dtype: str
    kernels: str
    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    kv_tokens: int
    adapter_slots: int
    adapters: int
    parameters: int
    created: int
    generation_defaults: dict[str, Any] = {}
    notes: list[str] = []


class Stats(msgspec.Struct):
    """The engine's state in numbers. Names ending in `_total` only grow while the engine lives.

    `loads`: tier → (count, seconds); tiers are 'host' (from disk) and 'device' (from host).
    """

    waiting: int = 0
    running: int = 0
    kv_blocks_used: int = 0
    kv_blocks: int = 0
    prefix_tokens_total: int = 0
    prefix_hit_tokens_total: int = 0
    preemptions_total: int = 0
    steps_total: int = 0
    cache_hits_total: dict[str, int] = {}
    cache_misses_total: dict[str, int] = {}
    evictions_total: dict[str, int] = {}
    loads_total: dict[str, int] = {}
    load_seconds_total: dict[str, float] = {}
    bytes: dict[str, int] = {}
    resident: list[str] = []
    waiting_adapters: list[str] = []
    adapters: int = 0
    adapter_slots: int = 0


class StepReport(msgspec.Struct, frozen=True, array_like=True):
    """One step, for histograms: sequences, tokens, distinct adapters in the batch, seconds it took."""

    sequences: int
    tokens: int
    adapters: int
    seconds: float


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """The base is resident; requests are taken."""

    info: EngineInfo


class Progress(msgspec.Struct, frozen=True, tag="progress"):
    """Start-up, for the progress bar: what is done now, and how much of all of it is done (0..1)."""

    stage: str
    fraction: float


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """The engine cannot start (a model that cannot be served, not enough memory) and exits; trying again is useless."""

    failure: Failure


class Update(msgspec.Struct, frozen=True, tag="update"):
    """All that happened in one step, or since the last message; also the heartbeat (then `events` is empty).

    Sent at least once a second while the loop turns; silence means that the engine is stuck.
    """

    events: list[Event]
    stats: Stats | None = None
    step: StepReport | None = None


class Reply(msgspec.Struct, frozen=True, tag="reply"):
    """The answer to a `Call`: `result` is the builtins form of what the operation documents."""

    id: int
    result: Any = None
    failure: Failure | None = None


FromEngine = Ready | Progress | Refused | Update | Reply

encode = msgspec.msgpack.Encoder().encode
decode_to_engine = msgspec.msgpack.Decoder(ToEngine).decode
decode_from_engine = msgspec.msgpack.Decoder(FromEngine).decode
