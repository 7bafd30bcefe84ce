"""Which KV block belongs to whom: reference counts, a free list in LRU order, and the prefix index over full blocks.

Plain bookkeeping, no tensors. A block that nobody holds any more keeps its content and its place in the prefix index
until it is handed out again, so a prefix stays reusable for as long as memory allows. Block 0 is never handed out: it
is the scratch block that unused block-table entries point to.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b

import msgspec

_pack = msgspec.msgpack.Encoder().encode


def chain(parent: bytes, content: Sequence[int | float | str]) -> bytes:
    """Key of what comes after `parent`: a full block's tokens, or a name of what its KV depends on. 16 bytes.

    The first parent is empty. Names (a tenant, an adapter) join before the first block that they matter to, so KV is
    only ever found by a request that would compute the very same values. They begin with a text, which no block does.
    """
    return blake2b(_pack(content), digest_size=16, key=parent[:64]).digest()


class BlockPool:
    """All KV blocks of the device.

    Args:
        blocks: how many may be handed out (block ids 1..blocks).
        block_size: tokens in one.
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
        """Blocks of the longest indexed beginning of `keys`; they are not held yet."""
        found = []
        for key in keys:
            block = self._index.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def hold(self, blocks: Iterable[int]) -> None:
        """Claim blocks that `find` returned."""
        for block in blocks:
            if self._holders[block] == 0:
                del self._free[block]
            self._holders[block] += 1

    def free_after_holding(self, blocks: Iterable[int]) -> int:
        """How many blocks would be free once `blocks` were held."""
        return self.free - sum(self._holders[block] == 0 for block in blocks)

    def allocate(self, count: int) -> list[int] | None:
        """`count` blocks of undefined content, least recently used first; None, and nothing taken, if too few."""
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
        """Make a full, written block findable. The first block under a key stays the one that is found."""
        if key not in self._index and block not in self._key:
            self._index[key] = block
            self._key[block] = key

    def release(self, blocks: Sequence[int], *, forget: bool = False) -> None:
        """Give up one hold on each; with `forget` their content is never found again (it may be wrong)."""
        for block in reversed(blocks):  # the end of a prefix goes first: its beginning serves more requests
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
