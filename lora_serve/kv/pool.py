"""Pool of paged KV blocks: reference counts, a free list in LRU order, and the prefix cache's index of full blocks.

Bookkeeping only, no tensors. A free block keeps its content and stays in the prefix index until it is allocated again,
so a prefix can be reused for as long as memory allows. Block 0 is never allocated: it is the scratch block that unused
block-table entries point to.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b

import msgspec

_pack = msgspec.msgpack.Encoder().encode


def chain(parent: bytes, content: Sequence[int | float | str]) -> bytes:
    """Prefix-cache key, 16 bytes: a hash of the parent's key and of a full block's tokens, or of a name.

    The first parent is empty. Names of what KV depends on (a tenant, an adapter) are hashed before the first block that
    depends on them, so a block is found only by requests that would compute the same KV. A name's content begins with a
    string, a block's with a token id.
    """
    return blake2b(_pack(content), digest_size=16, key=parent[:64]).digest()


class BlockPool:
    """All KV blocks of the device.

    Args:
        blocks: number of blocks that can be allocated (ids 1..blocks).
        block_size: tokens per block.
    """

    def __init__(self, blocks: int, block_size: int) -> None:
        self.blocks = blocks
        self.block_size = block_size
        self._holders = [0] * (blocks + 1)
        self._free: OrderedDict[int, None] = OrderedDict((block, None) for block in range(1, blocks + 1))
        self._key: dict[int, bytes] = {}
        self._index: dict[bytes, int] = {}

    def __repr__(self) -> str:
        return (
            f"<BlockPool {self.used} used, {self.free} free, {len(self._index)} indexed, {self.block_size} tokens each>"
        )

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def used(self) -> int:
        return self.blocks - self.free

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """Blocks of the longest cached prefix of `keys`; call `hold` to use them."""
        found = []
        for key in keys:
            block = self._index.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def hold(self, blocks: Iterable[int]) -> None:
        """Take a reference to each of the blocks that `find` returned."""
        for block in blocks:
            if self._holders[block] == 0:
                del self._free[block]
            self._holders[block] += 1

    def free_after_holding(self, blocks: Iterable[int]) -> int:
        """Number of free blocks if `blocks` were held as well."""
        return self.free - sum(self._holders[block] == 0 for block in blocks)

    def allocate(self, count: int) -> list[int] | None:
        """Allocate `count` blocks, least recently used first, content undefined; None if too few are free."""
        if count > len(self._free):
            return None
        taken = []
        for _ in range(count):
            block, _ = self._free.popitem(last=False)
            self._unindex(block)
            self._holders[block] = 1
            taken.append(block)
        return taken

    def index(self, block: int, key: bytes) -> None:
        """Add a full, written block to the prefix index; no effect if the key has a block already."""
        if key not in self._index and block not in self._key:
            self._index[key] = block
            self._key[block] = key

    def release(self, blocks: Sequence[int], *, forget: bool = False) -> None:
        """Drop one reference to each block; with `forget`, also remove them from the prefix index (invalid content)."""
        for block in reversed(blocks):  # the end of a prefix is reused first: its beginning serves more requests
            if forget:
                self._unindex(block)
            self._holders[block] -= 1
            if self._holders[block] == 0:
                self._free[block] = None
                if block not in self._key:
                    self._free.move_to_end(block, last=False)

    def _unindex(self, block: int) -> None:
        key = self._key.pop(block, None)
        if key is not None:
            del self._index[key]
