"""Aliases: a canary by weight, sticky, changed all at once, and versions that stay as long as an alias names them."""

from __future__ import annotations

import errno
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from registry_harness import BASE_NAME, RegistryHarness

from lora_serve.adapters import alias_operations, aliases
from lora_serve.adapters.aliases import choose_target
from lora_serve.adapters.store.disk import Disk
from lora_serve.adapters.store.records import AliasRecord, TargetRecord
from lora_serve.errors import (
    AdapterBroken,
    AdapterBusy,
    AdapterExists,
    AdapterNotFound,
    BadRequest,
    PreconditionFailed,
    ServeError,
    StorageFull,
    TooLarge,
)
from lora_serve.messages import AliasInfo, AliasTarget, DeleteAlias, LocateFiles, Publish, PutAlias
from lora_serve.precondition import Precondition
from lora_serve.request import AdapterUse, Routing

USERS = [Routing(call=f"c{n}", user=f"user-{n}") for n in range(4000)]


@pytest.fixture
def harness(tmp_path: Path) -> Iterator[RegistryHarness]:
    harness = RegistryHarness(tmp_path)
    for seed, name in enumerate("ab"):
        harness.publish(name, seed)
    yield harness
    harness.registry.close()


def put(harness: RegistryHarness, name: str, *targets: str | tuple[str, float], **more: Any) -> AliasInfo:
    info: AliasInfo = harness.run(lambda done: harness.operations.aliases.put(alias(name, *targets, **more), done))
    return info


def alias(name: str, *targets: str | tuple[str, float], **more: Any) -> PutAlias:
    both = [(target, 1.0) if isinstance(target, str) else target for target in targets]
    return PutAlias(name, [AliasTarget(*each) for each in both], **more)


def remove(harness: RegistryHarness, name: str, **more: Any) -> AliasInfo:
    info: AliasInfo = harness.run(lambda done: harness.operations.aliases.delete(DeleteAlias(name, **more), done))
    return info


def served(harness: RegistryHarness, name: str, routing: Routing) -> tuple[str, str]:
    """Name and version that a request gets."""
    lease = harness.registry.acquire(AdapterUse(name), routing)
    harness.registry.release(lease)
    return lease.name, lease.digest


def versions_on_disk(harness: RegistryHarness) -> set[str]:
    return {path.name for path in (harness.folder / "store" / "versions").iterdir()}


# --- the choice ------------------------------------------------------------------------------------------------------


def record(*weights: float, sticky: str = "user") -> AliasRecord:
    return AliasRecord([TargetRecord(f"t{n}", "", weight) for n, weight in enumerate(weights)], sticky)


def choices(weights: AliasRecord) -> list[str]:
    return [choose_target("prod", weights, routing).name for routing in USERS]


def test_targets_are_chosen_by_weight() -> None:
    counts = Counter(choices(record(70, 25, 5)))
    for name, share in (("t0", 0.70), ("t1", 0.25), ("t2", 0.05)):
        deviation = (share * (1 - share) / len(USERS)) ** 0.5
        assert abs(counts[name] / len(USERS) - share) < 4 * deviation
    assert Counter(choices(record(0, 1)))["t0"] == 0


def test_the_choice_of_a_user_is_the_same_in_every_release() -> None:
    assert choices(record(1, 1))[:12] == [f"t{n}" for n in [1, 0, 0, 0, 0, 0, 1, 1, 0, 0, 1, 0]]


def test_a_change_of_weights_moves_only_those_that_it_must() -> None:
    before, after = choices(record(95, 5)), choices(record(90, 10))
    moved = [pair for pair in zip(before, after, strict=True) if pair[0] != pair[1]]
    assert {*moved} == {("t0", "t1")}
    assert abs(len(moved) / len(USERS) - 0.05) < 0.015
    grown = choices(record(95, 5, 100))
    assert {new for old, new in zip(before, grown, strict=True) if old != new} == {"t2"}


@pytest.mark.parametrize("sticky", ["user", "header:X-Session"])
def test_what_a_client_sends_keeps_it_on_its_target(sticky: str) -> None:
    def ask(call: str, user: str, session: str) -> str:
        return choose_target("prod", record(1, 1, sticky=sticky), Routing(call, user, {"x-session": session})).name

    for value in map(str, range(20)):
        stuck = {ask(str(n), *((value, str(n)) if sticky == "user" else (str(n), value))) for n in range(50)}
        assert len(stuck) == 1
    assert len({ask("call", str(n), str(n)) for n in range(50)}) == 2


@pytest.mark.parametrize("weights", [record(1, 1), record(1, 1, sticky="")])
def test_without_that_every_call_is_on_its_own(weights: AliasRecord) -> None:
    calls = [choose_target("prod", weights, Routing(str(n))).name for n in range(50)]
    assert len({*calls}) == 2
    assert calls == [choose_target("prod", weights, Routing(str(n))).name for n in range(50)]


def test_two_aliases_split_their_users_independently() -> None:
    both = Counter(
        (choose_target("one", record(1, 1), user).name, choose_target("two", record(1, 1), user).name) for user in USERS
    )
    assert len(both) == 4
    assert min(both.values()) > 0.2 * len(USERS)


# --- requests --------------------------------------------------------------------------------------------------------


def test_a_request_is_served_by_a_target_under_the_target_s_name(harness: RegistryHarness) -> None:
    digests = {name: harness.operations.describe(name).versions[0].digest for name in "ab"}
    info = put(harness, "prod", ("a", 3), (f"b@{digests['b'][:8]}", 1), sticky="user")
    assert info.targets == [AliasTarget("a", 3), AliasTarget(f"b@{digests['b']}", 1)]
    assert (info.sticky, info.broken, len(info.etag)) == ("user", None, 64)
    assert {served(harness, "prod", user) for user in USERS[:50]} == {*digests.items()}
    assert harness.registry.acquire(AdapterUse("prod", weight=0.5), USERS[0]).weight == 0.5
    assert harness.operations.aliases.describe_some("") == [info]
    with pytest.raises(AdapterNotFound, match="prod@"):
        harness.registry.acquire(AdapterUse("prod", digests["a"]))


def test_a_target_without_a_version_follows_its_adapter(harness: RegistryHarness) -> None:
    put(harness, "prod", "a")
    new = harness.publish("a", 7, replace=True).versions[0].digest
    assert served(harness, "prod", USERS[0]) == ("a", new)


def test_rolling_back_is_one_change_of_the_alias(harness: RegistryHarness) -> None:
    old = harness.operations.describe("a").versions[0].digest
    put(harness, "prod", f"a@{old}")
    new = harness.publish("a", 7, replace=True).versions[0].digest  # of which one is kept otherwise
    put(harness, "prod", f"a@{new}", (f"a@{old}", 0))
    assert served(harness, "prod", USERS[0]) == ("a", new)
    put(harness, "prod", f"a@{old}")
    assert served(harness, "prod", USERS[0]) == ("a", old)


def test_headers_that_aliases_go_by_are_in_the_statistics(harness: RegistryHarness) -> None:
    put(harness, "prod", "a", sticky="header:X-Session")
    put(harness, "test", "a", sticky="user")
    assert harness.stats().sticky_headers == ["x-session"]
    remove(harness, "prod")
    assert harness.stats().sticky_headers == []


def test_aliases_and_the_headers_that_they_go_by_have_limits(
    harness: RegistryHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aliases, "MOST_STICKY_HEADERS", 1)
    monkeypatch.setattr(aliases, "MOST_ALIASES", 2)
    put(harness, "one", "a", sticky="header:X-Session")
    with pytest.raises(BadRequest) as refused:
        put(harness, "two", "a", sticky="header:X-Other")
    assert refused.value.param == "sticky"
    put(harness, "two", "a", sticky="header:x-session")
    with pytest.raises(TooLarge) as too_many:
        put(harness, "three", "a")
    assert too_many.value.param == "name"
    put(harness, "two", "b", sticky="user")
    put(harness, "one", "b", sticky="user")
    assert harness.stats().sticky_headers == []
    remove(harness, "two")
    put(harness, "three", "a", sticky="header:X-Other")


def test_names_are_those_of_listed_adapters_and_of_aliases(harness: RegistryHarness) -> None:
    put(harness, "prod", "a")
    harness.run(lambda done: harness.operations.unload("b", done))
    assert sorted(harness.operations.names()) == ["a", "prod"]


def test_aliases_are_described_some_at_a_time(harness: RegistryHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alias_operations, "PAGE", 2)
    for name in ("z", "x", "y"):
        put(harness, name, "a")
    found = [[info.name for info in harness.operations.aliases.describe_some(after)] for after in ("", "y", "z")]
    assert found == [["x", "y"], ["z"], []]


# --- versions that stay ----------------------------------------------------------------------------------------------


def test_versions_that_an_alias_names_stay_until_none_does_also_after_a_restart(tmp_path: Path) -> None:
    harness = RegistryHarness(tmp_path)
    old = harness.publish("a", 0).versions[0].digest
    put(harness, "prod", f"a@{old}")
    put(harness, "also", f"a@{old}")
    middle = harness.publish("a", 1, replace=True).versions[0].digest
    new = harness.publish("a", 2, replace=True).versions[0].digest
    assert [version.digest for version in harness.operations.describe("a").versions] == [new, old]
    harness.wait_until(lambda: versions_on_disk(harness) == {new, old})
    assert middle not in harness.residency.versions
    harness.registry.close()
    again = RegistryHarness(tmp_path)
    assert again.notes == []
    assert served(again, "prod", USERS[0]) == ("a", old)
    remove(again, "prod")
    assert served(again, "also", USERS[0]) == ("a", old)
    put(again, "also", "a")
    again.wait_until(lambda: versions_on_disk(again) == {new})
    assert again.residency.versions.keys() == {new}
    again.wait_until(lambda: again.store.names()["a"].versions == [new])
    again.registry.close()


def test_a_version_that_only_a_lease_keeps_can_be_named_and_then_stays(harness: RegistryHarness) -> None:
    old = harness.operations.describe("a").versions[0].digest
    lease = harness.registry.acquire(AdapterUse("a"))
    new = harness.publish("a", 7, replace=True).versions[0].digest
    assert harness.store.names()["a"].versions == [new]
    put(harness, "prod", f"a@{old}")
    assert harness.store.names()["a"].versions == [new, old]
    harness.registry.release(lease)
    assert served(harness, "prod", USERS[0]) == ("a", old)
    remove(harness, "prod")
    harness.wait_until(lambda: old not in versions_on_disk(harness))


def test_a_leased_version_that_no_alias_names_any_more_goes_with_the_lease(harness: RegistryHarness) -> None:
    old = harness.operations.describe("a").versions[0].digest
    put(harness, "prod", f"a@{old}")
    new = harness.publish("a", 7, replace=True).versions[0].digest
    lease = harness.registry.acquire(AdapterUse("prod"))
    remove(harness, "prod")
    harness.wait_until(lambda: harness.store.names()["a"].versions == [new])
    assert old in versions_on_disk(harness)
    harness.registry.release(lease)
    harness.wait_until(lambda: versions_on_disk(harness) >= {new} and old not in versions_on_disk(harness))


def test_an_alias_changed_while_its_adapter_is_published_loses_neither(harness: RegistryHarness) -> None:
    old = harness.operations.describe("a").versions[0].digest
    put(harness, "prod", f"a@{old}")
    results: list[Any] = []
    harness.start_publish("a", harness.upload(7), results.append, replace=True)
    harness.operations.aliases.put(alias("prod", "b"), results.append)
    harness.wait_until(lambda: len(results) == 2)
    assert not [result for result in results if isinstance(result, ServeError)]
    new = harness.operations.describe("a").versions[0].digest
    assert new != old
    harness.wait_until(lambda: harness.store.names()["a"].versions == [new])
    harness.wait_until(lambda: old not in versions_on_disk(harness))


def test_a_version_that_is_given_up_while_its_adapter_changes_leaves_the_disk_too(harness: RegistryHarness) -> None:
    old = harness.operations.describe("a").versions[0].digest
    put(harness, "prod", f"a@{old}")
    new = harness.publish("a", 7, replace=True).versions[0].digest
    results: list[Any] = []
    harness.operations.aliases.delete(DeleteAlias("prod"), results.append)
    for pinned in (True, False):  # both save a record of the adapter, the second one before its versions are reviewed
        harness.operations.pin("a", pinned, results.append)
    harness.wait_until(lambda: len(results) == 3)
    harness.wait_until(lambda: harness.store.names()["a"].versions == [new])
    harness.wait_until(lambda: old not in versions_on_disk(harness))
    assert old not in harness.residency.versions


# --- what is refused -------------------------------------------------------------------------------------------------


def test_an_adapter_that_an_alias_names_is_not_deleted_or_unloaded(harness: RegistryHarness) -> None:
    put(harness, "prod", "a", "b")
    for operation in (harness.operations.delete, harness.operations.unload):
        with pytest.raises(AdapterBusy, match="alias prod stands for adapter a"):
            harness.run(lambda done, operation=operation: operation("a", done))
    assert [info.name for info in harness.operations.describe_some("")] == ["a", "b"]
    put(harness, "prod", "b")
    harness.run(lambda done: harness.operations.delete("a", done))


def test_a_name_is_an_adapter_s_or_an_alias_s(harness: RegistryHarness) -> None:
    put(harness, "prod", "a")
    with pytest.raises(AdapterExists, match="prod is an alias") as refused:
        harness.publish("prod", 3, replace=True)
    assert refused.value.param == "name"
    for name in ("a", BASE_NAME, "base"):
        with pytest.raises(AdapterExists) as refused:
            put(harness, name, "b")
        assert refused.value.param == "name"
    remove(harness, "prod")
    harness.publish("prod", 3)
    with pytest.raises(AdapterExists):
        put(harness, "prod", "a")


@pytest.mark.parametrize(
    ("target", "error"),
    [("c", AdapterNotFound), ("a@000", AdapterNotFound), ("a@", BadRequest), ("prod", BadRequest)],
)
def test_a_target_that_is_no_adapter_is_refused_by_its_field(
    harness: RegistryHarness, target: str, error: type[ServeError]
) -> None:
    before = put(harness, "prod", "a")
    with pytest.raises(error) as refused:
        put(harness, "prod", "b", target)
    assert refused.value.param == "targets.1.adapter"
    assert harness.operations.aliases.describe("prod") == before


def test_an_unknown_alias_is_not_found(harness: RegistryHarness) -> None:
    for name in ("nothing", "a"):
        with pytest.raises(AdapterNotFound, match=f"alias {name} does not exist"):
            harness.operations.aliases.describe(name)
        with pytest.raises(AdapterNotFound, match=f"alias {name} does not exist"):
            remove(harness, name)


# --- conditions ------------------------------------------------------------------------------------------------------


def test_of_two_changes_with_one_condition_exactly_one_is_made(harness: RegistryHarness) -> None:
    digest = harness.operations.describe("a").versions[0].digest
    results: list[Any] = []
    for seed in (7, 8):
        publish = Publish("a", str(harness.upload(seed)), True, precondition=Precondition((digest,)))
        harness.operations.publish(publish, results.append)
    harness.wait_until(lambda: len(results) == 2)
    assert sorted(isinstance(result, PreconditionFailed) for result in results) == [False, True]
    etag = put(harness, "prod", "a").etag
    results = []
    for target in ("a", "b"):
        change = alias("prod", (target, 2.0), precondition=Precondition((etag,)))
        harness.operations.aliases.put(change, results.append)
    harness.wait_until(lambda: len(results) == 2)
    assert [isinstance(result, PreconditionFailed) for result in results] == [False, True]
    assert harness.operations.aliases.describe("prod") == results[0]


ABSENT, PRESENT = Precondition(none_match=("*",)), Precondition(match=("*",))


def test_conditions_can_ask_for_absence_and_presence(harness: RegistryHarness) -> None:
    def publish(name: str, condition: Precondition) -> Callable[[Any], None]:
        operation = Publish(name, str(harness.upload(5)), True, precondition=condition)
        return lambda done: harness.operations.publish(operation, done)

    for refused, condition in (("a", ABSENT), ("c", PRESENT)):
        with pytest.raises(PreconditionFailed):
            harness.run(publish(refused, condition))
    harness.run(publish("c", ABSENT))
    harness.run(publish("c", PRESENT))
    with pytest.raises(PreconditionFailed) as error:
        put(harness, "prod", "a", precondition=PRESENT)
    assert error.value.param == "If-Match"
    put(harness, "prod", "a", precondition=ABSENT)
    with pytest.raises(PreconditionFailed) as error:
        put(harness, "prod", "a", precondition=ABSENT)
    assert error.value.param == "If-None-Match"


def test_deletes_are_conditional_too(harness: RegistryHarness) -> None:
    etag = put(harness, "prod", "b").etag
    digest = harness.operations.describe("a").versions[0].digest
    other = Precondition(("0" * 64,))
    with pytest.raises(PreconditionFailed):
        harness.run(lambda done: harness.operations.delete("a", done, other))
    with pytest.raises(PreconditionFailed):
        remove(harness, "prod", precondition=other)
    harness.run(lambda done: harness.operations.delete("a", done, Precondition((digest,))))
    remove(harness, "prod", precondition=Precondition((etag,)))


def test_the_tag_of_an_alias_is_of_what_it_stands_for(harness: RegistryHarness) -> None:
    etags = [put(harness, "prod", *targets, sticky="user").etag for targets in (["a"], ["a", "b"], ["a"])]
    assert etags[0] == etags[2] != etags[1]
    assert put(harness, "prod", "a").etag != etags[0]


# --- the store -------------------------------------------------------------------------------------------------------


class FillingDisk(Disk):
    """A disk on which nothing can be written while it is full."""

    full = False

    def write(self, path: Path, data: bytes) -> None:
        if self.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        super().write(path, data)


def test_a_change_that_cannot_be_stored_is_not_made(tmp_path: Path) -> None:
    disk = FillingDisk()
    harness = RegistryHarness(tmp_path, disk=disk)
    old = harness.publish("a", 0).versions[0].digest
    before = put(harness, "prod", f"a@{old}")
    new = harness.publish("a", 1, replace=True).versions[0].digest
    disk.full = True
    for name in ("prod", "new"):
        with pytest.raises(StorageFull):
            put(harness, name, "a")
    assert harness.operations.aliases.describe_some("") == [before]
    assert served(harness, "prod", USERS[0]) == ("a", old)
    disk.full = False
    put(harness, "prod", "a")
    assert served(harness, "prod", USERS[0]) == ("a", new)
    harness.registry.close()


def test_an_alias_that_cannot_be_read_is_listed_and_keeps_every_version(tmp_path: Path) -> None:
    harness = RegistryHarness(tmp_path)
    old = harness.publish("a", 0).versions[0].digest
    put(harness, "prod", f"a@{old}")
    new = harness.publish("a", 1, replace=True).versions[0].digest
    harness.registry.close()
    path = tmp_path / "store" / "aliases" / "prod.json"
    path.write_text(path.read_text()[:-20])
    again = RegistryHarness(tmp_path)
    assert again.notes == ["alias prod is not served: prod.json is truncated or not JSON"]
    assert again.operations.aliases.describe("prod").broken == "prod.json is truncated or not JSON"
    with pytest.raises(AdapterBroken, match="alias prod cannot be served"):
        again.registry.acquire(AdapterUse("prod"))
    with pytest.raises(AdapterExists):
        again.publish("prod", 5)
    third = again.publish("a", 2, replace=True).versions[0].digest
    assert versions_on_disk(again) == {old, new, third}
    put(again, "prod", f"a@{old}")
    again.wait_until(lambda: versions_on_disk(again) == {old, third})
    assert [path.name for path in (tmp_path / "store" / "set-aside" / "aliases").iterdir()] == ["prod.json"]
    again.registry.close()


def test_an_alias_of_a_damaged_version_says_so_and_the_others_are_served(tmp_path: Path) -> None:
    harness = RegistryHarness(tmp_path)
    old = harness.publish("a", 0).versions[0].digest
    harness.publish("b", 3)
    put(harness, "prod", f"a@{old}", "b", sticky="user")
    harness.publish("a", 1, replace=True)
    harness.registry.close()
    (harness.store.folder(old) / "adapter_config.json").write_text("{}")
    again = RegistryHarness(tmp_path)
    problem = f"adapter a@{old} does not exist"
    assert f"alias prod: {problem}" in again.notes
    assert again.operations.aliases.describe("prod").broken == problem
    record = again.residency.aliases.records["prod"]
    assert {choose_target("prod", record, user).name for user in USERS[:30]} == {"a", "b"}
    for user in USERS[:30]:
        if choose_target("prod", record, user).name == "b":
            assert served(again, "prod", user)[0] == "b"
        else:
            with pytest.raises(AdapterBroken, match=f"alias prod cannot be served: {problem}"):
                served(again, "prod", user)
    again.registry.close()


def test_an_alias_and_an_adapter_of_one_name_in_the_store_leave_the_adapter_served(tmp_path: Path) -> None:
    harness = RegistryHarness(tmp_path)
    digest = harness.publish("a", 0).versions[0].digest
    harness.store.set_alias("a", AliasRecord([TargetRecord("a")]))
    harness.registry.close()
    again = RegistryHarness(tmp_path)
    assert again.notes == ["alias a is not served: an adapter has the same name"]
    assert served(again, "a", USERS[0]) == ("a", digest)
    remove(again, "a")
    assert again.publish("a", 1, replace=True).broken is None
    again.registry.close()


def test_the_files_of_any_version_can_be_found(harness: RegistryHarness) -> None:
    digest = harness.operations.describe("a").versions[0].digest
    found = harness.operations.locate(LocateFiles("a", digest[:7]))
    assert (found.name, found.digest, found.folder) == ("a", digest, str(harness.store.folder(digest)))
    assert found.files.keys() == {"adapter_config.json", "adapter_model.safetensors"}
    for name, version, field in (("c", None, "adapter"), ("a", "000", "version")):
        with pytest.raises(AdapterNotFound) as refused:
            harness.operations.locate(LocateFiles(name, version))
        assert refused.value.param == field
