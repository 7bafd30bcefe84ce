"""Replicas as processes, forked from the test's, which can be killed at any moment: all of a server but its base."""

from __future__ import annotations

import multiprocessing
import os
import signal
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from registry_harness import BASE_NAME, RegistryHarness

from lora_serve.adapters import sharing
from lora_serve.adapters.shared.shared_location import open_objects
from lora_serve.adapters.shared.shared_store import SharedStore
from lora_serve.adapters.sharing import SharedOperations
from lora_serve.errors import ServeError
from lora_serve.messages import AliasTarget, DeleteAlias, Publish, PutAlias

LOOKS = 0.05  # seconds between looks at the catalog


class ReplicaProcess:
    """One replica of a shared store at a URL; what it has on its disk survives it."""

    def __init__(self, folder: Path, url: str) -> None:
        self._connection, other = multiprocessing.Pipe()
        self.pid = os.fork()
        if not self.pid:
            try:
                self._connection.close()
                _serve(other, folder, url)
            finally:
                os._exit(1)
        other.close()

    def send(self, *command: Any) -> None:
        """Send a command, unless the process has ended."""
        with suppress(OSError):
            self._connection.send(command)

    def receive(self, timeout: float = 30.0) -> Any:
        """The answer to the last command; None if the process ended before it gave one."""
        try:
            return self._connection.recv() if self._connection.poll(timeout) else None
        except (EOFError, OSError):
            return None

    def ask(self, *command: Any) -> Any:
        self.send(*command)
        return self.receive()

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)

    def close(self) -> None:
        self._connection.close()


def _serve(connection: Connection, folder: Path, url: str) -> None:
    """Answer commands as the engine's loop does, until the other end is closed."""
    sharing.READ_EVERY = LOOKS
    harness = RegistryHarness(folder, keep_versions=3)
    store = SharedStore(open_objects(url), "a fingerprint", "tests", harness.store.followed())
    shared = SharedOperations(
        store,
        harness.operations,
        harness.registry,
        harness.residency,
        harness.publisher,
        harness.workers,
        base_name=BASE_NAME,
        keep_versions=3,
    )
    shared.start(lambda done, of: None)
    while True:
        harness.registry.poll()
        if connection.poll(0.002):
            _do(connection.recv(), harness, shared, connection)


def _do(command: Any, harness: RegistryHarness, shared: SharedOperations, connection: Connection) -> None:
    def done(result: Any) -> None:
        connection.send(result.kind if isinstance(result, ServeError) else "done")

    try:
        match command:
            case ("publish", name, seed):
                shared.publish(Publish(name, str(harness.upload(seed)), replace=True), done)
            case ("delete", name):
                shared.delete(name, done)
            case ("alias", alias, target):
                shared.put_alias(PutAlias(alias, [AliasTarget(target)]), done)
            case ("unalias", alias):
                shared.delete_alias(DeleteAlias(alias), done)
            case ("served",):
                names = {name: record.versions for name, record in harness.residency.names.items()}
                aliases = {name: str(each.targets[0]) for name, each in harness.residency.aliases.records.items()}
                connection.send((names, aliases, shared.status().behind, len(harness.publisher.broken)))
    except ServeError as error:
        done(error)
