"""Tiers of memory: the order of last use, and exact bytes."""

from __future__ import annotations

from dataclasses import dataclass

from lora_serve.adapters.memory_tier import MemoryTier


@dataclass
class Held:
    digest: str
    bytes: int


def test_versions_are_in_the_order_of_their_last_use() -> None:
    tier: MemoryTier[Held] = MemoryTier()
    a, b, c = (Held(digest, 10) for digest in "abc")
    for each in (a, b, c):
        tier.add(each)
    tier.touch(a)
    tier.remove(b)
    assert [each.digest for each in tier] == ["c", "a"]
    assert ("a" in tier, "b" in tier, len(tier), tier.bytes) == (True, False, 2, 20)


def test_touching_what_is_not_there_does_nothing() -> None:
    tier: MemoryTier[Held] = MemoryTier()
    tier.touch(Held("a", 10))
    assert (len(tier), tier.bytes) == (0, 0)


def test_a_version_gives_back_what_it_took_even_if_its_size_is_known_better_by_then() -> None:
    tier: MemoryTier[Held] = MemoryTier()
    a = Held("a", 10)
    tier.add(a)
    a.bytes = 12
    tier.remove(a)
    assert tier.bytes == 0
