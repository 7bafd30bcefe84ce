"""Recent output items: found by their own key only, and bounded."""

from __future__ import annotations

from lora_serve.api.openai.item_memory import ItemMemory


def item(id_: str, text: str = "x") -> dict[str, str]:
    return {"id": id_, "text": text}


def test_an_item_is_found_by_its_key_only() -> None:
    memory = ItemMemory()
    memory.remember("alice", [item("a"), item("b")])
    assert memory.find("alice", "a") == item("a")
    assert memory.find("bob", "a") is None
    assert memory.find("alice", "c") is None


def test_the_least_recently_used_items_of_a_key_are_forgotten() -> None:
    memory = ItemMemory(most_bytes=100)
    memory.remember("bob", [item("other")])
    memory.remember("alice", [item("a", "x" * 20), item("b", "x" * 20)])
    memory.find("alice", "a")
    memory.remember("alice", [item("c", "x" * 20)])
    assert [memory.find("alice", id_) is not None for id_ in "abc"] == [True, False, True]
    assert memory.find("bob", "other") is not None
    memory.remember("alice", [item("huge", "x" * 1000)])
    assert [memory.find("alice", id_) for id_ in ("a", "c", "huge")] == [None] * 3
