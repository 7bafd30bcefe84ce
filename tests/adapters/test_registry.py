"""The registry: leases on exact versions, one load for many requests, and memory that is freed exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft_folders import tensors, write
from registry_harness import BASE_NAME, RegistryHarness

from lora_serve.adapters import lowered_file, operations
from lora_serve.errors import (
    AdapterBroken,
    AdapterBusy,
    AdapterExists,
    AdapterInvalid,
    AdapterNotFound,
    BadRequest,
    Overloaded,
)
from lora_serve.messages import Publish
from lora_serve.request import AdapterUse


def test_a_published_adapter_can_be_leased_loaded_and_assigned_a_slot(harness: RegistryHarness) -> None:
    info = harness.publish("a")
    lease = harness.registry.acquire(AdapterUse("a", weight=0.5))
    assert (lease.name, lease.digest, lease.weight) == ("a", info.versions[0].digest, 0.5)
    assert not harness.registry.memory.holds(lease.digest)
    harness.load(lease.digest)
    assert harness.registry.memory.assign_slots([lease.digest]) == {lease.digest: 1}
    version = harness.operations.describe("a").versions[0]
    assert (version.tiers, version.leases, version.rank, version.modules) == (["disk", "host", "device"], 1, 4, 3)
    stats = harness.stats()
    assert (stats.resident, stats.resident_in_host, stats.pinned) == (["a"], ["a"], [])


def test_statistics_name_every_name_of_what_is_resident_and_no_older_version(harness: RegistryHarness) -> None:
    first = harness.publish("a").versions[0].digest
    harness.publish("twin")
    harness.registry.acquire(AdapterUse("a"))
    harness.load(first)
    harness.registry.memory.assign_slots([first])
    harness.run(lambda done: harness.operations.pin("twin", True, done))
    assert harness.stats().resident == ["a", "twin"]
    assert harness.stats().pinned == ["a", "twin"]  # they are one version, which stays
    harness.publish("a", seed=1, replace=True)
    assert harness.stats().resident == ["twin"]


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
        harness.registry.poll()
    harness.load(digest)
    assert harness.stats().loads_total["host"] == 1


def test_running_requests_keep_the_old_version_after_a_new_one_is_published(harness: RegistryHarness) -> None:
    old = harness.publish("a", 0).versions[0].digest
    lease = harness.registry.acquire(AdapterUse("a"))
    harness.load(old)
    info = harness.publish("a", 1, replace=True)
    assert [version.digest for version in info.versions][1:] == [old]
    assert harness.registry.acquire(AdapterUse("a")).digest == info.versions[0].digest != old
    assert harness.registry.memory.holds(old)
    again = harness.registry.acquire(AdapterUse("a", old[:8]))
    assert again.digest == old
    harness.registry.release(lease)
    harness.registry.release(again)
    assert old not in harness.residency.versions
    assert len(harness.operations.describe("a").versions) == 1
    harness.wait_until(lambda: not (harness.folder / "store" / "versions" / old).exists())


def test_publishing_the_same_content_again_changes_nothing(harness: RegistryHarness) -> None:
    first = harness.publish("a").versions[0].digest
    harness.run(lambda done: harness.operations.load("a", done))
    assert harness.publish("a", replace=True).versions[0].digest == first
    assert harness.registry.memory.holds(first)


def test_a_taken_name_is_refused(harness: RegistryHarness) -> None:
    harness.publish("a")
    with pytest.raises(AdapterExists):
        harness.publish("a", 1)


def test_adapters_are_described_some_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operations, "PAGE", 2)
    harness = RegistryHarness(tmp_path)
    for name in ("z", "x", "y"):
        harness.publish(name)
    found = [[info.name for info in harness.operations.describe_some(after)] for after in ("", "y", "z")]
    assert found == [["x", "y"], ["z"], []]
    assert harness.operations.count() == (3, 0)
    harness.registry.close()


def test_a_refused_upload_leaves_nothing_behind(harness: RegistryHarness) -> None:
    with pytest.raises(AdapterInvalid, match="use_dora"):
        harness.publish("bad", use_dora=True)
    assert not any(harness.store.staging.iterdir())
    assert harness.operations.describe_some("") == []


def test_a_deleted_adapter_is_freed_when_its_last_lease_is_released(harness: RegistryHarness) -> None:
    digest = harness.publish("a").versions[0].digest
    lease = harness.registry.acquire(AdapterUse("a"))
    harness.load(digest)
    harness.registry.memory.assign_slots([digest])
    harness.run(lambda done: harness.operations.delete("a", done))
    with pytest.raises(AdapterNotFound):
        harness.registry.acquire(AdapterUse("a"))
    assert harness.device_slots.bytes > 0
    harness.registry.release(lease)
    assert (harness.device_slots.bytes, harness.residency.host_bytes) == (0, 0)
    harness.wait_until(lambda: not any((harness.folder / "store" / "versions").iterdir()))


@pytest.mark.parametrize("name", [BASE_NAME, "base", "other"])
def test_no_adapter_has_the_name_of_the_base_or_of_a_label_in_metrics(harness: RegistryHarness, name: str) -> None:
    with pytest.raises(AdapterExists, match="name"):
        harness.publish(name)
    write(harness.folder / "start" / name, harness.tensors(1))
    (note,) = harness.publish_folders(harness.folder / "start")
    assert note.startswith(f"adapter {name} is not served: {name} is ")


def test_unloading_deletes_copies_of_folders_and_keeps_uploads(harness: RegistryHarness) -> None:
    def unload(done: Any) -> None:
        harness.operations.unload("a", done)

    harness.publish("a")
    harness.run(lambda done: harness.operations.load("a", done))
    harness.run(unload)
    assert (harness.device_slots.bytes, harness.residency.host_bytes) == (0, 0)
    assert harness.operations.describe_some("") == []
    with pytest.raises(AdapterNotFound):
        harness.registry.acquire(AdapterUse("a"))
    harness.run(lambda done: harness.operations.load("a", done))  # listed again
    assert [info.name for info in harness.operations.describe_some("")] == ["a"]
    harness.run(unload)
    harness.run(lambda done: harness.operations.delete("a", done))  # an unloaded one too
    assert not harness.store.names()
    folder = write(harness.folder / "source", harness.tensors(1))
    publish = Publish("a", str(folder), source=str(folder))  # the name is free
    harness.run(lambda done: harness.operations.publish(publish, done))
    harness.run(unload)
    with pytest.raises(AdapterNotFound):
        harness.operations.describe("a")
    with pytest.raises(AdapterNotFound):
        harness.run(lambda done: harness.operations.load("a", done))


def test_evicting_frees_memory_and_keeps_the_files(harness: RegistryHarness) -> None:
    harness.publish("a")
    harness.run(lambda done: harness.operations.load("a", done))
    assert harness.device_slots.bytes == harness.residency.host_bytes > 0
    info = harness.run(lambda done: harness.operations.evict("a", done))
    assert info.versions[0].tiers == ["disk"]
    assert (harness.device_slots.bytes, harness.residency.host_bytes) == (0, 0)
    assert harness.run(lambda done: harness.operations.load("a", done)).versions[0].tiers == ["disk", "host", "device"]


def test_evicting_an_adapter_in_use_takes_effect_when_its_last_lease_is_released(harness: RegistryHarness) -> None:
    digest = harness.publish("a").versions[0].digest
    lease = harness.registry.acquire(AdapterUse("a"))
    harness.load(digest)
    harness.run(lambda done: harness.operations.evict("a", done))
    assert harness.registry.memory.holds(digest)
    harness.registry.release(lease)
    assert not harness.registry.memory.holds(digest)


def test_pinned_adapters_keep_their_slots_and_one_slot_cannot_be_pinned(harness: RegistryHarness) -> None:
    for seed, name in enumerate("abc"):
        harness.publish(name, seed)
    pinned = [harness.run(lambda done, name=name: harness.operations.pin(name, True, done)) for name in "ab"]
    assert all(info.pinned and "device" in info.versions[0].tiers for info in pinned)
    assert len(harness.registry.pinned) == 2
    with pytest.raises(AdapterBusy):
        harness.run(lambda done: harness.operations.pin("c", True, done))
    with pytest.raises(AdapterBusy):
        harness.run(lambda done: harness.operations.evict("a", done))
    assert not harness.run(lambda done: harness.operations.pin("a", False, done)).pinned


def test_the_least_recently_used_adapter_is_evicted_from_its_slot(harness: RegistryHarness) -> None:
    digests = [harness.publish(name, seed).versions[0].digest for seed, name in enumerate("abcd")]
    for name, digest in zip("abcd", digests, strict=True):
        harness.registry.acquire(AdapterUse(name))
        harness.load(digest)
    harness.registry.memory.assign_slots(digests[:3])
    harness.registry.memory.assign_slots(digests[:1])
    harness.registry.memory.assign_slots(digests[3:])
    assert [version.digest for version in harness.residency.device] == [digests[2], digests[0], digests[3]]


def test_a_version_that_cannot_be_read_ends_its_requests_and_the_next_request_tries_again(
    harness: RegistryHarness,
) -> None:
    digest = harness.publish("a").versions[0].digest
    version = harness.store.folder(digest)
    away = version.rename(harness.folder / "away")
    lease = harness.registry.acquire(AdapterUse("a"))
    harness.load(digest)
    (((ended,), error),) = harness.registry.take_impossible([(digest,)])
    assert (ended, type(error)) == (digest, AdapterBroken)
    assert harness.registry.take_impossible([(digest,)]) == []
    harness.registry.release(lease)
    away.rename(version)
    harness.registry.acquire(AdapterUse("a"))
    harness.load(digest)
    assert harness.registry.memory.holds(digest)


def test_folders_are_published_once_at_start_and_bad_ones_reported(tmp_path: Path) -> None:
    write(tmp_path / "given" / "good")
    write(tmp_path / "given" / "bad", tensors(), use_dora=True)
    (tmp_path / "given" / "notes").mkdir()
    harness = RegistryHarness(tmp_path)
    bad, notes = harness.publish_folders(tmp_path / "given")
    assert bad.startswith("adapter bad is not served: use_dora")
    assert notes == "notes is not served: adapter_config.json is missing"
    created = harness.operations.describe("good").versions[0].created
    harness.publish_folders(tmp_path / "given")
    harness.registry.close()
    again = RegistryHarness(tmp_path)
    again.publish_folders(tmp_path / "given")
    assert again.operations.describe("good").versions[0].created == created
    write(tmp_path / "given" / "good", tensors(5))
    again.publish_folders(tmp_path / "given")
    assert again.operations.describe("good").versions[0].created > created
    again.registry.close()


def test_cache_hits_and_misses_are_counted_per_tier(harness: RegistryHarness) -> None:
    digest = harness.publish("a").versions[0].digest
    harness.registry.acquire(AdapterUse("a"))
    harness.load(digest)
    harness.registry.acquire(AdapterUse("a"))
    harness.registry.memory.assign_slots([digest])
    harness.registry.acquire(AdapterUse("a"))
    stats = harness.stats()
    assert stats.cache_hits_total == {"host": 1, "device": 1}
    assert stats.cache_misses_total == {"host": 1, "device": 2}


def test_earlier_versions_of_a_name_are_kept_and_can_be_named(tmp_path: Path) -> None:
    harness = RegistryHarness(tmp_path, keep_versions=2)
    digests = [harness.publish("a", seed, replace=True).versions[0].digest for seed in range(3)]
    harness.registry.close()
    again = RegistryHarness(tmp_path, keep_versions=2)
    assert [version.digest for version in again.operations.describe("a").versions] == [digests[2], digests[1]]
    assert again.registry.acquire(AdapterUse("a", digests[1][:12])).digest == digests[1]
    with pytest.raises(AdapterNotFound):
        again.registry.acquire(AdapterUse("a", digests[0]))
    assert not again.store.folder(digests[0]).exists()
    again.registry.close()


def test_pins_and_unloading_outlast_the_engine(tmp_path: Path) -> None:
    harness = RegistryHarness(tmp_path)
    for seed, name in enumerate("ab"):
        harness.publish(name, seed)
    harness.run(lambda done: harness.operations.pin("a", True, done))
    harness.run(lambda done: harness.operations.unload("b", done))
    harness.registry.close()
    again = RegistryHarness(tmp_path)
    (info,) = again.operations.describe_some("")
    assert (info.name, info.pinned) == ("a", True)
    again.load(info.versions[0].digest)  # without a request
    again.registry.close()


def test_a_pinned_adapter_takes_no_version_that_is_too_large_for_a_pin(tmp_path: Path) -> None:
    size = RegistryHarness(tmp_path / "size")
    small = size.publish("a").versions[0].memory_bytes
    size.registry.close()
    harness = RegistryHarness(tmp_path / "tight", memory=2 * small)
    harness.publish("a", 0)
    harness.publish("b", 1)
    harness.run(lambda done: harness.operations.pin("a", True, done))
    with pytest.raises(AdapterBusy, match="half of the memory"):
        harness.run(lambda done: harness.operations.pin("b", True, done))
    assert harness.publish("a", 2, replace=True).pinned
    harness.registry.close()


def test_a_composition_that_a_pin_makes_impossible_is_ended_with_the_reason(tmp_path: Path) -> None:
    harness = RegistryHarness(tmp_path, slots=2)
    digests = [harness.publish(name, seed).versions[0].digest for seed, name in enumerate("abc")]
    for name in "ab":
        harness.registry.acquire(AdapterUse(name))
    harness.registry.check_possible(digests[:2])
    harness.run(lambda done: harness.operations.pin("c", True, done))
    (((one, two), error),) = harness.registry.take_impossible([tuple(digests[:2]), (digests[0],)])
    assert ([one, two], type(error)) == (digests[:2], BadRequest)
    assert "beside pinned" in error.message
    harness.registry.close()


def test_a_version_lowered_for_another_precision_is_lowered_again_at_start(tmp_path: Path) -> None:
    harness = RegistryHarness(tmp_path)
    before = harness.publish("a").versions[0]
    harness.registry.close()
    again = RegistryHarness(tmp_path, dtype=torch.bfloat16)
    after = again.operations.describe("a").versions[0]
    assert (after.digest, after.created) == (before.digest, before.created)
    assert after.memory_bytes < before.memory_bytes
    assert again.progress == [(1, 1)]
    again.registry.close()
    unchanged = RegistryHarness(tmp_path, dtype=torch.bfloat16)
    assert unchanged.progress == []
    unchanged.registry.close()


def test_a_damaged_lowered_file_is_made_again_from_the_files_as_they_came(harness: RegistryHarness) -> None:
    digest = harness.publish("a").versions[0].digest
    _flip_a_bit(harness.store.folder(digest) / lowered_file.NAME, 5000)
    harness.registry.acquire(AdapterUse("a"))
    harness.load(digest)
    assert harness.registry.memory.holds(digest)
    lowered_file.verify(harness.store.folder(digest))


def test_a_version_whose_files_are_damaged_too_is_refused_by_name_and_others_are_served(tmp_path: Path) -> None:
    harness = RegistryHarness(tmp_path)
    digests = [harness.publish(name, seed).versions[0].digest for seed, name in enumerate("ab")]
    harness.registry.close()
    folder = harness.store.folder(digests[0])
    _flip_a_bit(folder / lowered_file.NAME, 100)
    _flip_a_bit(folder / "adapter_model.safetensors", -1)
    again = RegistryHarness(tmp_path)
    broken, served = again.operations.describe_some("")
    assert (broken.name, broken.versions, served.broken) == ("a", [], None)
    assert "not those that were published" in str(broken.broken)
    assert [note for note in again.notes if note.startswith("adapter a is not served")]
    with pytest.raises(AdapterBroken, match="adapter a cannot be served"):
        again.registry.acquire(AdapterUse("a"))
    assert again.registry.acquire(AdapterUse("b")).digest == digests[1]
    assert again.publish("a", replace=True).broken is None
    again.registry.close()


def _flip_a_bit(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def test_a_damaged_older_version_costs_itself_only(tmp_path: Path) -> None:
    harness = RegistryHarness(tmp_path, keep_versions=2)
    old, new = (harness.publish("a", seed, replace=True).versions[0].digest for seed in range(2))
    harness.registry.close()
    with (harness.store.folder(old) / "adapter_config.json").open("a") as file:
        file.write(" ")
    again = RegistryHarness(tmp_path, keep_versions=2)
    assert [version.digest for version in again.operations.describe("a").versions] == [new]
    assert [note for note in again.notes if note.startswith("an older version of adapter a is not served")]
    again.registry.close()


def test_a_pinned_adapter_that_cannot_be_loaded_is_listed_as_broken_and_tried_once(tmp_path: Path) -> None:
    harness = RegistryHarness(tmp_path)
    digest = harness.publish("a").versions[0].digest
    harness.run(lambda done: harness.operations.pin("a", True, done))
    harness.registry.close()
    again = RegistryHarness(tmp_path)
    _flip_a_bit(again.store.folder(digest) / lowered_file.NAME, 5000)
    _flip_a_bit(again.store.folder(digest) / "adapter_model.safetensors", -1)
    again.wait_until(lambda: again.operations.describe("a").broken)
    for _ in range(50):
        again.registry.poll()
    assert not again.residency.versions[digest].loading
    assert again.publish("a", replace=True).pinned  # repairs it
    again.load(digest)
    assert again.operations.describe("a").broken is None
    again.registry.close()


def test_pins_that_no_longer_fit_are_dropped_at_start_with_a_note(tmp_path: Path) -> None:
    harness = RegistryHarness(tmp_path, slots=3)
    for seed, name in enumerate("ab"):
        harness.publish(name, seed)
        harness.run(lambda done, name=name: harness.operations.pin(name, True, done))
    harness.registry.close()
    again = RegistryHarness(tmp_path, slots=2)
    assert len(again.registry.pinned) == 1
    assert [note for note in again.notes if "is not pinned any more" in note]
    again.registry.check_possible([])
    again.registry.close()


def test_fewer_kept_versions_free_the_others_at_start(tmp_path: Path) -> None:
    harness = RegistryHarness(tmp_path, keep_versions=3)
    for seed in range(3):
        newest = harness.publish("a", seed, replace=True).versions[0].digest
    harness.registry.close()
    again = RegistryHarness(tmp_path, keep_versions=1)
    again.wait_until(lambda: [path.name for path in (tmp_path / "store" / "versions").iterdir()] == [newest])
    assert again.residency.versions.keys() == {newest}
    assert again.store.names()["a"].versions == [newest]
    again.registry.close()


def test_a_version_under_two_names_is_repaired_and_pinned_under_both(tmp_path: Path) -> None:
    harness = RegistryHarness(tmp_path)
    digest = harness.publish("a").versions[0].digest
    harness.publish("b")
    harness.run(lambda done: harness.operations.pin("a", True, done))
    with pytest.raises(AdapterBusy, match="under another name"):
        harness.run(lambda done: harness.operations.evict("b", done))
    harness.registry.close()
    _flip_a_bit(harness.store.folder(digest) / lowered_file.NAME, 100)
    _flip_a_bit(harness.store.folder(digest) / "adapter_model.safetensors", -1)
    again = RegistryHarness(tmp_path)
    assert {info.name for info in again.operations.describe_some("") if info.broken} == {"a", "b"}
    again.publish("b", replace=True)
    assert [(info.name, info.broken) for info in again.operations.describe_some("")] == [("a", None), ("b", None)]
    assert again.registry.acquire(AdapterUse("a")).digest == digest
    again.registry.close()


def test_a_name_that_the_base_got_is_listed_as_broken(tmp_path: Path) -> None:
    harness = RegistryHarness(tmp_path)
    digest = harness.publish("a").versions[0].digest
    harness.store.set_name(BASE_NAME, harness.store.names()["a"])
    harness.registry.close()
    again = RegistryHarness(tmp_path)
    infos = {info.name: info.broken for info in again.operations.describe_some("")}
    assert infos == {"a": None, BASE_NAME: f"{BASE_NAME} is the name of the base model"}
    assert again.registry.acquire(AdapterUse("a")).digest == digest
    again.registry.close()


@pytest.mark.parametrize("on_gpu", [False, True])
def test_what_training_does_not_use_serves_adapters_until_it_begins(tmp_path: Path, on_gpu: bool) -> None:
    probe = RegistryHarness(tmp_path / "probe")
    size = probe.publish("a").versions[0].memory_bytes
    probe.registry.close()
    own, more = 2 * size, 2 * size
    memory, device = (1 << 20, own) if on_gpu else (own, None)
    harness = RegistryHarness(tmp_path / "own", slots=9, memory=memory, device=device, training=more)
    digests = [harness.publish(name, seed).versions[0].digest for seed, name in enumerate("abcd")]
    tier = "device" if on_gpu else "host"
    leases = []
    for name, digest in zip("abcd", digests, strict=True):
        leases.append(harness.registry.acquire(AdapterUse(name)))
        harness.load(digest)
        harness.registry.memory.assign_slots([digest])
        if name in "ab":
            harness.registry.release(leases.pop())
    assert harness.stats().bytes[tier] == 4 * size
    last = harness.registry.acquire(AdapterUse("a"))
    with pytest.raises(Overloaded, match=r"in use take 0\.0 of the 0\.0 MiB for training, until the requests"):
        harness.registry.memory.begin_training()
    harness.registry.release(last)
    harness.registry.memory.begin_training()
    stats = harness.stats()
    assert (stats.bytes[tier], stats.evictions_total[tier]) == (2 * size, 2)
    assert stats.resident == ["c", "d"]
    harness.registry.memory.end_training()
    harness.registry.acquire(AdapterUse("b"))
    harness.load(digests[1])
    harness.registry.memory.assign_slots([digests[1]])
    assert harness.stats().bytes[tier] == 3 * size
    harness.registry.close()
