"""Calls of the API process: operations on adapters, aliases and training runs, which are answered when they are done.

Each is passed on to who carries it out. Where replicas share a store, changes of names are made there.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import Any

import msgspec

from lora_serve.adapters.operation_queue import if_successful
from lora_serve.adapters.operations import AdapterOperations
from lora_serve.adapters.registry import Registry
from lora_serve.adapters.sharing import SharedOperations
from lora_serve.engine.training.training_runs import TrainingRuns
from lora_serve.errors import BadRequest, Failure, ServeError, Unavailable
from lora_serve.messages import (
    Call,
    DeleteAdapter,
    DeleteAlias,
    DescribeAdapter,
    DescribeAlias,
    Drain,
    EngineInfo,
    EvictAdapter,
    Inspect,
    ListAdapters,
    ListAliases,
    ListNames,
    LoadAdapter,
    LocateFiles,
    Operation,
    PinAdapter,
    Publish,
    PutAlias,
    Reply,
    ResolveAdapters,
    UnloadAdapter,
)
from lora_serve.names import check_adapter_name
from lora_serve.training_messages import CreateRun, ExportRun, PublishRun, RunOperation

Done = Callable[[Any], None]  # called with a result or a ServeError, now or later


class AdminCalls:
    """Starts calls, and keeps their replies until they are taken.

    Args:
        shared: the changes that all replicas make, where these share a store.
        training: None: there is no memory for any.
    """

    def __init__(
        self,
        info: EngineInfo,
        registry: Registry,
        operations: AdapterOperations,
        shared: SharedOperations | None,
        training: TrainingRuns | None,
    ) -> None:
        self._info, self._registry, self._operations = info, registry, operations
        self._shared, self._training = shared, training
        self._replies: list[Reply] = []

    @property
    def has_replies(self) -> bool:
        return bool(self._replies)

    def take_replies(self) -> list[Reply]:
        """Replies that became ready since the last time."""
        replies, self._replies = self._replies, []
        return replies

    def reply(self, reply: Reply) -> None:
        """Add a reply."""
        self._replies.append(reply)

    def start(self, call: Call, *, draining: bool) -> None:
        """Start a call; nothing is raised.

        Args:
            draining: whether the engine is about to end.
        """

        def done(result: Any) -> None:
            if isinstance(result, ServeError):
                self.reply(Reply(call.id, failure=Failure.of(result)))
            else:
                self.reply(Reply(call.id, msgspec.to_builtins(result)))

        try:
            if isinstance(call.operation, CreateRun) and draining:  # those that there are can be saved
                raise Unavailable("the server is shutting down", retry_after=5)
            self._dispatch(call.operation, done)
        except ServeError as error:
            done(error)

    def _dispatch(self, operation: Operation, done: Done) -> None:
        operations, shared = self._operations, self._shared
        match operation:
            case Publish() if shared is not None:
                shared.publish(operation, done)
            case DeleteAdapter(name, precondition) if shared is not None:
                shared.delete(name, done, precondition)
            case PutAlias() if shared is not None:
                shared.put_alias(operation, done)
            case DeleteAlias() if shared is not None:
                shared.delete_alias(operation, done)
            case Publish():
                operations.publish(operation, done)
            case PublishRun():
                self._publish_run(operation, done)
            case Inspect():
                operations.inspect(operation, done)
            case ListAdapters(after):
                done(operations.describe_some(after))
            case DescribeAdapter(name):
                done(operations.describe(name))
            case LoadAdapter(name):
                operations.load(name, done)
            case EvictAdapter(name):
                operations.evict(name, done)
            case PinAdapter(name, pinned):
                operations.pin(name, pinned, done)
            case DeleteAdapter(name, precondition):
                operations.delete(name, done, precondition)
            case UnloadAdapter(name):
                operations.unload(name, done)
            case ResolveAdapters(adapters, routing):
                done([self._registry.resolve(use, routing) for use in adapters])
            case LocateFiles():
                done(operations.locate(operation))
            case PutAlias():
                operations.aliases.put(operation, done)
            case DeleteAlias():
                operations.aliases.delete(operation, done)
            case DescribeAlias(name):
                done(operations.aliases.describe(name))
            case ListAliases(after):
                done(operations.aliases.describe_some(after))
            case ListNames(most):
                done(list(islice(operations.names(), most)))
            case Drain():
                raise AssertionError("draining is the engine's own")
            case _:
                self._train(operation, done)

    def _publish_run(self, operation: PublishRun, done: Done) -> None:
        """Write a run's adapter into the store's staging and publish it from there, without a compiler process."""
        check_adapter_name(operation.name, self._info.model)
        folder = str(self._operations.new_folder())

        def publish(_: Any) -> None:
            named = Publish(operation.name, folder)
            self._operations.publish(named, done, own=True, durable=operation.durable)

        # Not waited for: the store waits for its files, if it is to.
        self._train(ExportRun(operation.run, folder, durable=False), if_successful(publish, done))

    def _train(self, operation: RunOperation, done: Done) -> None:
        if self._training is None:
            raise BadRequest("training is off: this server was started without --training-memory")
        self._training.start(operation, done)
