"""Concurrent publish, load, evict and delete: the last operation wins and nothing is left behind."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from registry_harness import RegistryHarness

from lora_serve.adapters.registry import Lease
from lora_serve.errors import AdapterBroken, AdapterNotFound, ServeError
from lora_serve.messages import AliasTarget, DeleteAlias, PutAlias
from lora_serve.request import AdapterUse

ACTIONS = (
    *("publish", "publish", "delete", "load", "evict", "pin", "unpin", "unload", "acquire", "acquire"),
    *("alias", "alias", "unalias"),
)


def test_publishing_a_version_that_is_still_leased_makes_it_the_current_one_again(
    harness: RegistryHarness,
) -> None:
    first = harness.publish("a", 0).versions[0].digest
    lease = harness.registry.acquire(AdapterUse("a"))
    second = harness.publish("a", 1, replace=True).versions[0].digest
    held = harness.registry.acquire(AdapterUse("a"))
    info = harness.publish("a", 0, replace=True)
    assert [version.digest for version in info.versions] == [first, second]
    assert harness.registry.acquire(AdapterUse("a", first[:8])).digest == first
    harness.registry.release(lease)
    harness.registry.release(held)
    assert [version.digest for version in harness.operations.describe("a").versions] == [first]


def test_an_adapter_evicted_during_its_load_does_not_stay_in_memory(harness: RegistryHarness) -> None:
    harness.publish("a")
    results: list[Any] = []
    harness.operations.load("a", results.append)
    harness.operations.evict("a", lambda info: None)
    harness.wait_until(lambda: results)
    assert (harness.device_slots.bytes, harness.residency.host_bytes) == (0, 0)
    assert harness.operations.describe("a").versions[0].tiers == ["disk"]


def test_loading_an_adapter_cancels_its_pending_eviction(harness: RegistryHarness) -> None:
    digest = harness.publish("a").versions[0].digest
    lease = harness.registry.acquire(AdapterUse("a"))
    harness.load(digest)
    harness.operations.evict("a", lambda info: None)
    harness.run(lambda done: harness.operations.load("a", done))
    harness.registry.release(lease)
    assert harness.registry.memory.holds(digest)


def test_an_adapter_deleted_during_its_load_leaves_nothing_behind(harness: RegistryHarness) -> None:
    digest = harness.publish("a").versions[0].digest
    results: list[Any] = []
    harness.operations.load("a", results.append)
    harness.run(lambda done: harness.operations.delete("a", done))
    harness.wait_until(lambda: results)
    assert isinstance(results[0], AdapterNotFound)
    assert (harness.residency.host_bytes, harness.device_slots.bytes) == (0, 0)
    harness.wait_until(lambda: not any((harness.folder / "store" / "versions").iterdir()))
    assert harness.publish("a").versions[0].digest == digest
    harness.registry.acquire(AdapterUse("a"))
    harness.load(digest)
    assert harness.registry.memory.holds(digest)


def test_publishing_right_after_deleting_restores_the_name(harness: RegistryHarness) -> None:
    digest = harness.publish("a").versions[0].digest
    deleted: list[Any] = []
    harness.operations.delete("a", deleted.append)
    assert harness.publish("a").versions[0].digest == digest
    assert deleted
    harness.registry.acquire(AdapterUse("a"))
    harness.load(digest)
    assert harness.registry.memory.holds(digest)


def test_of_two_first_publishes_of_one_name_the_second_is_refused(harness: RegistryHarness) -> None:
    results: list[Any] = []
    for seed in range(2):
        harness.start_publish("a", harness.upload(seed), results.append)
    harness.wait_until(lambda: len(results) == 2)
    assert [isinstance(run, ServeError) for run in results] == [False, True]
    assert harness.operations.describe("a") == results[0]


def test_a_failed_load_is_tried_again_by_the_first_request_after_those_that_it_ended(harness: RegistryHarness) -> None:
    digest = harness.publish("a").versions[0].digest
    harness.store.folder(digest).rename(harness.folder / "away")
    lease = harness.registry.acquire(AdapterUse("a"))
    harness.load(digest)
    version = harness.residency.versions[digest]
    assert version.failure is not None
    assert "is missing" in str(harness.operations.describe("a").broken)
    with pytest.raises(AdapterBroken, match="adapter a cannot be served"):
        harness.registry.acquire(AdapterUse("a"))
    harness.registry.release(lease)
    (harness.folder / "away").rename(harness.store.folder(digest))
    harness.registry.acquire(AdapterUse("a"))
    harness.load(digest)
    assert harness.registry.memory.holds(digest)
    assert harness.operations.describe("a").broken is None


def test_an_adapter_whose_load_fails_is_not_pinned(harness: RegistryHarness) -> None:
    digest = harness.publish("a").versions[0].digest
    harness.store.folder(digest).rename(harness.folder / "away")
    with pytest.raises(AdapterBroken):
        harness.run(lambda done: harness.operations.pin("a", True, done))
    assert not harness.operations.describe("a").pinned


def test_publishing_and_deleting_one_name_at_once_leaves_what_was_asked_for_last(harness: RegistryHarness) -> None:
    results: list[Any] = []
    harness.publish("a", 0)
    harness.start_publish("a", harness.upload(1), results.append, replace=True)
    harness.operations.delete("a", results.append)
    harness.start_publish("b", harness.upload(2), results.append)
    harness.operations.delete("b", results.append)
    harness.start_publish("b", harness.upload(3), results.append)
    harness.wait_until(lambda: len(results) == 5)
    assert [isinstance(result, ServeError) for result in results] == [False] * 5
    (info,) = harness.operations.describe_some("")
    assert info.name == "b"
    assert list(harness.store.names()) == ["b"]
    with pytest.raises(AdapterNotFound):
        harness.registry.acquire(AdapterUse("a"))
    harness.wait_until(lambda: len(list((harness.folder / "store" / "versions").iterdir())) == 1)
    harness.registry.acquire(AdapterUse("b"))
    harness.load(info.versions[0].digest)
    assert harness.registry.memory.holds(info.versions[0].digest)


def test_a_pin_and_an_unloading_that_meet_a_publish_are_not_lost(harness: RegistryHarness) -> None:
    results: list[Any] = []
    for name in "ab":
        harness.publish(name, 0)
        harness.start_publish(name, harness.upload(ord(name)), results.append, replace=True)
    harness.operations.pin("a", True, results.append)
    harness.operations.unload("b", results.append)
    harness.wait_until(lambda: len(results) == 4)
    (info,) = harness.operations.describe_some("")
    assert (info.name, info.pinned) == ("a", True)
    harness.wait_until(lambda: harness.store.names()["b"].unlisted)
    stored = harness.store.names()["a"]
    assert (stored.versions, stored.pinned) == ([info.versions[0].digest], True)


def test_a_new_version_of_a_pinned_adapter_is_loaded_and_replaces_the_old_one(harness: RegistryHarness) -> None:
    old = harness.publish("a", 0).versions[0].digest
    harness.run(lambda done: harness.operations.pin("a", True, done))
    new = harness.publish("a", 1, replace=True).versions[0].digest
    harness.load(new)
    assert harness.registry.pinned == {new}
    assert old not in harness.residency.versions


@pytest.mark.parametrize("seed", range(6))
def test_whatever_meets_every_operation_is_answered_and_memory_disk_and_names_agree(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    device, keep_versions = rng.choice((None, 4000)), rng.choice((1, 2))
    harness = RegistryHarness(tmp_path, memory=3000, device=device, keep_versions=keep_versions)
    registry, residency = harness.registry, harness.residency
    asked, answers = 0, list[Any]()
    leases: list[Lease] = []
    for number in range(250):
        name = rng.choice("abcd")
        action = rng.choice(ACTIONS)
        asked += action not in ("acquire",)
        try:
            if action == "publish":
                folder = harness.upload(rng.randrange(4) + 10 * number * rng.randrange(2))
                harness.start_publish(name, folder, answers.append, replace=rng.random() < 0.8)
            elif action == "alias":
                known = residency.names[name].versions if name in residency.names else ["0"]
                target = f"{name}@{rng.choice(known)}" if rng.random() < 0.7 else name
                change = PutAlias(rng.choice("dxy"), [AliasTarget(target)])
                harness.operations.aliases.put(change, answers.append)
            elif action == "unalias":
                harness.operations.aliases.delete(DeleteAlias(rng.choice("dxy")), answers.append)
            elif action in ("delete", "load", "evict", "unload"):
                getattr(harness.operations, action)(name, answers.append)
            elif action in ("pin", "unpin"):
                harness.operations.pin(name, action == "pin", answers.append)
            else:
                leases.append(registry.acquire(AdapterUse(rng.choice((name, "x")))))
        except ServeError as error:
            answers += [] if action == "acquire" else [error]
        if leases and rng.random() < 0.5:
            registry.release(leases.pop(rng.randrange(len(leases))))
        for _ in range(rng.choice((0, 0, 1, 5))):
            registry.poll()
        ready = list({lease.digest for lease in leases if registry.memory.holds(lease.digest)})[:2]
        if residency.decide_slots(ready) is not None:
            registry.memory.assign_slots(ready)
        assert residency.host_bytes <= 3000
        assert harness.device_slots.bytes == residency.device.bytes
    for lease in leases:
        registry.release(lease)
    harness.wait_until(lambda: len(answers) == asked)
    aliases = residency.aliases.records

    def settled() -> bool:
        """Whether memory, records and folders have the same versions, and no older one that no alias names."""
        names = {name: record.versions for name, record in residency.names.items()}
        kept = {digest for versions in names.values() for digest in versions}
        return (
            {name: record.versions for name, record in harness.store.names().items()} == names
            and residency.versions.keys() == kept
            and {path.name for path in (tmp_path / "store" / "versions").iterdir()} == kept
            and all(
                any(record.names(name, digest) for record in aliases.values())
                for name, versions in names.items()
                for digest in versions[keep_versions:]
            )
        )

    harness.wait_until(settled)  # the last words may still be on their way to the disk
    names = {name: record.versions for name, record in residency.names.items()}
    assert harness.store.aliases() == aliases
    for record in aliases.values():
        for target in record.targets:
            assert target.name in names
            assert target.version in ("", *names[target.name])
    staging = harness.store.staging  # uploads that were refused before they were looked at are the API's to remove
    harness.wait_until(lambda: all(path.name.startswith("upload-") for path in staging.iterdir()))
    registry.close()
    again = RegistryHarness(tmp_path, memory=3000, device=device, keep_versions=keep_versions)
    assert again.notes == []
    assert {name: record.versions for name, record in again.residency.names.items()} == names
    assert again.residency.aliases.records == aliases
    again.registry.close()
