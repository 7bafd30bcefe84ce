"""The registry: leases on exact versions, one load for many requests, and memory that is freed exactly."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest
from peft_folders import tensors, write
from registry_harness import BASE_NAME, RegistryHarness

from lora_serve.adapters.registry import InMemory, LoadFailed, Loading
from lora_serve.adapters.store import Meta
from lora_serve.adapters.traits import Traits
from lora_serve.errors import AdapterBusy, AdapterExists, AdapterInvalid, AdapterNotFound
from lora_serve.messages import Publish
from lora_serve.request import AdapterUse


def test_a_published_adapter_can_be_leased_loaded_and_assigned_a_slot(harness: RegistryHarness) -> None:
    info = harness.publish("a")
    lease = harness.registry.acquire(AdapterUse("a", weight=0.5))
    assert (lease.name, lease.digest, lease.weight) == ("a", info.versions[0].digest, 0.5)
    assert isinstance(harness.registry.state(lease.digest), Loading)
    harness.load(lease.digest)
    assert harness.registry.assign_slots([lease.digest]) == {lease.digest: harness.device_slots.slot(lease.digest)}
    version = harness.registry.describe("a").versions[0]
    assert (version.tiers, version.leases, version.rank, version.modules) == (["disk", "host", "device"], 1, 4, 3)
    assert harness.stats().resident == ["a"]


def test_unknown_names_and_versions_are_not_found(harness: RegistryHarness) -> None:
    digest = harness.publish("a").versions[0].digest
    for use in (AdapterUse("b"), AdapterUse("a", "zzz")):
        with pytest.raises(AdapterNotFound) as caught:
            harness.registry.acquire(use)
        assert caught.value.param == "adapter"
    assert harness.registry.acquire(AdapterUse("a", digest[:6])).digest == digest


def test_many_requests_for_one_version_cause_one_load(harness: RegistryHarness) -> None:
    digest = harness.publish("a").versions[0].digest
    for _ in range(5):
        harness.registry.acquire(AdapterUse("a"))
        harness.registry.request_load(digest)
    harness.load(digest)
    assert harness.stats().loads_total["host"] == 1


def test_running_requests_keep_the_old_version_after_a_new_one_is_published(harness: RegistryHarness) -> None:
    old = harness.publish("a", 0).versions[0].digest
    lease = harness.registry.acquire(AdapterUse("a"))
    harness.load(old)
    info = harness.publish("a", 1, replace=True)
    assert [version.digest for version in info.versions][1:] == [old]
    assert harness.registry.acquire(AdapterUse("a")).digest == info.versions[0].digest != old
    assert isinstance(harness.registry.state(old), InMemory)
    assert harness.registry.acquire(AdapterUse("a", old[:8])).digest == old
    harness.registry.release(lease)
    harness.registry.release(lease)
    assert old not in harness.cache
    assert len(harness.registry.describe("a").versions) == 1
    harness.wait_until(lambda: not (harness.folder / "store" / "versions" / old).exists())


def test_publishing_the_same_content_again_changes_nothing(harness: RegistryHarness) -> None:
    first = harness.publish("a").versions[0].digest
    harness.load(first)
    assert harness.publish("a", replace=True).versions[0].digest == first
    assert first in harness.cache


def test_a_taken_name_is_refused(harness: RegistryHarness) -> None:
    harness.publish("a")
    with pytest.raises(AdapterExists):
        harness.publish("a", 1)


def test_a_refused_upload_leaves_nothing_behind(harness: RegistryHarness) -> None:
    folder = write(harness.folder / "store" / "staging" / "bad", tensors(), use_dora=True)
    with pytest.raises(AdapterInvalid, match="use_dora"):
        harness.run(lambda done: harness.registry.publish(Publish("bad", str(folder)), done))
    assert not folder.exists()
    assert harness.registry.describe_all() == []


def test_a_deleted_adapter_is_freed_when_its_last_lease_is_released(harness: RegistryHarness) -> None:
    digest = harness.publish("a").versions[0].digest
    lease = harness.registry.acquire(AdapterUse("a"))
    harness.load(digest)
    harness.registry.assign_slots([digest])
    harness.run(lambda done: harness.registry.delete("a", done))
    with pytest.raises(AdapterNotFound):
        harness.registry.acquire(AdapterUse("a"))
    assert harness.device_slots.holds(digest)
    harness.registry.release(lease)
    assert (harness.device_slots.bytes, harness.cache.bytes) == (0, 0)
    harness.wait_until(lambda: not any((harness.folder / "store" / "versions").iterdir()))


def test_no_adapter_has_the_name_of_the_base(harness: RegistryHarness) -> None:
    with pytest.raises(AdapterExists, match="name of the base"):
        harness.publish(BASE_NAME)
    write(harness.folder / "start" / BASE_NAME, harness.tensors(1))
    ((name, error),) = harness.registry.publish_folder(harness.folder / "start")
    assert (name, type(error)) == (BASE_NAME, AdapterExists)


def test_unloading_deletes_copies_of_folders_and_keeps_uploads(harness: RegistryHarness) -> None:
    def unload(done: Any) -> None:
        harness.registry.unload("a", done)

    harness.publish("a")
    harness.run(lambda done: harness.registry.load("a", done))
    harness.run(unload)
    assert (harness.device_slots.bytes, harness.cache.bytes) == (0, 0)
    assert harness.registry.describe_all() == []
    with pytest.raises(AdapterNotFound):
        harness.registry.acquire(AdapterUse("a"))
    harness.run(lambda done: harness.registry.load("a", done))  # listed again
    assert [info.name for info in harness.registry.describe_all()] == ["a"]
    harness.run(unload)
    folder = write(harness.folder / "source", harness.tensors(1))
    publish = Publish("a", str(folder), source=str(folder))  # the name is free
    harness.run(lambda done: harness.registry.publish(publish, done))
    harness.run(unload)
    with pytest.raises(AdapterNotFound):
        harness.registry.describe("a")
    with pytest.raises(AdapterNotFound):
        harness.run(lambda done: harness.registry.load("a", done))


def test_evicting_frees_memory_and_keeps_the_files(harness: RegistryHarness) -> None:
    digest = harness.publish("a").versions[0].digest
    harness.load(digest)
    harness.registry.assign_slots([digest])
    taken = harness.device_slots.bytes
    assert taken == harness.cache.bytes > 0
    info = harness.run(lambda done: harness.registry.evict("a", done))
    assert info.versions[0].tiers == ["disk"]
    assert (harness.device_slots.bytes, harness.cache.bytes) == (0, 0)
    harness.load(digest)
    assert isinstance(harness.registry.state(digest), InMemory)


def test_evicting_an_adapter_in_use_takes_effect_when_its_last_lease_is_released(harness: RegistryHarness) -> None:
    digest = harness.publish("a").versions[0].digest
    lease = harness.registry.acquire(AdapterUse("a"))
    harness.load(digest)
    harness.run(lambda done: harness.registry.evict("a", done))
    assert digest in harness.cache
    harness.registry.release(lease)
    assert digest not in harness.cache


def test_pinned_adapters_keep_their_slots_and_one_slot_cannot_be_pinned(harness: RegistryHarness) -> None:
    for seed, name in enumerate("abc"):
        harness.publish(name, seed)
    pinned = [harness.run(lambda done, name=name: harness.registry.pin(name, True, done)) for name in "ab"]
    assert all(info.pinned and "device" in info.versions[0].tiers for info in pinned)
    assert len(harness.registry.pinned) == 2
    with pytest.raises(AdapterBusy):
        harness.run(lambda done: harness.registry.pin("c", True, done))
    with pytest.raises(AdapterBusy):
        harness.run(lambda done: harness.registry.evict("a", done))
    assert not harness.run(lambda done: harness.registry.pin("a", False, done)).pinned


def test_the_least_recently_used_adapter_is_evicted_from_its_slot(harness: RegistryHarness) -> None:
    digests = [harness.publish(name, seed).versions[0].digest for seed, name in enumerate("abcd")]
    for digest in digests:
        harness.load(digest)
    harness.registry.assign_slots(digests[:3])
    harness.registry.assign_slots(digests[:1])
    harness.registry.assign_slots(digests[3:])
    assert harness.device_slots.resident == [digests[2], digests[0], digests[3]]


def test_a_failed_load_is_reported_to_its_requests_and_retried_by_the_next(harness: RegistryHarness) -> None:
    digest = harness.publish("a").versions[0].digest
    version = harness.folder / "store" / "versions" / digest
    shutil.move(version, harness.folder / "away")
    lease = harness.registry.acquire(AdapterUse("a"))
    harness.load(digest)
    assert isinstance(harness.registry.state(digest), LoadFailed)
    harness.registry.release(lease)
    shutil.move(harness.folder / "away", version)
    harness.registry.acquire(AdapterUse("a"))
    harness.load(digest)
    assert isinstance(harness.registry.state(digest), InMemory)


def test_folders_are_published_once_at_start_and_bad_ones_reported(tmp_path: Path) -> None:
    write(tmp_path / "given" / "good")
    write(tmp_path / "given" / "bad", tensors(), use_dora=True)
    (tmp_path / "given" / "notes").mkdir()
    harness = RegistryHarness(tmp_path)
    failed = harness.registry.publish_folder(tmp_path / "given")
    assert [(name, type(error)) for name, error in failed] == [("bad", AdapterInvalid)]
    created = harness.registry.describe("good").versions[0].created
    harness.registry.publish_folder(tmp_path / "given")
    harness.registry.close()
    again = RegistryHarness(tmp_path)
    again.registry.publish_folder(tmp_path / "given")
    assert again.registry.describe("good").versions[0].created == created
    write(tmp_path / "given" / "good", tensors(5))
    again.registry.publish_folder(tmp_path / "given")
    assert again.registry.describe("good").versions[0].created > created
    again.registry.close()


def test_cache_hits_and_misses_are_counted_per_tier(harness: RegistryHarness) -> None:
    digest = harness.publish("a").versions[0].digest
    harness.registry.acquire(AdapterUse("a"))
    harness.load(digest)
    harness.registry.acquire(AdapterUse("a"))
    harness.registry.assign_slots([digest])
    harness.registry.acquire(AdapterUse("a"))
    stats = harness.stats()
    assert stats.cache_hits_total == {"host": 1, "device": 1}
    assert stats.cache_misses_total == {"host": 1, "device": 2}


def test_publishing_the_same_content_again_updates_its_report(tmp_path: Path) -> None:
    harness = RegistryHarness(tmp_path)
    harness.publish("a")
    folder = write(
        tmp_path / "store" / "staging" / "b", RegistryHarness.tensors(0), base_model_name_or_path="someone/other"
    )
    harness.run(lambda done: harness.start_publish("b", folder, done))
    (version,) = harness.registry.describe("b").versions
    assert version.report["base_model_name_or_path"] == "someone/other"
    assert version.digest == harness.registry.describe("a").versions[0].digest
    harness.registry.close()


def test_an_adapter_whose_traits_differ_from_the_stored_ones_is_not_served(tmp_path: Path) -> None:
    harness = RegistryHarness(tmp_path)
    digest = harness.publish("a").versions[0].digest
    path = tmp_path / "store" / "versions" / digest / "meta.json"
    meta = msgspec.json.decode(path.read_bytes(), type=Meta)
    told = msgspec.structs.replace(meta, traits=Traits(not_additive="it was different"))
    path.write_bytes(msgspec.json.encode(told))
    harness.registry.acquire(AdapterUse("a"))
    harness.load(digest)
    state = harness.registry.state(digest)
    assert isinstance(state, LoadFailed)
    assert "publish it again" in state.error.message
    harness.registry.close()
