"""Quotas of keys: requests and tokens a minute, and requests at the same time, for all of a key and for each adapter.

Rates are token buckets: a minute's worth may be used at once and comes back evenly. A request's tokens are known when
it has ended, so they are taken then, and a bucket may owe some: further requests wait until it does not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import ceil

from lora_serve.api.caller import Caller, Limits
from lora_serve.api.error_handlers import RateLimited
from lora_serve.api.request_record import RequestRecord

MINUTE = 60.0
SWEEP = 4096  # states above which those are dropped that no longer matter
BUSY_RETRY = 1.0  # seconds after which a retry makes sense where too many requests run

Headers = dict[str, str]


class Bucket:
    """How much of a rate is left.

    Args:
        most: a minute.
    """

    def __init__(self, most: int, now: float) -> None:
        self.most = most
        self._level, self._updated = float(most), now

    def level(self, now: float) -> float:
        """What is left; below zero if more was taken."""
        self._level = min(self.most, self._level + (now - self._updated) * self.most / MINUTE)
        self._updated = now
        return self._level

    def take(self, count: float, now: float) -> None:
        self._level = self.level(now) - count

    def seconds_until(self, count: float, now: float) -> float:
        """Seconds until so much is left."""
        return max(0.0, (count - self.level(now)) * MINUTE / self.most)


class QuotaState:
    """What one key has used lately, of everything or of one adapter."""

    def __init__(self, limits: Limits, now: float) -> None:
        self.limits = limits
        self.running = 0
        self._requests = Bucket(limits.requests_per_minute, now) if limits.requests_per_minute else None
        self._tokens = Bucket(limits.tokens_per_minute, now) if limits.tokens_per_minute else None

    def check(self, of: str, now: float) -> None:
        """Raise RateLimited if another request may not begin now; `of` says whose quota it is."""
        limits = self.limits
        if limits.concurrent is not None and self.running >= limits.concurrent:
            self._refuse(f"{limits.concurrent} requests at the same time are allowed {of}", BUSY_RETRY, now)
        if self._requests is not None and (wait := self._requests.seconds_until(1, now)) > 0:
            self._refuse(f"{limits.requests_per_minute} requests a minute are allowed {of}", wait, now)
        if self._tokens is not None and (wait := self._tokens.seconds_until(1, now)) > 0:
            self._refuse(f"{limits.tokens_per_minute} tokens a minute are allowed {of}", wait, now)

    def begin(self, now: float) -> None:
        self.running += 1
        if self._requests is not None:
            self._requests.take(1, now)

    def end(self, tokens: int, now: float) -> None:
        self.running -= 1
        if self._tokens is not None:
            self._tokens.take(tokens, now)

    def unused(self, now: float) -> bool:
        """Whether a new state would be the same."""
        buckets = [each for each in (self._requests, self._tokens) if each is not None]
        return not self.running and all(each.level(now) == each.most for each in buckets)

    def headers(self, now: float) -> Headers:
        """OpenAI's headers on what is left."""
        found: Headers = {}
        for name, bucket in (("requests", self._requests), ("tokens", self._tokens)):
            if bucket is not None:
                found[f"x-ratelimit-limit-{name}"] = str(bucket.most)
                found[f"x-ratelimit-remaining-{name}"] = str(max(0, int(bucket.level(now))))
                found[f"x-ratelimit-reset-{name}"] = _duration(bucket.seconds_until(bucket.most, now))
        return found

    def _refuse(self, message: str, wait: float, now: float) -> None:
        raise RateLimited(message, retry_after=wait, headers=self.headers(now))


class QuotaUse:
    """What one request counts against, from its beginning to its end.

    Attributes:
        headers: of the response, on the quota of the key.
    """

    def __init__(self, quotas: Quotas, caller: Caller) -> None:
        self._quotas, self._caller = quotas, caller
        self._states: dict[str | None, QuotaState | None] = {}
        self.headers: Headers = {}

    def count(self, names: Sequence[str | None]) -> None:
        """Count the request against the quotas of adapters ("" is the base), or of the key (None), each once.

        An alias is an adapter here, and so is what it chose: neither quota can be gone round by way of the other.

        Raises: `RateLimited`, with no effect.
        """
        now = self._quotas.now()
        new = {name: self._quotas.state(self._caller, name, now) for name in names if name not in self._states}
        for name, state in new.items():
            if state is not None:
                state.check(f"for key {self._caller.name}{_with(name)}", now)
        for state in new.values():
            if state is not None:
                state.begin(now)
        self._states |= new
        if (state := self._states.get(None)) is not None:
            self.headers = state.headers(now)

    def end(self, tokens: int) -> None:
        """Note that the request has ended, and how many tokens it had."""
        now = self._quotas.now()
        for state in self._states.values():
            if state is not None:
                state.end(tokens, now)


class Quotas:
    """The quotas of all keys.

    Args:
        clock: seconds.

    Attributes:
        now: tells the time.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.now = clock
        self._sweep_at = SWEEP
        self._states: dict[tuple[str, str | None], QuotaState] = {}  # by key, and by adapter ("" is the base) or of all

    @contextmanager
    def use(self, caller: Caller, adapters: Sequence[str], record: RequestRecord) -> Iterator[QuotaUse]:
        """Count a request against its key's quotas while it is served.

        Args:
            adapters: names of the request's adapters, as it gives them; none for the base.
            record: has the request's tokens at the end.

        Raises: `RateLimited`.
        """
        use = QuotaUse(self, caller)
        use.count([None, *(adapters or ("",))])
        try:
            yield use
        finally:
            use.end(record.prompt_tokens + record.completion_tokens)

    def state(self, caller: Caller, name: str | None, now: float) -> QuotaState | None:
        """What a key has used of an adapter, or of everything; None if that is not limited."""
        if len(self._states) > self._sweep_at:
            self._states = {key: each for key, each in self._states.items() if not each.unused(now)}
            self._sweep_at = max(SWEEP, 2 * len(self._states))  # so that a request's share of the sweeps is small
        limits = caller.limits if name is None else caller.limits_per_adapter
        if not limits.model_fields_set:
            return None
        state = self._states.get((caller.name, name))
        if state is None or state.limits != limits:  # new, or changed in the key file
            state = self._states[caller.name, name] = QuotaState(limits, now)
        return state


def _with(name: str | None) -> str:
    """Of what a quota is, behind its key."""
    return "" if name is None else f" with adapter {name}" if name else " with the base"


def _duration(seconds: float) -> str:
    """A duration as OpenAI writes it: 120ms, 6.5s, 1m30s."""
    if seconds < 1:
        return f"{ceil(1000 * seconds)}ms"
    minutes, rest = divmod(seconds, 60)
    text = f"{rest:.3f}".rstrip("0").rstrip(".") + "s"
    return f"{int(minutes)}m{text}" if minutes else text
