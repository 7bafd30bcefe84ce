"""The engine as the API sees it. `engine/client.py` has the real one; tests bring their own."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from typing import Any, Protocol

from lora_serve.messages import EngineInfo, Operation, Stats, Update
from lora_serve.request import Event, Request


class Engine(Protocol):
    """Properties tell the truth at this moment; nothing here blocks the event loop."""

    @property
    def info(self) -> EngineInfo | None:
        """None until the engine was ready for the first time; kept while it restarts."""

    @property
    def stats(self) -> Stats:
        """The newest numbers."""

    @property
    def alive(self) -> bool:
        """The heartbeat is recent."""

    @property
    def ready(self) -> bool:
        """Requests are taken: started, alive, not draining."""

    @property
    def restarts(self) -> int:
        """How often the engine was started again."""

    def generate(self, request: Request) -> AsyncGenerator[Event, None]:
        """Serve one request: `Admitted`, `Tokens`…, `Finished`. A refusal is a first and only `Finished`.

        Closing the generator at any moment aborts the request. Raises `Unavailable` if the engine takes none.
        """

    async def call(self, operation: Operation) -> Any:
        """`Reply.result` of an operation, in builtins form; raises its `ServeError`."""

    def observe(self, observer: Callable[[Update], None]) -> None:
        """Have every `Update` shown to `observer`."""
