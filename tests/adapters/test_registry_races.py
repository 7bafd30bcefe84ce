"""Concurrent publish, load, evict and delete: the last operation wins and nothing is left behind."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from peft_folders import write
from registry_harness import RegistryHarness

from lora_serve.adapters.registry import InMemory, LoadFailed
from lora_serve.errors import AdapterInvalid, AdapterNotFound, ServeError
from lora_serve.request import AdapterUse


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
    assert [version.digest for version in harness.registry.describe("a").versions] == [first]


def test_an_adapter_evicted_during_its_load_does_not_stay_in_memory(harness: RegistryHarness) -> None:
    digest = harness.publish("a").versions[0].digest
    results: list[Any] = []
    harness.registry.load("a", results.append)
    harness.registry.evict("a", lambda info: None)
    harness.wait_until(lambda: results)
    assert digest not in harness.cache
    assert not harness.device_slots.holds(digest)
    assert harness.registry.describe("a").versions[0].tiers == ["disk"]


def test_loading_an_adapter_cancels_its_pending_eviction(harness: RegistryHarness) -> None:
    digest = harness.publish("a").versions[0].digest
    lease = harness.registry.acquire(AdapterUse("a"))
    harness.load(digest)
    harness.registry.evict("a", lambda info: None)
    harness.run(lambda done: harness.registry.load("a", done))
    harness.registry.release(lease)
    assert digest in harness.cache


def test_an_adapter_deleted_during_its_load_leaves_nothing_behind(harness: RegistryHarness) -> None:
    digest = harness.publish("a").versions[0].digest
    results: list[Any] = []
    harness.registry.load("a", results.append)
    harness.run(lambda done: harness.registry.delete("a", done))
    harness.wait_until(lambda: results)
    assert isinstance(results[0], AdapterNotFound)
    assert (harness.cache.bytes, harness.device_slots.bytes) == (0, 0)
    harness.wait_until(lambda: not any((harness.folder / "store" / "versions").iterdir()))
    assert harness.publish("a").versions[0].digest == digest
    harness.registry.acquire(AdapterUse("a"))
    harness.load(digest)
    assert isinstance(harness.registry.state(digest), InMemory)


def test_publishing_right_after_deleting_restores_the_name(harness: RegistryHarness) -> None:
    digest = harness.publish("a").versions[0].digest
    deleted: list[Any] = []
    harness.registry.delete("a", deleted.append)
    assert harness.publish("a").versions[0].digest == digest
    assert deleted
    harness.registry.acquire(AdapterUse("a"))
    harness.load(digest)
    assert isinstance(harness.registry.state(digest), InMemory)


def test_of_two_first_publishes_of_one_name_the_second_is_refused(harness: RegistryHarness) -> None:
    results: list[Any] = []
    for seed in range(2):
        folder = write(harness.folder / "store" / "staging" / str(seed), harness.tensors(seed))
        harness.start_publish("a", folder, results.append)
    harness.wait_until(lambda: len(results) == 2)
    assert [isinstance(run, ServeError) for run in results] == [False, True]
    assert harness.registry.describe("a") == results[0]


def test_a_failed_load_is_forgotten_when_its_last_lease_is_released(harness: RegistryHarness) -> None:
    digest = harness.publish("a").versions[0].digest
    version = harness.folder / "store" / "versions" / digest
    shutil.move(version, harness.folder / "away")
    lease = harness.registry.acquire(AdapterUse("a"))
    harness.load(digest)
    failed = harness.registry.state(digest)
    assert isinstance(failed, LoadFailed)
    harness.registry.release(lease)
    assert not isinstance(harness.registry.state(digest), LoadFailed)


def test_an_adapter_whose_load_fails_is_not_pinned(harness: RegistryHarness) -> None:
    digest = harness.publish("a").versions[0].digest
    shutil.move(harness.folder / "store" / "versions" / digest, harness.folder / "away")
    with pytest.raises(AdapterInvalid):
        harness.run(lambda done: harness.registry.pin("a", True, done))
    assert not harness.registry.describe("a").pinned


def test_a_new_version_of_a_pinned_adapter_is_loaded_and_replaces_the_old_one(harness: RegistryHarness) -> None:
    old = harness.publish("a", 0).versions[0].digest
    harness.run(lambda done: harness.registry.pin("a", True, done))
    new = harness.publish("a", 1, replace=True).versions[0].digest
    harness.wait_until(lambda: harness.registry.pinned == {new})
    assert old not in harness.cache
    assert not harness.device_slots.holds(old)


def test_leased_versions_are_evicted_from_the_host_cache_last_oldest_lease_last_of_all(tmp_path: Path) -> None:
    one = RegistryHarness(tmp_path / "size")
    one.load(one.publish("a").versions[0].digest)
    size = one.cache.bytes
    one.registry.close()
    harness = RegistryHarness(tmp_path / "small", memory=2 * size)
    oldest, second, idle, third = (harness.publish(name, seed).versions[0].digest for seed, name in enumerate("abcd"))
    for name in "abd":
        harness.registry.acquire(AdapterUse(name))
    for digest in (oldest, idle, second):
        harness.load(digest)
    assert [digest in harness.cache for digest in (oldest, second, idle)] == [True, True, False]
    harness.load(third)
    assert [digest in harness.cache for digest in (oldest, second, third)] == [True, False, True]
    harness.registry.close()
