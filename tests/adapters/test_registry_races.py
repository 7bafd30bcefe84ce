"""Adapters published, loaded, evicted and deleted across one another: the last word wins, nothing is left behind."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from peft_folders import write
from registry_house import House

from lora_serve.adapters.registry import InMemory, LoadFailed
from lora_serve.errors import AdapterInvalid, AdapterNotFound, ServeError
from lora_serve.request import AdapterUse


def test_going_back_to_a_version_that_is_still_leased_makes_it_the_one_current_version(house: House) -> None:
    first = house.publish("a", 0).versions[0].digest
    lease = house.registry.acquire(AdapterUse("a"))
    second = house.publish("a", 1, replace=True).versions[0].digest
    held = house.registry.acquire(AdapterUse("a"))
    info = house.publish("a", 0, replace=True)
    assert [version.digest for version in info.versions] == [first, second]
    assert house.registry.acquire(AdapterUse("a", first[:8])).digest == first
    house.registry.release(lease)
    house.registry.release(held)
    assert [version.digest for version in house.registry.describe("a").versions] == [first]


def test_evicting_during_a_load_wins_over_the_load(house: House) -> None:
    digest = house.publish("a").versions[0].digest
    answers: list[Any] = []
    house.registry.load("a", answers.append)
    house.registry.evict("a", lambda info: None)
    house.until(lambda: answers)
    assert digest not in house.cache
    assert not house.device_slots.holds(digest)
    assert house.registry.describe("a").versions[0].tiers == ["disk"]


def test_loading_after_evicting_wins_over_the_eviction(house: House) -> None:
    digest = house.publish("a").versions[0].digest
    lease = house.registry.acquire(AdapterUse("a"))
    house.bring(digest)
    house.registry.evict("a", lambda info: None)
    house.answer(lambda done: house.registry.load("a", done))
    house.registry.release(lease)
    assert digest in house.cache


def test_deleting_during_a_load_leaves_nothing(house: House) -> None:
    digest = house.publish("a").versions[0].digest
    answers: list[Any] = []
    house.registry.load("a", answers.append)
    house.answer(lambda done: house.registry.delete("a", done))
    house.until(lambda: answers)
    assert isinstance(answers[0], AdapterNotFound)
    assert (house.cache.bytes, house.device_slots.bytes) == (0, 0)
    house.until(lambda: not any((house.folder / "store" / "versions").iterdir()))
    assert house.publish("a").versions[0].digest == digest
    house.registry.acquire(AdapterUse("a"))
    house.bring(digest)
    assert isinstance(house.registry.state(digest), InMemory)


def test_publishing_right_after_deleting_brings_the_name_back(house: House) -> None:
    digest = house.publish("a").versions[0].digest
    deleted: list[Any] = []
    house.registry.delete("a", deleted.append)
    assert house.publish("a").versions[0].digest == digest
    assert deleted
    house.registry.acquire(AdapterUse("a"))
    house.bring(digest)
    assert isinstance(house.registry.state(digest), InMemory)


def test_two_first_publishes_of_one_name_are_serialised(house: House) -> None:
    answers: list[Any] = []
    for seed in range(2):
        folder = write(house.folder / "store" / "staging" / str(seed), house.tensors(seed))
        house.start_publish("a", folder, answers.append)
    house.until(lambda: len(answers) == 2)
    assert [isinstance(answer, ServeError) for answer in answers] == [False, True]
    assert house.registry.describe("a") == answers[0]


def test_a_failed_load_is_forgotten_with_its_last_lease(house: House) -> None:
    digest = house.publish("a").versions[0].digest
    version = house.folder / "store" / "versions" / digest
    shutil.move(version, house.folder / "away")
    lease = house.registry.acquire(AdapterUse("a"))
    house.bring(digest)
    failed = house.registry.state(digest)
    assert isinstance(failed, LoadFailed)
    house.registry.release(lease)
    assert not isinstance(house.registry.state(digest), LoadFailed)


def test_a_pin_whose_load_fails_does_not_hold(house: House) -> None:
    digest = house.publish("a").versions[0].digest
    shutil.move(house.folder / "store" / "versions" / digest, house.folder / "away")
    with pytest.raises(AdapterInvalid):
        house.answer(lambda done: house.registry.pin("a", True, done))
    assert not house.registry.describe("a").pinned


def test_a_new_version_of_a_pinned_adapter_is_brought_into_its_place(house: House) -> None:
    old = house.publish("a", 0).versions[0].digest
    house.answer(lambda done: house.registry.pin("a", True, done))
    new = house.publish("a", 1, replace=True).versions[0].digest
    house.until(lambda: house.registry.pinned == {new})
    assert old not in house.cache
    assert not house.device_slots.holds(old)


def test_what_waiting_requests_lease_leaves_the_cache_last_and_the_oldest_request_s_last_of_all(tmp_path: Path) -> None:
    one = House(tmp_path / "size")
    one.bring(one.publish("a").versions[0].digest)
    size = one.cache.bytes
    one.registry.close()
    house = House(tmp_path / "house", memory=2 * size)
    oldest, second, idle, third = (house.publish(name, seed).versions[0].digest for seed, name in enumerate("abcd"))
    for name in "abd":
        house.registry.acquire(AdapterUse(name))
    for digest in (oldest, idle, second):
        house.bring(digest)
    assert [digest in house.cache for digest in (oldest, second, idle)] == [True, True, False]
    house.bring(third)
    assert [digest in house.cache for digest in (oldest, second, third)] == [True, False, True]
    house.registry.close()
