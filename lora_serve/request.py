"""Requests and their events, as plain structs shared by the API process and the engine process."""

from __future__ import annotations

from typing import Literal

import msgspec

from lora_serve.errors import Failure

MOST_ADAPTERS = 8  # in one request


class AdapterUse(msgspec.Struct, frozen=True):
    """One adapter of a request.

    Attributes:
        name: the adapter's published name, or an alias.
        version: prefix of the digest of a required version; None is the newest version, or an alias's choice.
        weight: factor on the adapter's delta; 1 is the adapter as trained.
        settings_applied: whether the request is made by the settings of the version, which `version` names exactly.
    """

    name: str
    version: str | None = None
    weight: float = 1.0
    settings_applied: bool = False


class Routing(msgspec.Struct, frozen=True):
    """What an alias chooses a target by, the same for all requests of one API call.

    Attributes:
        call: id of the API call.
        user: its field `user`; empty if it has none.
        headers: its headers by lower-case name, of those that aliases go by.
    """

    call: str = ""
    user: str = ""
    headers: dict[str, str] = {}


class Sampling(msgspec.Struct, frozen=True):
    """Sampling parameters and stop conditions; defaults as in the OpenAI API.

    Attributes:
        max_tokens: maximum number of new tokens (0: only prefill the prompt, for its log-probabilities).
        min_tokens: no stop token is sampled before this many.
        temperature: 0 is greedy.
        top_k: 0 is off.
        seed: None draws a new one at admission.
        logit_bias: token id → value added to its logit.
        stop_token_ids: token ids that end the sequence; the model's EOS tokens are added unless `ignore_eos`.
        logprobs: number of alternatives besides the chosen token; None is no log-probabilities at all.
        prompt_logprobs: the same for the tokens of the prompt (`echo` with `logprobs`).
        grammar: what the output must match, in llguidance's text form.
        grammar_field: the request field that the grammar comes from, for errors.
    """

    max_tokens: int
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    grammar: str | None = None
    grammar_field: str = ""


class Pooling(msgspec.Struct, frozen=True):
    """How a model makes one embedding of a text from the final hidden states of its tokens.

    Attributes:
        mode: mean of all tokens, or the first or last token alone.
        normalize: scale the embedding to length 1.
    """

    mode: Literal["mean", "first", "last"] = "last"
    normalize: bool = True


class EmbeddingParams(msgspec.Struct, frozen=True):
    """Parameters of an embedding; `dimensions`: keep only this many, and normalise what is kept. None keeps all."""

    dimensions: int | None = None


class Request(msgspec.Struct, frozen=True):
    """One sequence to generate, or to embed: then the prompt is only prefilled (`max_tokens` is 0).

    An API call with `n > 1` or several prompts becomes several of these.

    Attributes:
        tenant: the key's name: whose prefix cache is separate, and whose share of the steps it is served from.
        priority: among the tenant's requests; smaller is more urgent.
        weight: of the tenant's share, relative to others'.
        routing: what aliases among `adapters` choose by.
    """

    id: str
    prompt: list[int]
    sampling: Sampling
    adapters: tuple[AdapterUse, ...] = ()
    tenant: str = ""
    embedding: EmbeddingParams | None = None
    priority: int = 0
    weight: float = 1.0
    routing: Routing = Routing()


class Logprob(msgspec.Struct, frozen=True, array_like=True):
    """Log-probability of a token, and of the most likely tokens at the same position.

    `top` holds (token id, log-probability), most likely first; the token itself only if it is among them.
    """

    token: int
    value: float
    top: list[tuple[int, float]] = []


class Served(msgspec.Struct, frozen=True, array_like=True):
    """The adapter version that a request holds a lease on."""

    name: str
    digest: str
    weight: float


class Admitted(msgspec.Struct, frozen=True, tag="admitted"):
    """First event of a request unless it is refused: it is queued and holds leases on its adapters.

    `ahead` is the number of sequences that waited already.
    """

    request_id: str
    adapters: list[Served]
    ahead: int = 0


class Tokens(msgspec.Struct, frozen=True, tag="tokens", omit_defaults=True):
    """New tokens of a sequence, in order.

    `prompt_logprobs`, if requested, comes once, with the first of these: one entry per prompt token, None first.
    `cached` is the number of prompt tokens found in the prefix cache, `queued` the seconds from arrival to the first
    step, `started` when that was, on the engine's monotonic clock; meaningful in the first only.
    """

    request_id: str
    token_ids: list[int]
    logprobs: list[Logprob] | None = None
    prompt_logprobs: list[Logprob | None] | None = None
    cached: int = 0
    queued: float = 0.0
    started: float = 0.0


class Embedded(msgspec.Struct, frozen=True, tag="embedded"):
    """The embedding of a request's prompt: float32, little-endian."""

    request_id: str
    vector: bytes


class Finished(msgspec.Struct, frozen=True, tag="finished"):
    """Last event of every request.

    `reason` is 'stop' (an EOS or stop token: `stop_token`, which is not among the tokens sent, and its log-probability
    if requested; or an embedding is complete), 'length', 'abort' or 'error' (with `failure`). A refused request gets
    this event only.
    """

    request_id: str
    reason: str
    stop_token: int | None = None
    stop_logprob: Logprob | None = None
    failure: Failure | None = None


Event = Admitted | Tokens | Embedded | Finished
