"""Messages between the API process and the engine process, as msgpack structs over one connection.

Messages arrive in the order in which they were sent, in both directions. So a `Generate` sent before a delete of its
adapter gets its lease first.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from lora_serve.errors import Failure
from lora_serve.precondition import ANYTHING, Precondition
from lora_serve.request import AdapterUse, Event, Pooling, Request, Routing
from lora_serve.serve_settings import ServeSettings
from lora_serve.training_messages import PublishRun, RunOperation

# --- to the engine -----------------------------------------------------------------------------------------------


class Generate(msgspec.Struct, frozen=True, tag="generate"):
    """Run a request; its events follow under its id."""

    request: Request


class Abort(msgspec.Struct, frozen=True, tag="abort"):
    """Abort a request (the client has disconnected). Unknown or finished ids are ignored."""

    request_id: str


class Publish(msgspec.Struct, frozen=True, tag="publish"):
    """Validate the PEFT folder `folder` and store it as a version of `name`; the folder is removed.

    With `replace`, an existing name gets a new version, if `precondition` holds of its current one. `source`: the
    folder on this machine that `folder` is a copy of, or where it was fetched from; empty for an upload. `digest`: that
    of the only version that may be published, or how it begins. `unless_known`: not if the name has versions that are
    unlisted, either. `local`: for this replica alone, also where replicas share a store. `trust_settings`: its
    `serve.yaml` counts, for which an administrator vouches. A folder in staging may hold an archive instead of the
    files (`ARCHIVE`). Answered with an `AdapterInfo`.
    """

    name: str
    folder: str
    replace: bool = False
    source: str = ""
    precondition: Precondition = ANYTHING
    digest: str = ""
    unless_known: bool = False
    local: bool = False
    trust_settings: bool = False


class Inspect(msgspec.Struct, frozen=True, tag="inspect"):
    """Validate the PEFT folder `folder` as publishing would, without storing it. Answered with an `Inspection`."""

    folder: str
    trust_settings: bool = False


class ListAdapters(msgspec.Struct, frozen=True, tag="list"):
    """List the first adapters whose names come after `after`. Answered with a list of `AdapterInfo`, sorted by name.

    It is empty when there are no more.
    """

    after: str = ""


class DescribeAdapter(msgspec.Struct, frozen=True, tag="describe"):
    """Describe one adapter. Answered with an `AdapterInfo`."""

    name: str


class ResolveAdapters(msgspec.Struct, frozen=True, tag="resolve"):
    """Find the exact versions that a request of these adapters would get now, aliases resolved.

    Answered with a list of `ResolvedAdapter`, one for each.
    """

    adapters: tuple[AdapterUse, ...]
    routing: Routing = Routing()


class LocateFiles(msgspec.Struct, frozen=True, tag="locate"):
    """Find the PEFT files of an adapter's version; `version`: prefix of a digest, None is the newest one.

    Answered with an `AdapterFiles`.
    """

    name: str
    version: str | None = None


class LoadAdapter(msgspec.Struct, frozen=True, tag="load"):
    """Load the newest version into host memory and, if a slot is free, onto the device.

    Answered with an `AdapterInfo` when done.
    """

    name: str


class EvictAdapter(msgspec.Struct, frozen=True, tag="evict"):
    """Evict from host and device memory once no sequence uses it; stays in the store. Answered with `AdapterInfo`."""

    name: str


class PinAdapter(msgspec.Struct, frozen=True, tag="pin"):
    """Load and exclude from LRU eviction; `pinned=False` reverts that. Answered with an `AdapterInfo`."""

    name: str
    pinned: bool


class DeleteAdapter(msgspec.Struct, frozen=True, tag="delete"):
    """Unlist now, and remove from all tiers when the last lease is released. Answered with the last `AdapterInfo`."""

    name: str
    precondition: Precondition = ANYTHING


class UnloadAdapter(msgspec.Struct, frozen=True, tag="unload"):
    """Evict and unlist, until it is loaded or published again. Answered with an `AdapterInfo`.

    A copy of a folder on this machine is deleted.
    """

    name: str


class AliasTarget(msgspec.Struct, frozen=True):
    """An adapter that an alias stands for, NAME or NAME@VERSION, and its share of the requests by weight."""

    adapter: str
    weight: float = 1.0


class PutAlias(msgspec.Struct, frozen=True, tag="put_alias"):
    """Let a name stand for adapters, all at once. Answered with an `AliasInfo`.

    `sticky`: what keeps a client on a target: `user`, `header:NAME`, or nothing.
    """

    name: str
    targets: list[AliasTarget]
    sticky: str = ""
    precondition: Precondition = ANYTHING


class DeleteAlias(msgspec.Struct, frozen=True, tag="delete_alias"):
    """Remove an alias; its targets stay. Answered with the last `AliasInfo`."""

    name: str
    precondition: Precondition = ANYTHING


class DescribeAlias(msgspec.Struct, frozen=True, tag="describe_alias"):
    """Describe one alias. Answered with an `AliasInfo`."""

    name: str


class ListAliases(msgspec.Struct, frozen=True, tag="list_aliases"):
    """List the first aliases whose names come after `after`. Answered with a list of `AliasInfo`, sorted by name.

    It is empty when there are no more.
    """

    after: str = ""


class ListNames(msgspec.Struct, frozen=True, tag="list_names"):
    """List names of adapters and aliases, in no order. Answered with a list of at most `most`."""

    most: int


class Drain(msgspec.Struct, frozen=True, tag="drain"):
    """Accept no new requests and finish the running ones. Answered with None when none is left."""


Operation = (
    Publish
    | Inspect
    | ListAdapters
    | DescribeAdapter
    | ResolveAdapters
    | LocateFiles
    | LoadAdapter
    | EvictAdapter
    | PinAdapter
    | DeleteAdapter
    | UnloadAdapter
    | PutAlias
    | DeleteAlias
    | DescribeAlias
    | ListAliases
    | ListNames
    | Drain
    | PublishRun
    | RunOperation
)


class Call(msgspec.Struct, frozen=True, tag="call"):
    """An operation on adapters or training runs, answered by one `Reply` with the same id."""

    id: int
    operation: Operation


class Exit(msgspec.Struct, frozen=True, tag="exit"):
    """Stop now: running requests get a final event, then the process exits with status 0."""


ToEngine = Generate | Abort | Call | Exit

# --- from the engine ---------------------------------------------------------------------------------------------


Report = Annotated[
    dict[str, Any],
    msgspec.Meta(
        description="human-readable: method, features, ranks, modules touched, size, how it was lowered, whether it is "
        "composable, base_model_name_or_path, warnings"
    ),
]


class AdapterVersion(msgspec.Struct, frozen=True):
    """One immutable version of an adapter. Sizes in bytes; `last_used` in seconds since the epoch.

    `vocab_size`: number of its tokens, if it differs from the base's. `settings`: what requests for it get by default.
    """

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
    vocab_size: int | None = None
    settings: ServeSettings | None = None


class Inspection(msgspec.Struct, frozen=True):
    """The version that publishing would create. Sizes in bytes."""

    digest: str
    rank: int
    modules: int
    file_bytes: int
    memory_bytes: int
    report: Report
    settings: ServeSettings | None = None


class AdapterInfo(msgspec.Struct, frozen=True):
    """A named adapter. `versions`: newest first; older ones are kept, or still used by running requests.

    `broken`: why the adapter cannot be served; then no version is given.
    """

    name: str
    pinned: bool
    versions: list[AdapterVersion]
    broken: str | None = None


class ResolvedAdapter(msgspec.Struct, frozen=True):
    """The version that a name, or an alias, stands for: the adapter's name, the whole digest, and its settings.

    `vocab_size`: number of its tokens, if it differs from the base's.
    """

    name: str
    digest: str
    settings: ServeSettings | None = None
    vocab_size: int | None = None


class AdapterFiles(msgspec.Struct, frozen=True):
    """The PEFT files of a version as they came: their folder on this machine, and path in it → size and SHA-256."""

    name: str
    digest: str
    folder: str
    files: dict[str, tuple[int, str]]


class AliasInfo(msgspec.Struct, frozen=True):
    """An alias. Versions in `targets` are whole digests; `etag` is a hash of targets and `sticky`.

    `created` in seconds since the epoch. `broken`: why the alias, or one of its targets, cannot be served.
    """

    name: str
    targets: list[AliasTarget]
    sticky: str | None
    etag: str
    created: float
    broken: str | None = None


class EngineInfo(msgspec.Struct, frozen=True):
    """The base model and engine limits, sent once the engine is ready. `created` in seconds since the epoch.

    `pooling` is how the base alone embeds; if it is None, `not_embedding` says why it does not. A `headless` base
    generates no text. `store`: folder of the published adapters. `adapters`: how many are listed, and
    `broken_adapters` how many of them cannot be served. `tensor_parallel`: how many devices share the base; `device` is
    the first. `training_memory`: bytes for training runs; 0: training is off. `memory`: by place and part, the bytes
    that may be taken (`engine/memory_plan.py`).
    """

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
    hidden_size: int = 0
    pooling: Pooling | None = None
    not_embedding: str = ""
    headless: bool = False
    store: str = ""
    broken_adapters: int = 0
    tensor_parallel: int = 1
    training_memory: int = 0
    memory: dict[str, dict[str, int]] = {}


class SharedStatus(msgspec.Struct, frozen=True):
    """How far a replica has followed the catalog of a shared store.

    Attributes:
        generation: of the catalog that it follows.
        behind: adapters and aliases that are not, or not yet, what the catalog says.
        age: seconds since the catalog was read.
        errors: how often it could not be read, while the engine process lives.
        reachable: whether it could be read the last time.
    """

    generation: int
    behind: int
    age: float
    errors: int
    reachable: bool


class Stats(msgspec.Struct):
    """Engine statistics. Fields ending in `_total` only grow while the engine process lives.

    Dicts are keyed by tier: 'host' (loaded from disk) and 'device' (copied from host); `step_costs` by what costs the
    seconds (`engine/step_costs.py`).

    Attributes:
        resident, resident_in_host, pinned: names of adapters whose current version is on the device, in host memory,
            pinned; every name of a version.
        versions_resident: how many versions are on the device.
        oldest_wait, expected_wait: seconds for which the oldest waiting sequence has waited, and for which one that
            comes now is expected to wait, until its prompt is begun.
        sticky_headers: lower-case names of the headers that aliases go by.
        settings_state: another number whenever what an adapter's name stands for changes; 0 while no version has had
            settings.
        gaps_exceeded_total: steps whose prompts exceed the bound on the time between two tokens of a stream.
        shared: None without a shared store.
        training_runs, training_bytes: how many there are, and the memory they take between passes.
        memory: `EngineInfo.memory`.
        training_tokens_total: tokens of passes that were finished.
        training_quanta_total, training_seconds_total: pieces of training, by kind, and the engine's time they took.
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
    resident_in_host: list[str] = []
    pinned: list[str] = []
    versions_resident: int = 0
    waiting_adapters: list[str] = []
    adapters: int = 0
    adapter_slots: int = 0
    oldest_wait: float = 0.0
    expected_wait: float = 0.0
    gaps_exceeded_total: int = 0
    step_costs: dict[str, float] = {}
    sticky_headers: list[str] = []
    shared: SharedStatus | None = None
    settings_state: int = 0
    training_runs: int = 0
    training_bytes: int = 0
    memory: dict[str, dict[str, int]] = {}
    training_tokens_total: int = 0
    training_quanta_total: dict[str, int] = {}
    training_seconds_total: dict[str, float] = {}


class StepReport(msgspec.Struct, frozen=True, array_like=True):
    """Measurements of one step, for histograms: sequences, tokens, distinct adapters, seconds."""

    sequences: int
    tokens: int
    adapters: int
    seconds: float


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """The base model is loaded and requests are accepted."""

    info: EngineInfo


class Progress(msgspec.Struct, frozen=True, tag="progress"):
    """Start-up progress: the current stage, and the fraction done of the whole (0 to 1)."""

    stage: str
    fraction: float


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """The engine cannot start (unsupported model, not enough memory) and exits; a retry would fail again."""

    failure: Failure


class Update(msgspec.Struct, frozen=True, tag="update"):
    """Events and statistics since the last message, normally of one step; also the heartbeat (without events).

    Sent at least once per second while the engine loop runs.
    """

    events: list[Event]
    stats: Stats | None = None
    step: StepReport | None = None


class Reply(msgspec.Struct, frozen=True, tag="reply"):
    """The answer to a `Call`: `result` is the JSON-like form of what the operation documents."""

    id: int
    result: Any = None
    failure: Failure | None = None


FromEngine = Ready | Progress | Refused | Update | Reply

encode = msgspec.msgpack.Encoder().encode
decode_to_engine = msgspec.msgpack.Decoder(ToEngine).decode
decode_from_engine = msgspec.msgpack.Decoder(FromEngine).decode
