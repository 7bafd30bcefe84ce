"""Processes that share a folder are killed while they publish, delete and alias: what was answered is at all others."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from registry_harness import RegistryHarness
from replica_process import ReplicaProcess

from lora_serve.adapters.store.records import describe_folder, find_damage
from lora_serve.adapters.store.store import Store

REFUSED = ("adapter_not_found", "adapter_busy", "bad_request")  # nothing was changed


@pytest.fixture
def replicas(tmp_path: Path) -> Iterator[list[ReplicaProcess]]:
    (tmp_path / "shared").mkdir()
    started = [begin(tmp_path, number) for number in range(3)]
    yield started
    for replica in started:
        replica.kill()
        replica.close()


def begin(folder: Path, number: int) -> ReplicaProcess:
    return ReplicaProcess(folder / str(number), f"file://{folder}/shared")


@pytest.mark.parametrize("kills", [4, pytest.param(60, marks=pytest.mark.slow)])
def test_kills_lose_and_tear_nothing(kills: int, replicas: list[ReplicaProcess], tmp_path: Path) -> None:
    chosen = random.Random(kills)
    harness = RegistryHarness(tmp_path / "digests")
    digests = [describe_folder(harness.upload(seed)).digest for seed in range(8)]
    harness.registry.close()
    known: dict[str, set[str | None]] = {}  # name → newest versions, or targets, that it may have now
    answers = 0
    while kills:
        names = chosen.sample([f"n{number}" for number in range(5)] + ["x", "y"], len(replicas))
        sent = []
        for replica, name in zip(replicas, names, strict=True):
            seed, gone = chosen.randrange(8), chosen.random() < 0.2
            target = chosen.choice(["n0", "n1"])
            if name in ("x", "y"):
                replica.send(*(("unalias", name) if gone else ("alias", name, target)))
            else:
                replica.send(*(("delete", name) if gone else ("publish", name, seed)))
            before = known.get(name, {None})
            wanted = None if gone else target if name in ("x", "y") else digests[seed]
            known[name] = before | {wanted}
            sent.append((replica, name, before, wanted))
        victim = chosen.randrange(len(replicas)) if chosen.random() < 0.6 else None
        if victim is not None:
            time.sleep(chosen.uniform(0, 0.12))
            replicas[victim].kill()
            kills -= 1
        for replica, name, before, wanted in sent:
            answer = replica.receive()
            answers += answer is not None
            if answer == "done":
                known[name] = {wanted}
            elif answer in REFUSED:
                assert wanted is not None or None in before or answer != "adapter_not_found", f"{name} is lost"
                known[name] = before
            else:
                assert answer in (None, "unavailable", "partly_applied"), answer
        if victim is not None:
            replicas[victim].close()
            replicas[victim] = begin(tmp_path, victim)
    assert answers
    check_converged(replicas, known)
    for number, replica in enumerate(replicas):
        replica.kill()
        check_whole(tmp_path / str(number) / "store")
        replicas[number] = begin(tmp_path, number)


def check_converged(replicas: list[ReplicaProcess], known: dict[str, set[str | None]]) -> None:
    deadline = time.monotonic() + 20
    while True:
        served = [replica.ask("served") for replica in replicas]
        if all(each == served[0] and each[2:] == (0, 0) for each in served):
            break
        assert time.monotonic() < deadline, served
        time.sleep(0.02)
    names, aliases, _, _ = served[0]
    newest = {name: versions[0] for name, versions in names.items()} | aliases
    assert newest.keys() <= known.keys()
    for name, may_be in known.items():
        assert newest.get(name) in may_be, name


def check_whole(folder: Path) -> None:
    """A store has the versions that its names refer to, whole, and nothing is broken or was set aside for it."""
    store = Store(folder, "a fingerprint")
    try:
        assert not store.broken
        for record in store.names().values():
            for digest in record.versions:
                assert not find_damage(store.folder(digest), store.version(digest))
    finally:
        store.close()
