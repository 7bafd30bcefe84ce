"""What a caller may have done to the adapters, handed to the registry."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lora_serve.adapters.registry import Registry
from lora_serve.messages import (
    DeleteAdapter,
    DescribeAdapter,
    EvictAdapter,
    Inspect,
    ListAdapters,
    LoadAdapter,
    PinAdapter,
    Publish,
)

Operation = Publish | Inspect | ListAdapters | DescribeAdapter | LoadAdapter | EvictAdapter | PinAdapter | DeleteAdapter


def start(operation: Operation, registry: Registry, done: Callable[[Any], None]) -> None:
    """Start an operation; `done` gets its result or a ServeError, now or when it is ready. Raises ServeError too."""
    match operation:
        case Publish():
            registry.publish(operation, done)
        case Inspect():
            registry.inspect(operation, done)
        case ListAdapters():
            done(registry.describe_all())
        case DescribeAdapter():
            done(registry.describe(operation.name))
        case LoadAdapter():
            registry.load(operation.name, done)
        case EvictAdapter():
            registry.evict(operation.name, done)
        case PinAdapter():
            registry.pin(operation.name, operation.pinned, done)
        case DeleteAdapter():
            registry.delete(operation.name, done)
