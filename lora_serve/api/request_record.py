"""What one HTTP request was and came to, for logs, usage and quotas; never a prompt, a key or generated text."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from starlette.types import Scope

from lora_serve.request import Request, Sampling, Served, Tokens


class Change(NamedTuple):
    """What a request changed, or tried to: for the audit log.

    Attributes:
        action: publish, delete, load, evict, pin, unpin, unload; alias, unalias; upload-file, delete-file; create-job,
            cancel-job, pause-job, resume-job, delete-job, create-checkpoint; download, which changes nothing.
        name: of the adapter or alias, or the file's id.
        digest: of the version or file, or of what an alias stands for; empty if none was named or made.
        targets: of an alias, with their weights.
    """

    action: str
    name: str
    digest: str = ""
    targets: str = ""


@dataclass
class RequestRecord:
    """One HTTP request, filled in while it is served.

    Attributes:
        begun: when it arrived, in seconds on the monotonic clock.
        sent: when the first of its choices was sent to the engine; None if none was. So is `started`, when the first
            one with a token was in its first step.
        choices: how many were admitted.
        sampling: of its first choice.
        cached: prompt tokens of it that were found in the prefix cache.
        served: the adapter versions that serve it, as name@digest; empty for the base.
        adapter_names: of these; joined by + where there are several.
        prompt_tokens, completion_tokens: of all its choices; a prompt with several choices counts once.
        queued: seconds from arrival in the engine to the first step, of its first choice; None if none ran.
        first_token: seconds from arrival to the first token; None if there was none.
        error: kind of the error that it ended with, and the reason in words that no client chose; if any.
        changes: what it changed.
    """

    begun: float = field(default_factory=time.monotonic)
    sent: float | None = None
    started: float | None = None
    choices: int = 0
    sampling: Sampling | None = None
    cached: int = 0
    served: list[str] = field(default_factory=list)
    adapter_names: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    queued: float | None = None
    first_token: float | None = None
    error: tuple[str, str | None] | None = None
    changes: list[Change] = field(default_factory=list)
    _prompts: dict[int, list[int]] = field(default_factory=dict)  # by identity, and kept so that this is unique
    _outcomes: dict[int, str] = field(default_factory=dict)  # of its choices that have ended, by index

    def sending(self) -> None:
        """One of its choices is about to be sent to the engine."""
        if self.sent is None:
            self.sent = time.monotonic()

    def admitted(self, request: Request, adapters: Sequence[Served]) -> None:
        """The engine admitted one of its choices."""
        if id(request.prompt) not in self._prompts:  # the choices of a prompt share it
            self.prompt_tokens += len(request.prompt)
            self._prompts[id(request.prompt)] = request.prompt
        self.choices += 1
        self.sampling = self.sampling or request.sampling
        self.served = [f"{adapter.name}@{adapter.digest[:12]}" for adapter in adapters]
        self.adapter_names = "+".join(adapter.name for adapter in adapters)

    def generated(self, tokens: Tokens) -> None:
        """One of its choices has new tokens."""
        self.completion_tokens += len(tokens.token_ids)
        if self.first_token is None:
            self.first_token = time.monotonic() - self.begun
            self.queued = tokens.queued
            self.cached = tokens.cached
            self.started = self._first_step(tokens)

    def _first_step(self, tokens: Tokens) -> float:
        """When the first step began: the engine's clock is this one, where clocks are the machine's."""
        sent = self.begun if self.sent is None else self.sent
        now = time.monotonic()
        return tokens.started if sent <= tokens.started <= now else min(sent + tokens.queued, now)

    def finished(self, choice: int, outcome: str) -> None:
        """One of its choices has ended: `outcome` is a finish reason, "abort", or the kind of its error."""
        self._outcomes[choice] = outcome

    def failed(self, kind: str, reason: str | None) -> None:
        """It ended with an error."""
        self.error = kind, reason

    @property
    def finish(self) -> str | None:
        """How its choices ended: what is different, in order of choice; None if none has."""
        return ",".join(dict.fromkeys(self._outcomes[choice] for choice in sorted(self._outcomes))) or None


def record_of(scope: Scope) -> RequestRecord:
    """The record of a request, begun when it is first asked for."""
    state = scope.setdefault("state", {})
    if "record" not in state:
        state["record"] = RequestRecord()
    record: RequestRecord = state["record"]
    return record
