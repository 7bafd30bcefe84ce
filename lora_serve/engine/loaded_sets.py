"""Which of the adapter sets that sequences need are in memory, so that they can get device slots.

A set is looked up when it comes, when one of its adapters arrives, and before it is used: nothing iterates over all.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

from lora_serve.engine.fairness import AdapterSet
from lora_serve.engine.slot_rotation import SlotRotation

IsLoaded = Callable[[str], bool]  # whether an adapter (by digest) is in memory


class LoadedSets:
    """Lets those needed adapter sets take part in a slot rotation that are in memory.

    Args:
        needed: the adapter sets of all sequences.
    """

    def __init__(self, rotation: SlotRotation, needed: Callable[[], Collection[AdapterSet]]) -> None:
        self._rotation, self._needed = rotation, needed
        self._unloaded: dict[AdapterSet, None] = {}  # not known to be in memory
        self._unloaded_with: dict[str, set[AdapterSet]] = {}  # those of them that contain an adapter
        self._new: list[AdapterSet] = []  # those of them that were not looked up yet

    def __contains__(self, adapter_set: AdapterSet) -> bool:
        return adapter_set not in self._unloaded

    def add(self, adapter_set: AdapterSet) -> None:
        """Add a set that is needed from now on, not looked up yet."""
        self._mark(adapter_set)
        self._new.append(adapter_set)

    def remove(self, adapter_set: AdapterSet) -> None:
        """Remove a set that is not needed any more."""
        if adapter_set in self._unloaded:
            self._unmark(adapter_set)
        elif adapter_set:
            self._rotation.remove(adapter_set)

    def look_up(self, arrived: Iterable[str], is_loaded: IsLoaded) -> None:
        """Look up the sets that are new, and those of which adapters arrived in memory."""
        new, self._new = self._new, []
        self.check([*new, *(each for digest in arrived for each in self._unloaded_with.get(digest, ()))], is_loaded)

    def check(self, adapter_sets: Iterable[AdapterSet], is_loaded: IsLoaded) -> bool:
        """Look up sets; whether all of them are in memory."""
        needed = self._needed()
        for adapter_set in adapter_sets:
            if adapter_set not in needed:  # its last sequence left
                continue
            loaded, was_unloaded = all(map(is_loaded, adapter_set)), adapter_set in self._unloaded
            if loaded and was_unloaded:
                self._unmark(adapter_set)
                self._rotation.add(adapter_set)
            elif not loaded and not was_unloaded:
                self._mark(adapter_set)
                self._rotation.remove(adapter_set)
        return not any(adapter_set in self._unloaded for adapter_set in adapter_sets)

    def _mark(self, adapter_set: AdapterSet) -> None:
        self._unloaded[adapter_set] = None
        for digest in adapter_set:
            self._unloaded_with.setdefault(digest, set()).add(adapter_set)

    def _unmark(self, adapter_set: AdapterSet) -> None:
        del self._unloaded[adapter_set]
        for digest in adapter_set:
            self._unloaded_with[digest].remove(adapter_set)
            if not self._unloaded_with[digest]:
                del self._unloaded_with[digest]
