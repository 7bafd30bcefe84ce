"""A bound on what lowering may allocate: a configuration of 500 bytes can ask for a rank of a million.

A format reserves each delta before it computes it, from shapes and configuration alone. The rank is bounded by the
site's own widths, since a higher one adds nothing to ΔW (small ones are harmless, and usual on small models), and
everything together by what host memory holds for adapters.
"""

from __future__ import annotations

from lora_serve.adapters.adapter import Site
from lora_serve.errors import AdapterInvalid

HARMLESS_RANK = 1024


class ElementBudget:
    """The number of elements that an adapter may have once lowered.

    Args:
        most: elements in all; more could never be served.

    Attributes:
        reserved: elements reserved so far.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self.reserved = 0

    def check_rank(self, site: Site, rank: float, field: str = "r") -> None:
        """Raise AdapterInvalid, naming the field that a rank comes from, if it is far too large for a site."""
        most = max(site.in_features, site.out_features, HARMLESS_RANK)
        if rank > most:
            raise AdapterInvalid(
                f"{field} = {rank:g} in adapter_config.json is too much for {site.name} "
                f"[{site.out_features}, {site.in_features}]: it is at most {most}"
            )

    def reserve(self, site: Site, rank: int, field: str = "r") -> None:
        """Reserve the delta of a site: A [rank, in] and B [rank, out], kept at rank min(in, out) if that is less.

        Raises AdapterInvalid if the rank is far too large, or if the adapter becomes too large.
        """
        self.check_rank(site, rank, field)
        width = site.in_features + site.out_features
        self.check(rank * width, field)
        self.reserved += min(rank, site.in_features, site.out_features) * width
        self.check(self.reserved, field)

    def check(self, elements: int, field: str = "r") -> None:
        """Raise AdapterInvalid if something on the way has more elements than the whole adapter may have."""
        if elements > self._most:
            raise AdapterInvalid(
                f"{field} in adapter_config.json makes an adapter of {elements} numbers; at most {self._most} are kept"
            )
