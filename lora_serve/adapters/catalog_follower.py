"""Makes this replica serve what the catalog of a shared store says.

For every name the next step towards the newest catalog is decided from the state here, taken, and decided again, until
there is none: so a step may fail, be repeated or be overtaken by a newer catalog, and several catalogs later only the
last one counts. Versions are published through the same pipeline as uploads; what only this replica has (adapters of
folders, of sources, or from before there was a shared store) is left alone, unless the catalog has the name too.

Used by the engine's loop alone, and never blocks.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from lora_serve.adapters.catalog_steps import WAITING, CatalogSteps
from lora_serve.adapters.operation_queue import next_step
from lora_serve.adapters.publisher import Publisher, StagedVersion
from lora_serve.adapters.residency import Residency
from lora_serve.adapters.shared.catalog import Catalog, find_changed
from lora_serve.adapters.store.records import FollowedCatalog
from lora_serve.errors import AdapterInvalid, EngineFault, ServeError, TooLarge, Unavailable

LASTING = (AdapterInvalid, TooLarge)  # about a version: it would be the same again
MOST_STEPS = 200  # of one name towards one catalog, beyond which something is wrong

log = logging.getLogger(__name__)


class CatalogFollower:
    """What this replica has made of the catalog.

    Args:
        next_steps: what can be done about a name.
    """

    def __init__(self, next_steps: CatalogSteps, residency: Residency, publisher: Publisher) -> None:
        self._next_steps, self._residency, self._publisher = next_steps, residency, publisher
        self._active: set[str] = set()  # names of which a step is under way
        self._blocked: dict[str, ServeError] = {}  # names that wait for others, which are active
        self._failed: dict[str, ServeError] = {}
        self._holding = 0  # how often `_holding_blocked` is entered
        self._waiting: dict[str, list[Callable[[ServeError | None], None]]] = {}
        self._steps: Counter[str] = Counter()

    def __repr__(self) -> str:
        generation = "no catalog" if self.catalog is None else f"generation {self.catalog.generation}"
        return f"<CatalogFollower {generation}, {self.behind} behind>"

    @property
    def catalog(self) -> Catalog | None:
        """The newest one; None until there was one."""
        return self._next_steps.catalog

    @property
    def behind(self) -> int:
        """How many names are not, or not yet, what the catalog says."""
        return len(self._active | self._blocked.keys() | self._failed.keys())

    @property
    def settled(self) -> bool:
        """Whether no step is under way."""
        return not self._active

    @property
    def failures(self) -> dict[str, str]:
        """Name → why it is not what the catalog says."""
        return {name: error.message for name, error in sorted(self._failed.items())}

    def follow(self, catalog: Catalog) -> None:
        """Serve what a catalog says, unless a newer one is followed already."""
        before = self.catalog
        if before is not None and catalog.generation <= before.generation:
            return
        self._next_steps.catalog = catalog
        self._publisher.save_followed(FollowedCatalog(catalog.id, catalog.generation))
        names = find_changed(before, catalog) | self._failed.keys()
        if before is None:
            names |= self._next_steps.shared_names
        # Versions that aliases are about to name are kept from now on, and their adapters have to bring them.
        for alias in names & catalog.aliases.keys():
            if alias not in self._active:  # otherwise with its next step
                self._next_steps.prepare_alias(alias)
            names |= {target.name for target in catalog.aliases[alias].targets}
        self._advance_all(names)

    def retry(self, *, all_of_them: bool) -> None:
        """Try again what could not be fetched, or whatever failed and may succeed now."""
        self._next_steps.forget_failures(lambda error: _may_succeed(error, all_of_them))
        self._advance_all([name for name, error in self._failed.items() if _may_succeed(error, all_of_them)])

    def offer(self, staged: StagedVersion) -> None:
        """As `CatalogSteps.offer`."""
        self._next_steps.offer(staged)

    def wait(self, name: str, done: Callable[[ServeError | None], None]) -> None:
        """Call `done` once a name is what the catalog says, or with the reason for which it is not."""
        self._waiting.setdefault(name, []).append(done)
        self._advance(name)

    # --- order -------------------------------------------------------------------------------------------------------

    def _advance_all(self, names: Iterable[str]) -> None:
        """Take the next steps of names; one that has to wait for another does so."""
        with self._holding_blocked():
            for name in sorted(names):
                self._steps.pop(name, None)
                self._advance(name)
            self._advance_blocked()

    def _advance_blocked(self) -> None:
        for name in list(self._blocked):
            self._advance(name)

    def _advance(self, name: str) -> None:
        """Take the next step of a name, unless one is under way."""
        if name in self._active or self.catalog is None:
            return
        self._blocked.pop(name, None)
        try:
            step = self._next_steps.decide(name)
            if step is not None and self._steps[name] >= MOST_STEPS:
                raise EngineFault("it does not become what the shared store says")
        except ServeError as error:
            self._stop(name, error)
            return
        if step is None:
            self._end(name, self._next_steps.missing(name))
            return
        self._steps[name] += 1
        self._active.add(name)
        alias = self._residency.aliases.records.get(name)

        def on_done(result: object) -> None:
            self._active.discard(name)
            if isinstance(result, ServeError):
                self._stop(name, result)
                return
            with self._holding_blocked():
                self._advance(name)
                for target in () if alias is None else alias.targets:  # which may have versions less to keep
                    self._advance(target.name)
                self._advance_blocked()

        next_step(step, on_done)(on_done)

    def _stop(self, name: str, error: ServeError) -> None:
        """A step failed, or there can be none: perhaps until other names are what they have to be."""
        if isinstance(error, WAITING):
            self._blocked[name] = error
            self._end_blocked()
        else:
            self._end(name, error)

    @contextmanager
    def _holding_blocked(self) -> Iterator[None]:
        """Let names that wait for others go on waiting meanwhile, and then only if a step is under way."""
        self._holding += 1
        try:
            yield
        finally:
            self._holding -= 1
            self._end_blocked()

    def _end_blocked(self) -> None:
        if not self._active and not self._holding:
            blocked, self._blocked = self._blocked, {}
            for name, error in blocked.items():
                self._end(name, error)

    def _end(self, name: str, error: ServeError | None) -> None:
        """A name is what the catalog says, or cannot become it."""
        self._steps.pop(name, None)
        if error is None:
            self._failed.pop(name, None)
        else:
            before = self._failed.get(name)
            if before is None or before.message != error.message:
                log.warning("%s is not what the shared store says: %s", name, error.message)
            self._failed[name] = error
        for done in self._waiting.pop(name, []):
            done(error)
        self._end_blocked()


def _may_succeed(error: ServeError, or_others: bool) -> bool:
    """Whether what failed may succeed soon: the shared store was away, or it was something that does not last."""
    return isinstance(error, Unavailable) or (or_others and not isinstance(error, LASTING))
