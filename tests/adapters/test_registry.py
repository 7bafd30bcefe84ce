"""The registry: leases on exact versions, one load for many waiters, memory that really returns."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
import pytest
from peft_folders import tensors, write
from registry_house import House

from lora_serve.adapters.registry import InMemory, LoadFailed, Loading
from lora_serve.adapters.store import Meta
from lora_serve.adapters.traits import Traits
from lora_serve.errors import AdapterBusy, AdapterExists, AdapterInvalid, AdapterNotFound
from lora_serve.messages import Publish
from lora_serve.request import AdapterUse


def test_a_published_adapter_is_leased_loaded_and_seated(house: House) -> None:
    info = house.publish("a")
    lease = house.registry.acquire(AdapterUse("a", weight=0.5))
    assert (lease.name, lease.digest, lease.weight) == ("a", info.versions[0].digest, 0.5)
    assert isinstance(house.registry.state(lease.digest), Loading)
    house.bring(lease.digest)
    assert house.registry.assign_slots([lease.digest]) == {lease.digest: house.device_slots.slot(lease.digest)}
    version = house.registry.describe("a").versions[0]
    assert (version.tiers, version.leases, version.rank, version.modules) == (["disk", "host", "device"], 1, 4, 3)
    assert house.stats().resident == ["a"]


def test_unknown_names_and_versions_are_not_found(house: House) -> None:
    digest = house.publish("a").versions[0].digest
    for use in (AdapterUse("b"), AdapterUse("a", "zzz")):
        with pytest.raises(AdapterNotFound) as caught:
            house.registry.acquire(use)
        assert caught.value.param == "adapter"
    assert house.registry.acquire(AdapterUse("a", digest[:6])).digest == digest


def test_many_waiters_cause_one_load(house: House) -> None:
    digest = house.publish("a").versions[0].digest
    for _ in range(5):
        house.registry.acquire(AdapterUse("a"))
        house.registry.request_load(digest)
    house.bring(digest)
    assert house.stats().loads_total["host"] == 1


def test_a_new_version_leaves_running_requests_on_the_old_one(house: House) -> None:
    old = house.publish("a", 0).versions[0].digest
    lease = house.registry.acquire(AdapterUse("a"))
    house.bring(old)
    info = house.publish("a", 1, replace=True)
    assert [version.digest for version in info.versions][1:] == [old]
    assert house.registry.acquire(AdapterUse("a")).digest == info.versions[0].digest != old
    assert isinstance(house.registry.state(old), InMemory)
    assert house.registry.acquire(AdapterUse("a", old[:8])).digest == old
    house.registry.release(lease)
    house.registry.release(lease)
    assert old not in house.cache
    assert len(house.registry.describe("a").versions) == 1
    house.until(lambda: not (house.folder / "store" / "versions" / old).exists())


def test_publishing_the_same_content_again_changes_nothing(house: House) -> None:
    first = house.publish("a").versions[0].digest
    house.bring(first)
    assert house.publish("a", replace=True).versions[0].digest == first
    assert first in house.cache


def test_a_taken_name_is_refused(house: House) -> None:
    house.publish("a")
    with pytest.raises(AdapterExists):
        house.publish("a", 1)


def test_a_bad_upload_is_refused_and_leaves_nothing(house: House) -> None:
    folder = write(house.folder / "store" / "staging" / "bad", tensors(), use_dora=True)
    with pytest.raises(AdapterInvalid, match="use_dora"):
        house.answer(lambda done: house.registry.publish(Publish("bad", str(folder)), done))
    assert not folder.exists()
    assert house.registry.describe_all() == []


def test_deleting_waits_for_the_last_lease_and_then_everything_is_gone(house: House) -> None:
    digest = house.publish("a").versions[0].digest
    lease = house.registry.acquire(AdapterUse("a"))
    house.bring(digest)
    house.registry.assign_slots([digest])
    house.answer(lambda done: house.registry.delete("a", done))
    with pytest.raises(AdapterNotFound):
        house.registry.acquire(AdapterUse("a"))
    assert house.device_slots.holds(digest)
    house.registry.release(lease)
    assert (house.device_slots.bytes, house.cache.bytes) == (0, 0)
    house.until(lambda: not any((house.folder / "store" / "versions").iterdir()))


def test_evicting_returns_the_bytes_and_keeps_the_files(house: House) -> None:
    digest = house.publish("a").versions[0].digest
    house.bring(digest)
    house.registry.assign_slots([digest])
    taken = house.device_slots.bytes
    assert taken == house.cache.bytes > 0
    info = house.answer(lambda done: house.registry.evict("a", done))
    assert info.versions[0].tiers == ["disk"]
    assert (house.device_slots.bytes, house.cache.bytes) == (0, 0)
    house.bring(digest)
    assert isinstance(house.registry.state(digest), InMemory)


def test_evicting_one_in_use_happens_when_it_is_free(house: House) -> None:
    digest = house.publish("a").versions[0].digest
    lease = house.registry.acquire(AdapterUse("a"))
    house.bring(digest)
    house.answer(lambda done: house.registry.evict("a", done))
    assert digest in house.cache
    house.registry.release(lease)
    assert digest not in house.cache


def test_pins_hold_their_slot_and_always_leave_one_free(house: House) -> None:
    for seed, name in enumerate("abc"):
        house.publish(name, seed)
    pinned = [house.answer(lambda done, name=name: house.registry.pin(name, True, done)) for name in "ab"]
    assert all(info.pinned and "device" in info.versions[0].tiers for info in pinned)
    assert len(house.registry.pinned) == 2
    with pytest.raises(AdapterBusy):
        house.answer(lambda done: house.registry.pin("c", True, done))
    with pytest.raises(AdapterBusy):
        house.answer(lambda done: house.registry.evict("a", done))
    assert not house.answer(lambda done: house.registry.pin("a", False, done)).pinned


def test_the_least_recently_used_gives_up_its_slot(house: House) -> None:
    digests = [house.publish(name, seed).versions[0].digest for seed, name in enumerate("abcd")]
    for digest in digests:
        house.bring(digest)
    house.registry.assign_slots(digests[:3])
    house.registry.assign_slots(digests[:1])
    house.registry.assign_slots(digests[3:])
    assert house.device_slots.resident == [digests[2], digests[0], digests[3]]


def test_a_failed_load_is_told_to_those_who_wait_and_tried_again_by_the_next(house: House) -> None:
    digest = house.publish("a").versions[0].digest
    version = house.folder / "store" / "versions" / digest
    shutil.move(version, house.folder / "away")
    lease = house.registry.acquire(AdapterUse("a"))
    house.bring(digest)
    assert isinstance(house.registry.state(digest), LoadFailed)
    house.registry.release(lease)
    shutil.move(house.folder / "away", version)
    house.registry.acquire(AdapterUse("a"))
    house.bring(digest)
    assert isinstance(house.registry.state(digest), InMemory)


def test_folders_are_published_at_start_once_and_bad_ones_reported(tmp_path: Path) -> None:
    write(tmp_path / "given" / "good")
    write(tmp_path / "given" / "bad", tensors(), use_dora=True)
    (tmp_path / "given" / "notes").mkdir()
    house = House(tmp_path)
    failed = house.registry.publish_folder(tmp_path / "given")
    assert [(name, type(error)) for name, error in failed] == [("bad", AdapterInvalid)]
    created = house.registry.describe("good").versions[0].created
    house.registry.publish_folder(tmp_path / "given")
    house.registry.close()
    again = House(tmp_path)
    again.registry.publish_folder(tmp_path / "given")
    assert again.registry.describe("good").versions[0].created == created
    write(tmp_path / "given" / "good", tensors(5))
    again.registry.publish_folder(tmp_path / "given")
    assert again.registry.describe("good").versions[0].created > created
    again.registry.close()


def test_counters_tell_hits_from_misses(house: House) -> None:
    digest = house.publish("a").versions[0].digest
    house.registry.acquire(AdapterUse("a"))
    house.bring(digest)
    house.registry.acquire(AdapterUse("a"))
    house.registry.assign_slots([digest])
    house.registry.acquire(AdapterUse("a"))
    stats = house.stats()
    assert stats.cache_hits_total == {"host": 1, "device": 1}
    assert stats.cache_misses_total == {"host": 1, "device": 2}


def test_the_same_content_published_again_is_described_anew(tmp_path: Path) -> None:
    house = House(tmp_path)
    house.publish("a")
    folder = write(tmp_path / "store" / "staging" / "b", House.tensors(0), base_model_name_or_path="someone/other")
    house.answer(lambda done: house.start_publish("b", folder, done))
    (version,) = house.registry.describe("b").versions
    assert version.report["base_model_name_or_path"] == "someone/other"
    assert version.digest == house.registry.describe("a").versions[0].digest
    house.registry.close()


def test_an_adapter_that_means_another_thing_to_this_base_is_not_served_as_what_it_was(tmp_path: Path) -> None:
    house = House(tmp_path)
    digest = house.publish("a").versions[0].digest
    path = tmp_path / "store" / "versions" / digest / "meta.json"
    meta = msgspec.json.decode(path.read_bytes(), type=Meta)
    told = msgspec.structs.replace(meta, traits=Traits(not_additive="it was different"))
    path.write_bytes(msgspec.json.encode(told))
    house.registry.acquire(AdapterUse("a"))
    house.bring(digest)
    state = house.registry.state(digest)
    assert isinstance(state, LoadFailed)
    assert "publish it again" in state.error.message
    house.registry.close()
