"""A training run of the engine that goes on after the engine was restarted.

The engine keeps runs in memory only. So operations that change the run are remembered here since the state that was
last saved; on a new engine the run is made again, that state restored, and they are carried out once more. When that
would take long, the state is saved.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from lora_serve.api.services import EngineProtocol
from lora_serve.errors import BadRequest, RunNotFound, ServeError, Unavailable
from lora_serve.training_messages import (
    CloseRun,
    CreateRun,
    ForwardBackward,
    OptimizerStep,
    PublishRun,
    RestoreRun,
    RunOperation,
    RunSettings,
    SaveRun,
)

TRIES = 4  # of an operation during which the engine ends
START_SECONDS = 600.0  # that a restarted engine may take
REPLAY_SECONDS = 20.0  # of the engine's work, and bytes of operations, that may have to be repeated
REPLAY_BYTES = 32 << 20
GONE = (RunNotFound.kind, Unavailable.kind)  # kinds of errors after which the run has to be made again

log = logging.getLogger(__name__)

MakeOperation = Callable[[], RunOperation]


class _Logged(NamedTuple):
    make: MakeOperation
    size: int
    adds_gradients: bool


class ResumableRun:
    """One run.

    Args:
        name: of the run.
        owner: whose turn it is, among the engine's runs.
        state: the folder from which it goes on, if it was saved before.
    """

    def __init__(
        self, engine: EngineProtocol, name: str, owner: str, settings: RunSettings, state: Path | None = None
    ) -> None:
        self.name, self.settings = name, settings
        self._engine, self._owner = engine, owner
        self._state = state
        self._generation: int | None = None  # restarts of the engine at which it was made
        self._log: list[_Logged] = []
        self._seconds = 0.0

    def __repr__(self) -> str:
        return f"<ResumableRun {self.name}: {len(self._log)} operations since {self._state or 'its beginning'}>"

    @property
    def can_save(self) -> bool:
        """Whether its state is all there is of it now: there are no gradients that were not applied."""
        return not self._log or not self._log[-1].adds_gradients

    @property
    def is_long(self) -> bool:
        """Whether repeating what was done since the last state would take long."""
        return self._seconds > REPLAY_SECONDS or sum(each.size for each in self._log) > REPLAY_BYTES

    async def start(self) -> None:
        """Make the run. Raises the engine's `ServeError`."""
        await self._retried(self._ensure)

    async def change(self, make: MakeOperation, size: int) -> Any:
        """Carry out an operation that changes weights, gradients or optimizer, and remember it.

        Args:
            make: makes the operation, whenever it is repeated.
            size: bytes that are kept for that.
        """
        operation = make()
        begun = time.monotonic()
        try:
            result = await self._retried(self._engine_call(operation))
        except BadRequest:
            if isinstance(operation, OptimizerStep):
                self._forget_gradients()
            raise
        except ServeError:
            self._forget_gradients()
            raise
        self._log.append(_Logged(make, size, isinstance(operation, ForwardBackward)))
        self._seconds += time.monotonic() - begun
        return result

    async def ask(self, operation: RunOperation | PublishRun) -> Any:
        """Carry out an operation that changes nothing."""
        return await self._retried(self._engine_call(operation))

    async def save_state(self, folder: Path) -> None:
        """Save the state to a new folder, and go on from there if need be; `can_save` says whether it may."""
        await self.ask(SaveRun(self.name, str(folder)))
        self._state = folder
        self._log.clear()
        self._seconds = 0.0

    async def close(self) -> None:
        """End the run; it does not matter if the engine has ended."""
        try:
            await self._engine.call(CloseRun(self.name))
        except ServeError as error:
            log.info("a training run was not closed: %s", error.message)

    def _forget_gradients(self) -> None:
        """Note that the engine has dropped the gradients that were added since the last step."""
        while self._log and self._log[-1].adds_gradients:
            self._log.pop()

    def _engine_call(self, operation: RunOperation | PublishRun) -> Callable[[], Any]:
        async def call() -> Any:
            await self._ensure()
            return await self._engine.call(operation)

        return call

    async def _retried(self, call: Callable[[], Any]) -> Any:
        for left in reversed(range(TRIES)):
            try:
                return await call()
            except ServeError as error:
                if error.kind not in GONE or not left or self._is_of_a_living_engine(error):
                    raise
                self._generation = None
                await self._until_ready()
        raise AssertionError

    def _is_of_a_living_engine(self, error: ServeError) -> bool:
        """Whether an engine that still has the run raised this, for want of memory."""
        same = self._engine.ready and self._engine.restarts == self._generation
        return same and isinstance(error, Unavailable)

    async def _until_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not self._engine.ready and time.monotonic() < deadline:
            await asyncio.sleep(0.1)

    async def _ensure(self) -> None:
        """Make the run on this engine, and bring it to where it was, unless that was done."""
        generation = self._engine.restarts
        if self._generation == generation:
            return
        if self._generation is not None or self._log:
            log.info("training run %s goes on; operations that are repeated: %d", self.name, len(self._log))
        await self._engine.call(CloseRun(self.name))
        await self._engine.call(CreateRun(self.name, self.settings, self._owner))
        if self._state is not None:
            await self._engine.call(RestoreRun(self.name, str(self._state)))
        for logged in self._log:
            await self._engine.call(logged.make())
        self._generation = generation
