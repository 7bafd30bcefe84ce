"""The KV block pool: no block is leaked, and the prefix cache finds identical prefixes only."""

from __future__ import annotations

import random

from lora_serve.kv.pool import BlockPool, chain


def keys(tokens: list[int], size: int, root: bytes = b"root") -> list[bytes]:
    found, parent = [], root
    for start in range(0, len(tokens) - len(tokens) % size, size):
        parent = chain(parent, tokens[start : start + size])
        found.append(parent)
    return found


def test_each_block_is_allocated_once_and_the_scratch_block_never() -> None:
    pool = BlockPool(4, 16)
    blocks = pool.allocate(4)
    assert blocks is not None
    assert sorted(blocks) == [1, 2, 3, 4]
    assert pool.allocate(1) is None
    assert repr(pool) == "<BlockPool 4 used, 0 free, 0 indexed, 16 tokens each>"
    pool.release(blocks)
    assert pool.free == 4


def test_a_failed_allocation_has_no_effect() -> None:
    pool = BlockPool(3, 16)
    assert pool.allocate(5) is None
    assert pool.free == 3


def test_a_prefix_is_found_after_its_blocks_were_released() -> None:
    pool = BlockPool(4, 2)
    prefix = keys([1, 2, 3, 4], 2)
    blocks = pool.allocate(2) or []
    for block, key in zip(blocks, prefix, strict=True):
        pool.index(block, key)
    pool.release(blocks)
    assert pool.find(prefix) == blocks
    assert pool.find(keys([1, 2, 9, 9], 2)) == blocks[:1]
    assert pool.find(keys([1, 2, 3, 4], 2, root=b"another adapter")) == []


def test_the_end_of_a_prefix_is_reused_before_its_beginning() -> None:
    pool = BlockPool(3, 2)
    prefix = keys([1, 2, 3, 4, 5, 6], 2)
    blocks = pool.allocate(3) or []
    for block, key in zip(blocks, prefix, strict=True):
        pool.index(block, key)
    pool.release(blocks)
    assert pool.allocate(1) == [blocks[2]]
    assert pool.find(prefix) == blocks[:2]


def test_forgotten_content_is_never_found() -> None:
    pool = BlockPool(2, 2)
    prefix = keys([1, 2], 2)
    blocks = pool.allocate(1) or []
    pool.index(blocks[0], prefix[0])
    pool.release(blocks, forget=True)
    assert pool.find(prefix) == []


def test_shared_blocks_are_freed_by_their_last_holder() -> None:
    pool = BlockPool(2, 2)
    prefix = keys([1, 2], 2)
    blocks = pool.allocate(1) or []
    pool.index(blocks[0], prefix[0])
    pool.hold(pool.find(prefix))
    pool.release(blocks)
    assert pool.used == 1
    assert pool.free_after_holding(blocks) == 1
    pool.release(blocks)
    assert pool.used == 0


def test_random_operations_never_leak_a_block() -> None:
    rng = random.Random(1)
    pool = BlockPool(20, 2)
    held: list[list[int]] = []
    for _ in range(2000):
        if held and rng.random() < 0.5:
            pool.release(held.pop(rng.randrange(len(held))), forget=rng.random() < 0.2)
        else:
            prefix = keys([rng.randrange(2) for _ in range(2 * rng.randrange(1, 5))], 2)
            found = pool.find(prefix)
            if pool.free_after_holding(found) < len(prefix) - len(found):
                continue
            pool.hold(found)
            blocks = found + (pool.allocate(len(prefix) - len(found)) or [])
            assert len(set(blocks)) == len(blocks)
            for block, key in zip(blocks, prefix, strict=True):
                pool.index(block, key)
            held.append(blocks)
        assert pool.used == len({block for blocks in held for block in blocks})
    for blocks in held:
        pool.release(blocks)
    assert pool.free == 20
