"""An engine driven step by step, with all its events and replies."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from support import save

from lora_serve.config import ServeConfig
from lora_serve.engine.engine import Engine
from lora_serve.errors import Failure
from lora_serve.messages import Generate
from lora_serve.request import AdapterUse, EmbeddingParams, Event, Finished, Request, Sampling, Tokens


class Session:
    """An engine with its events by request and its replies by call; `overlap` launches steps ahead, as on a GPU."""

    def __init__(self, folder: Path, *, overlap: bool = False, architecture: str = "llama", **options: Any) -> None:
        config = ServeConfig(
            store=folder / "store",
            **{
                "model": str(save(architecture, folder / "base")),
                "kv_cache_memory": 1 << 20,
                "kv_block_size": 4,
                "max_num_batched_tokens": 16,
                **options,
            },
        )
        self.engine = Engine.build(config, wake=lambda: None, progress=lambda stage, done: None, overlap=overlap)
        self.events: dict[str, list[Event]] = {}
        self.replies: dict[int, Any] = {}

    def send(
        self,
        id: str,
        prompt: list[int],
        *,
        adapter: str | None = None,
        uses: tuple[AdapterUse, ...] = (),
        tenant: str = "",
        embedding: EmbeddingParams | None = None,
        **sampling: Any,
    ) -> None:
        params = Sampling(**{"max_tokens": 8, "temperature": 0.0, "ignore_eos": True, **sampling})
        uses = uses if adapter is None else (AdapterUse(adapter),)
        self.engine.receive(Generate(Request(id, prompt, params, uses, tenant, embedding)))

    def step(self) -> None:
        for event in self.engine.step().events:
            self.events.setdefault(event.request_id, []).append(event)
        self.engine.train()
        self.replies |= {reply.id: reply for reply in self.engine.replies()}

    def run(self) -> None:
        """Step until all requests have ended, waiting for adapters to load."""
        deadline = time.monotonic() + 20
        while self.engine.busy or self.engine.stats().waiting:
            self.step()
            assert time.monotonic() < deadline, "the engine never came to rest"

    def tokens(self, id: str) -> list[int]:
        return [token for event in self.events[id] if isinstance(event, Tokens) for token in event.token_ids]

    def end(self, id: str) -> Finished:
        last = self.events[id][-1]
        assert isinstance(last, Finished)
        return last

    def ask(self, id: str, prompt: list[int], **sampling: Any) -> list[int]:
        """Run one request to its end; returns its tokens."""
        self.send(id, prompt, **sampling)
        self.run()
        return self.tokens(id)

    @property
    def blocks_used(self) -> int:
        return self.engine.stats().kv_blocks_used

    def refusal(self, id: str) -> Failure:
        """The failure of a refused request, which must be its only event."""
        assert len(self.events[id]) == 1
        failure = self.end(id).failure
        assert failure is not None
        return failure
