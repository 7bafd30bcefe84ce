"""What a client asked, once the API has checked it, and what the engine tells its stream.

These are the only types that both sides of the process border share about a generation. Plain data: no behaviour that
could differ between the two processes.
"""

from __future__ import annotations

import msgspec

from lora_serve.errors import Failure


class AdapterUse(msgspec.Struct, frozen=True):
    """One adapter of a request.

    Attributes:
        name: the adapter's published name.
        version: a prefix of the digest that the caller insists on; None is the newest version.
        weight: factor on the adapter's delta; 1 is the adapter as trained.
    """

    name: str
    version: str | None = None
    weight: float = 1.0


class Sampling(msgspec.Struct, frozen=True):
    """How tokens are chosen and when to stop; defaults are those of the OpenAI API.

    Attributes:
        max_tokens: at most this many new tokens (0: only read the prompt, for its log-probabilities).
        min_tokens: no stop token is sampled before this many.
        temperature: 0 is greedy.
        top_k: 0 is off.
        seed: None draws a fresh one at admission.
        logit_bias: token id → added to its logit.
        stop_token_ids: token ids that end the sequence; the model's own end tokens are added unless `ignore_eos`.
        logprobs: how many alternatives beside the chosen token; None is no log-probabilities at all.
        prompt_logprobs: the same for the tokens of the prompt (`echo` with `logprobs`).
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


class Request(msgspec.Struct, frozen=True):
    """One sequence to generate.

    A call with `n > 1` or several prompts becomes several of these. `tenant` separates prefix caches: two tenants
    never share KV.
    """

    id: str
    prompt: list[int]
    sampling: Sampling
    adapters: tuple[AdapterUse, ...] = ()
    tenant: str = ""


class Logprob(msgspec.Struct, frozen=True, array_like=True):
    """Log-probability of one token at its place, and of the likeliest ones there.

    `top` holds (token id, log-probability), likeliest first; the token itself is not repeated in it unless it is
    among the likeliest.
    """

    token: int
    value: float
    top: list[tuple[int, float]] = []


class Served(msgspec.Struct, frozen=True, array_like=True):
    """The exact adapter version that a request holds a lease on."""

    name: str
    digest: str
    weight: float


class Admitted(msgspec.Struct, frozen=True, tag="admitted"):
    """Always the first event of a request that was not refused: it is queued and its adapters are leased."""

    request_id: str
    adapters: list[Served]


class Tokens(msgspec.Struct, frozen=True, tag="tokens"):
    """New tokens of one step, in order.

    `prompt_logprobs` comes once, with the first of these, if it was asked for: one entry a prompt token, the first
    None. `cached` counts prompt tokens whose KV was found in the prefix cache; it is meaningful on the first.
    """

    request_id: str
    token_ids: list[int]
    logprobs: list[Logprob] | None = None
    prompt_logprobs: list[Logprob | None] | None = None
    cached: int = 0


class Finished(msgspec.Struct, frozen=True, tag="finished"):
    """The last event of every request.

    `reason` is 'stop' (an end or stop token, in `stop_token`; it is not among the tokens sent), 'length', 'abort' or
    'error' (then `failure` says why; it is also how a request is refused, with no event before it).
    """

    request_id: str
    reason: str
    stop_token: int | None = None
    failure: Failure | None = None


Event = Admitted | Tokens | Finished
