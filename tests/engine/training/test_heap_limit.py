"""What the allocator keeps of freed memory: given back when the process has grown by more than it may."""

from __future__ import annotations

from lora_serve.engine.training.heap_limit import LEAST, HeapLimit, growth, heap_bytes

MIB = 1 << 20


class Process:
    """A process that holds `live` bytes, and as many freed ones as were not given back."""

    def __init__(self) -> None:
        self.live, self.freed, self.given_back = 100 * MIB, 0, 0
        self.limit = HeapLimit(lambda: self.live + self.freed, self._give_back)

    def _give_back(self) -> None:
        self.freed = 0
        self.given_back += 1

    def quantum(self, freed: int) -> None:
        self.freed += freed
        self.limit.check(300 * MIB)


def test_freed_memory_is_given_back_only_when_there_is_much_of_it() -> None:
    process = Process()
    for _ in range(30):
        process.quantum(50 * MIB)
        assert process.freed <= 300 * MIB
    assert process.given_back == 4


def test_what_lives_on_is_not_taken_for_freed_memory() -> None:
    process = Process()
    process.live += 1000 * MIB
    for _ in range(3):
        process.quantum(0)
    assert process.given_back == 1
    process.live -= 1000 * MIB
    process.quantum(0)
    process.quantum(299 * MIB)
    assert process.given_back == 1


def test_where_the_system_does_not_say_nothing_happens() -> None:
    given_back: list[int] = []
    HeapLimit(lambda: None, lambda: given_back.append(1)).check(0)
    assert not given_back


def test_small_passes_are_not_counted_as_more_than_they_can_free() -> None:
    assert heap_bytes(MIB) == 4 * MIB
    assert heap_bytes(100 * MIB) == growth(100 * MIB) == LEAST
    assert heap_bytes(500 * MIB) == growth(500 * MIB) == 500 * MIB
