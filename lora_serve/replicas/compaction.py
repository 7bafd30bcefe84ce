"""Which changes of a journal a replica that begins with nothing must make, in their order, to get where the others are.

Of most things that is the last change. Of an adapter it is the uploads of the newest versions, and of those that an
alias names; a version that is not among the newest ones stays at a replica only while an alias names it, so of aliases
it is also the changes by which they began to name it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from lora_serve.replicas.forwarding import ForwardedRequest, Headers

ADAPTERS, ALIASES = "/v1/adapters/", "/v1/aliases/"


@dataclass(frozen=True)
class KeptChange:
    """One change in the journal.

    Attributes:
        number: changes are made in this order.
        thing: what it is about, as a path.
        names: the version that it published (`name@digest`), or what the alias stands for since.
    """

    number: int
    thing: str
    method: str
    target: str
    headers: Headers = ()
    names: tuple[str, ...] = ()

    def request(self, body: bytes) -> ForwardedRequest:
        """The request that makes the change."""
        return ForwardedRequest(self.method, self.target, self.headers, body, change=self.number)

    @property
    def needs_adapter(self) -> bool:
        """Whether it is about adapters that must have been published: an alias's targets, a pin."""
        return self.method == "POST" or (self.method == "PUT" and self.thing.startswith(ALIASES))


def needed_changes(changes: Sequence[KeptChange], keep_versions: int) -> set[int]:
    """The numbers of the changes that must be kept.

    Args:
        changes: all, in order.
        keep_versions: versions of an adapter that a replica keeps, beside those that aliases name.
    """
    by_thing: dict[str, list[KeptChange]] = defaultdict(list)
    for change in changes:
        by_thing[change.thing].append(change)
    last = {thing: history[-1] for thing, history in by_thing.items()}
    named = {name for change in last.values() if change.needs_adapter for name in change.names}
    needed: set[int] = set()
    for thing, history in by_thing.items():
        lives = _split(history)
        kept = {last[thing].number}
        if thing.startswith(ALIASES):
            kept |= {number for life in lives for number in _began_to_name(life, named)}
        elif last[thing].method == "POST":
            adapter = last.get(thing.rpartition("/")[0])
            if adapter is not None and adapter.method == "DELETE" and adapter.number > last[thing].number:
                kept = set()  # the pin ended with the adapter
        else:
            kept |= {number for life in lives for number in _uploads_of(life, named)}
            kept |= _newest(lives[-1], keep_versions)
        for life in lives:  # what was deleted ends again
            if life[-1].method == "DELETE" and any(change.number in kept for change in life):
                kept.add(life[-1].number)
        needed |= kept
    return needed


def _split(history: Sequence[KeptChange]) -> list[list[KeptChange]]:
    """The changes of a thing, split after each deletion."""
    lives: list[list[KeptChange]] = [[]]
    for change in history:
        lives[-1].append(change)
        if change.method == "DELETE":
            lives.append([])
    return lives if lives[-1] else lives[:-1]


def _newest(life: Sequence[KeptChange], keep_versions: int) -> set[int]:
    """The last uploads of the newest versions; none if it ended with a deletion."""
    if life[-1].method == "DELETE":
        return set()
    latest = {change.names: change.number for change in life}
    return set(sorted(latest.values())[-keep_versions:])


def _uploads_of(life: Sequence[KeptChange], named: Collection[str]) -> set[int]:
    """The first and the last upload of what an alias names, a version or the adapter: it named one of them."""
    found: dict[str, list[int]] = defaultdict(list)
    for change in life:
        for name in (*change.names, change.thing.removeprefix(ADAPTERS)):
            if name in named and change.method != "DELETE":
                found[name].append(change.number)
    return {number for numbers in found.values() for number in (numbers[0], numbers[-1])}


def _began_to_name(life: Sequence[KeptChange], named: Collection[str]) -> set[int]:
    """The changes by which an alias began to name a version that is named still."""
    found, before = set(), set[str]()
    for change in life:
        names = set(change.names)
        if (names & set(named)) - before:
            found.add(change.number)
            before = names
    return found
