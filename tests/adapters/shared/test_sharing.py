"""Replicas that share a store: what is changed at one is so at all, whoever is killed, away, slow or late."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest
from memory_objects import MemoryBucket
from registry_harness import RegistryHarness
from simulated_replicas import Replica, newest, wanted

from lora_serve.adapters.shared.catalog import decode_catalog, encode_catalog
from lora_serve.adapters.store.records import describe_folder
from lora_serve.errors import (
    AdapterBusy,
    AdapterExists,
    AdapterNotFound,
    PartlyApplied,
    PreconditionFailed,
    ServeError,
    StorageFull,
    StoreUnusable,
    Unavailable,
)
from lora_serve.messages import AliasTarget, DeleteAlias, Publish, PutAlias
from lora_serve.precondition import Precondition
from lora_serve.request import AdapterUse

Make = Callable[..., Replica]


@pytest.fixture
def bucket() -> MemoryBucket:
    return MemoryBucket()


@pytest.fixture
def make(tmp_path: Path, bucket: MemoryBucket) -> Iterator[Make]:
    made: list[Replica] = []

    def make(name: str = "a", **more: float) -> Replica:
        replica = Replica(tmp_path / name, bucket, random.Random(name), **more)
        made.append(replica)
        replica.start()
        return replica

    yield make
    for replica in made:
        replica.kill()


def test_what_is_published_at_one_is_served_by_all_and_by_who_comes_later(make: Make, bucket: MemoryBucket) -> None:
    a, b = make("a"), make("b")
    first, second = (a.publish("poet", seed).versions[0] for seed in (1, 2))
    assert b.served == {}
    b.look()
    assert b.served == a.served == {"poet": [second.digest, first.digest]}
    late = make("late")
    assert late.served == a.served
    of_all = [replica.harness.operations.describe("poet").versions for replica in (a, b, late)]
    assert [[each.created for each in versions] for versions in of_all] == 3 * [[second.created, first.created]]
    b.delete("poet")
    a.look()
    assert a.served == b.served == {}
    a.check_whole()


def test_an_alias_and_its_versions_arrive_in_any_order(make: Make, bucket: MemoryBucket) -> None:
    a, b = make("a"), make("b")
    old = a.publish("poet", 0).versions[0].digest
    a.put_alias("canary", f"poet@{old[:12]}")
    for seed in range(1, 6):
        a.publish("poet", seed)
    for replica in (b, make("late")):
        replica.look()
        assert replica.served == a.served == wanted(newest(bucket))
        assert old in replica.served["poet"]
        lease = replica.harness.registry.acquire(AdapterUse("canary"))
        assert lease.digest == old
        replica.harness.registry.release(lease)
    b.delete_alias("canary")
    a.look()
    assert a.served == b.served == wanted(newest(bucket))
    assert old not in a.served["poet"]
    assert old not in newest(bucket).versions


def test_a_name_becomes_an_alias_and_an_alias_a_name(make: Make, bucket: MemoryBucket) -> None:
    a, b = make("a"), make("b")
    a.publish("x", 1)
    a.put_alias("y", "x")
    b.look()
    a.delete_alias("y")
    a.publish("y", 2)
    a.delete("x")
    a.put_alias("x", "y")
    b.look()
    assert b.served == a.served == wanted(newest(bucket))


def test_conditions_hold_of_what_all_replicas_have(make: Make) -> None:
    a, b = make("a"), make("b")
    first = a.publish("poet", 1, replace=False).versions[0].digest
    with pytest.raises(AdapterExists):
        b.publish("poet", 2, replace=False)
    with pytest.raises(PreconditionFailed):
        b.publish("poet", 2, precondition=Precondition(none_match=("*",)))
    second = b.publish("poet", 2, precondition=Precondition(match=(first,))).versions[0].digest
    for lost in (
        lambda: a.publish("poet", 3, precondition=Precondition(match=(first,))),
        lambda: a.delete("poet", Precondition(match=(first,))),
    ):
        with pytest.raises(PreconditionFailed, match=f"it is {second[:12]} now"):
            lost()
    tag = a.put_alias("alias", "poet").etag
    b.put_alias("alias", f"poet@{second}", precondition=Precondition(match=(tag,)))
    with pytest.raises(PreconditionFailed):
        a.put_alias("alias", "poet", precondition=Precondition(match=(tag,)))
    with pytest.raises(AdapterBusy, match="alias alias stands for adapter poet"):
        a.delete("poet")


def test_who_is_slower_loses_with_a_condition_and_wins_without(make: Make, bucket: MemoryBucket) -> None:
    """The other replica changes the catalog between this one's look and its change."""
    a, b = make("a"), make("b")
    first = a.publish("poet", 1).versions[0].digest

    def race(**condition: Precondition) -> str:
        faster = iter([lambda: b.publish("poet", 7)])

        def other_first() -> None:
            for go in faster:
                go()

        a.objects.before_change = other_first
        return str(a.publish("poet", 3, **condition).versions[0].digest)

    with pytest.raises(PreconditionFailed):
        race(precondition=Precondition(match=(first,)))
    last = race()
    b.look()
    assert b.served == a.served == wanted(newest(bucket))
    assert a.served["poet"][0] == last


def test_targets_of_aliases_are_those_that_all_replicas_have(make: Make, bucket: MemoryBucket) -> None:
    a, b = make("a"), make("b")
    a.publish("own", 5, local=True, source="a folder")
    with pytest.raises(AdapterNotFound, match="adapter own is not in the shared store"):
        a.put_alias("alias", "own")
    a.publish("poet", 1)
    b.put_alias("alias", "poet")  # which b has not seen yet
    assert b.served == wanted(newest(bucket))


def test_without_the_store_all_goes_on_and_nothing_changes(
    make: Make, bucket: MemoryBucket, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    a, b = make("a"), make("b")
    a.publish("poet", 1)
    b.look()
    b.objects.away = True
    for change in (
        lambda: b.publish("another", 2),
        lambda: b.delete("poet"),
        lambda: b.put_alias("alias", "poet"),
        lambda: b.delete_alias("alias"),
    ):
        with pytest.raises(Unavailable, match=r"the shared store cannot be reached .*; nothing was changed"):
            change()
    b.look()
    b.look()
    said = [record.getMessage() for record in caplog.records if "nothing can be changed" in record.getMessage()]
    assert len(said) == 1
    assert not b.shared.status().reachable
    assert b.harness.registry.acquire(AdapterUse("poet"))
    a.publish("poet", 2)
    a.delete("poet")
    b.kill()

    again = Replica(tmp_path / "b", bucket, random.Random(1))  # starts without the store, and catches up
    again.objects.away = True
    again.start()
    assert again.notes[0].startswith("the shared store cannot be reached")
    assert again.served.keys() == {"poet"}
    again.objects.away = False
    again.look()
    assert again.served == a.served == {}
    again.kill()


def test_a_store_with_another_history_changes_nothing(make: Make, bucket: MemoryBucket) -> None:
    a = make("a")
    a.publish("poet", 1)
    before = dict(bucket.objects)
    a.publish("poet", 2)
    late = dict(bucket.objects)
    for objects, message in (
        (before, "it was restored from a copy"),
        ({}, "has no catalog any more"),
    ):
        bucket.objects = dict(objects)
        a.look()
        assert len(a.served["poet"]) == 2
        with pytest.raises(Unavailable, match=message):
            a.delete("poet")
    bucket.objects = late
    a.delete("poet")
    assert a.served == {}


def test_another_catalog_is_not_followed_by_who_followed_one(make: Make, bucket: MemoryBucket, tmp_path: Path) -> None:
    a = make("a")
    a.publish("poet", 1)
    a.kill()
    another = MemoryBucket()
    other = Replica(tmp_path / "c", another, random.Random(2))
    other.start()
    other.kill()
    again = Replica(tmp_path / "a", another, random.Random(3))
    again.start()
    assert "another catalog than this replica has followed" in again.notes[0]
    assert again.served.keys() == {"poet"}
    again.kill()


def test_a_damaged_record_of_what_was_followed_keeps_nobody_from_starting(
    make: Make, bucket: MemoryBucket, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    a = make("a")
    a.publish("poet", 1)
    a.kill()
    (tmp_path / "a" / "store" / "shared.json").write_text("{")
    again = make("a")
    assert again.served == wanted(newest(bucket))
    assert "shared.json is truncated or not JSON" in caplog.text


def test_a_store_for_another_base_is_refused(make: Make, bucket: MemoryBucket) -> None:
    a = make("a")
    a.publish("poet", 1)
    bucket.write("catalog.json", encode_catalog(msgspec.structs.replace(newest(bucket), base="b fingerprint")))
    with pytest.raises(StoreUnusable, match="the shared store is for tests"):
        make("b")


def test_what_is_a_replicas_own_is_left_alone_until_the_catalog_has_it(make: Make, bucket: MemoryBucket) -> None:
    a, b = make("a"), make("b")
    a.publish("own", 1, local=True, source="a folder")
    b.look()
    assert b.served == a.served == {}
    assert a.harness.operations.describe("own")
    shared = b.publish("own", 2).versions[0].digest
    a.look()
    assert a.served == b.served == {"own": [shared]}
    with pytest.raises(AdapterExists, match="the shared store has own, which is served instead"):
        a.publish("own", 1, local=True, source="a folder")
    a.publish("second", 3, local=True, source="a folder")
    a.delete("second")
    assert b.delete("own")
    with pytest.raises(AdapterNotFound):
        b.delete("own")


def test_an_own_adapter_with_the_name_of_a_shared_alias_stays_and_is_said(make: Make) -> None:
    a, b = make("a"), make("b")
    own = a.publish("name", 1, local=True, source="a folder").versions[0].digest
    b.publish("poet", 2)
    b.put_alias("name", "poet")
    a.look()
    assert a.harness.operations.describe("name").versions[0].digest == own
    assert a.shared.status().behind == 1
    a.delete("name")
    b.publish("poet", 3)
    a.look()
    assert a.shared.status().behind == 0
    assert a.served == b.served


def test_pins_are_a_replicas_own_and_last(make: Make) -> None:
    a, b = make("a"), make("b")
    a.publish("poet", 1)
    b.look()
    b.call(lambda done: b.harness.operations.pin("poet", True, done))
    a.publish("poet", 2)
    b.look()
    pinned = [replica.harness.operations.describe("poet").pinned for replica in (a, b)]
    assert pinned == [False, True]
    assert a.served == b.served


def test_content_that_is_damaged_or_gone_is_said_and_mended_by_publishing_again(
    make: Make, bucket: MemoryBucket
) -> None:
    a, b = make("a"), make("b")
    first = a.publish("poet", 1).versions[0].digest
    b.look()
    second = a.publish("poet", 2).versions[0].digest
    (weights,) = [key for key in bucket.contents if second in key and key.endswith("safetensors")]
    bucket.contents[weights] = bucket.contents[weights][:-4] + b"abcd"
    b.look()
    assert b.served["poet"] == [first]
    assert b.shared.status().behind == 1
    a.publish("poet", 2)
    b.look()
    assert b.served == a.served
    assert b.shared.status().behind == 0


def test_a_change_that_this_replica_cannot_follow_is_answered_so(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = make("a"), make("b")

    def full(*given: object, **_: object) -> None:
        raise StorageFull("the disk of the adapter store is full; nothing was changed")

    with monkeypatch.context() as patch:
        patch.setattr(a.harness.store, "publish", full)
        with pytest.raises(PartlyApplied, match="the shared store has the change, but this replica cannot follow it"):
            a.publish("poet", 1)
    b.look()
    assert b.served.keys() == {"poet"}
    for _ in range(61):
        a.look()
    assert a.served == b.served  # tried again after a while


@pytest.mark.parametrize("seed", [*range(4), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(4, 150))])
def test_random_changes_kills_and_faults_converge(seed: int, tmp_path: Path) -> None:
    simulation = Simulation(random.Random(seed), tmp_path)
    for _ in range(120):
        simulation.act()
    simulation.settle()


class Simulation:
    """Three replicas, and clients that remember what they were told."""

    def __init__(self, chosen: random.Random, folder: Path) -> None:
        self.chosen, self.folder, self.bucket = chosen, folder, MemoryBucket()
        self._interfering = False
        self.replicas: list[Replica | None] = []
        for number in range(3):
            self.replicas.append(self.begin(number))
        self.told: list[tuple[str, str, str | None]] = []  # name, version, and the one that it was to replace

    def begin(self, number: int) -> Replica:
        replica = Replica(self.folder / str(number), self.bucket, self.chosen, unreliable=0.1)
        replica.objects.away = self.chosen.random() < 0.2
        replica.objects.before_change = lambda: self.interfere(replica)
        replica.start()
        return replica

    def interfere(self, replica: Replica) -> None:
        """Another replica may change the catalog first."""
        if self._interfering or not self.replicas or self.chosen.random() < 0.7:
            return
        self._interfering = True
        other = self.chosen.choice(self.replicas)
        if other not in (None, replica):
            other.workers.do_shared()
        self._interfering = False

    def act(self) -> None:
        number = self.chosen.randrange(len(self.replicas))
        replica = self.replicas[number]
        if replica is None:
            self.replicas[number] = self.begin(number)
            return
        chance = self.chosen.random()
        if chance < 0.04:
            replica.kill()
            self.replicas[number] = None
        elif chance < 0.08:
            replica.objects.away = not replica.objects.away
        elif chance < 0.4:
            self.change(replica)
        elif chance < 0.5:
            self.request(replica)
        elif chance < 0.65:
            replica.workers.do_repeated()
        for each in self.replicas:
            for _ in range(self.chosen.randrange(12)):
                if each is not None:
                    each.harness.registry.poll()

    def change(self, replica: Replica) -> None:
        name, seed = f"n{self.chosen.randrange(4)}", self.chosen.randrange(8)
        kind = self.chosen.choice(["publish"] * 4 + ["delete", "alias", "alias", "unalias", "pin", "own"])
        known = replica.harness.residency.names.get(name)
        condition, expected = Precondition(), None
        if known is not None and self.chosen.random() < 0.4:
            expected = known.versions[0]
            condition = Precondition(match=(expected,))
        told: list[object] = []

        def done(result: object) -> None:
            told.append(result)
            if isinstance(result, ServeError):
                assert type(result).kind in (
                    "adapter_exists", "adapter_not_found", "adapter_busy", "precondition_failed", "unavailable",
                    "partly_applied", "bad_request",
                ), result  # fmt: skip
                return
            if kind == "publish":
                self.told.append((name, digest_of(seed), expected))

        try:
            if kind in ("publish", "own"):
                folder = str(replica.harness.upload(seed))
                own = kind == "own"
                given = Publish(
                    name, folder, replace=True, precondition=condition, local=own, source="a folder" if own else ""
                )
                replica.shared.publish(given, done)
            elif kind == "delete":
                replica.shared.delete(name, done, condition)
            elif kind == "alias":
                target = name if known is None or seed < 4 else f"{name}@{self.chosen.choice(known.versions)}"
                alias = self.chosen.choice(["n0", "x", "y"])
                replica.shared.put_alias(PutAlias(alias, [AliasTarget(target)]), done)
            elif kind == "unalias":
                replica.shared.delete_alias(DeleteAlias(self.chosen.choice(["n0", "x", "y"])), done)
            else:
                replica.harness.operations.pin(name, seed < 4, done)
        except ServeError as error:
            done(error)

    def request(self, replica: Replica) -> None:
        """A request gets a whole version of what it names, or is told that there is none."""
        registry = replica.harness.registry
        for name in [*replica.harness.residency.aliases.records, *replica.harness.residency.names][:4]:
            try:
                registry.release(registry.acquire(AdapterUse(name)))
            except AdapterNotFound:
                assert name not in replica.harness.residency.aliases.records
                assert replica.harness.residency.names[name].unlisted

    def settle(self) -> None:
        """Everybody is back, and all faults are over: then all serve the same, whole, and what clients were told."""
        for number, replica in enumerate(self.replicas):
            if replica is None:
                self.replicas[number] = self.begin(number)
        for _ in range(6):
            for each in self.replicas:
                assert each is not None
                each.objects.away, each.objects.unreliable = False, 0.0
                each.run()
                each.look()
        catalog = newest(self.bucket)
        for each in self.replicas:
            assert each is not None
            own = {name for name, record in each.harness.residency.names.items() if not record.shared}
            expected = {name: entry for name, entry in wanted(catalog).items() if name not in own}
            assert each.served == expected
            assert each.shared.status().behind == len(own & wanted(catalog).keys())
            each.check_whole()
            each.kill()
        self.check_told()

    def check_told(self) -> None:
        """Each change that a client was told of is one step of the catalog's history, from what it was to replace."""
        catalogs = [decode_catalog(data) for data in self.bucket.history]
        assert [each.generation for each in catalogs] == list(range(len(catalogs)))
        steps = [
            (name, after.adapters[name][0], before.adapters.get(name, [""])[0])
            for before, after in pairwise(catalogs)
            for name in after.adapters
            if after.versions != before.versions and after.adapters[name] is not before.adapters.get(name)
        ]
        for name, version, expected in self.told:
            found = [step for step in steps if step[:2] == (name, version) and expected in (None, step[2])]
            assert found, (name, version, expected)


def digest_of(seed: int) -> str:
    return _DIGESTS[seed]


_DIGESTS: dict[int, str] = {}


@pytest.fixture(autouse=True, scope="module")
def digests(tmp_path_factory: pytest.TempPathFactory) -> None:
    harness = RegistryHarness(tmp_path_factory.mktemp("digests"))
    for seed in range(8):
        _DIGESTS[seed] = describe_folder(harness.upload(seed)).digest
    harness.registry.close()
