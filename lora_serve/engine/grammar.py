"""The state of a sequence's grammar: which tokens may come next, and whether it may end."""

from __future__ import annotations

from collections.abc import Set

from llguidance import LLMatcher
from numpy import int32, uint32
from numpy.typing import NDArray

from lora_serve.errors import BadRequest, EngineFault, ServeError
from lora_serve.request import Sampling


class GrammarMatcher:
    """A grammar and the tokens that it was advanced by; belongs to one sequence, whatever happens to its KV blocks.

    Attributes:
        native: llguidance's matcher.
        vocabulary: number of tokens that the masks cover; later ones are never allowed.
        eos_ids: tokens that llguidance allows where the grammar may end.

    Args:
        native: not shared with another sequence.
    """

    def __init__(self, native: LLMatcher, vocabulary: int, eos_ids: Set[int], sampling: Sampling) -> None:
        self.native = native
        self.vocabulary = vocabulary
        self.eos_ids = eos_ids
        self._ignore_eos = sampling.ignore_eos
        self._min_tokens = sampling.min_tokens
        self._field = sampling.grammar_field
        self._stops = frozenset(token for token in sampling.stop_token_ids if token < vocabulary)

    @property
    def complete(self) -> bool:
        """Whether the output matches and nothing can follow it."""
        return self.native.is_stopped() and not self.native.is_error()

    def advance(self, token: int) -> None:
        """Add a sampled token. Raises the `ServeError` that ends the sequence."""
        if not self.native.consume_token(token):
            raise self._failure()

    def check_length(self, generated: int) -> None:
        """Raise BadRequest if the output is complete with fewer than min_tokens tokens."""
        if self.complete and generated < self._min_tokens:
            raise self._ends_too_early()

    def force_tokens(self, most: int, stop_ids: Set[int]) -> list[int]:
        """Advance by the tokens that are the only continuation, at most `most` and up to a stop token; returns them."""
        forced = self.native.compute_ff_tokens()[:most]
        stop = next((i for i, token in enumerate(forced) if token in stop_ids), len(forced))
        return forced[: self.native.try_consume_tokens(forced[:stop])]

    def finish_mask(self, mask: NDArray[int32], generated: int) -> ServeError | None:
        """Allow the sequence's stop tokens exactly where it may end; returns the error if no token is allowed.

        Args:
            mask: [words], as llguidance computed it for this state; modified.
            generated: number of tokens generated so far.
        """
        if self.native.is_error():
            return self._failure()
        if self._ignore_eos or self._stops or generated < self._min_tokens:
            may_end = self.native.is_accepting()
            _set(mask, self._stops | self.eos_ids, False)
            if generated < self._min_tokens:
                if not mask.any():
                    return self._ends_too_early()
            elif may_end:
                _set(mask, self._stops if self._ignore_eos and mask.any() else self._stops | self.eos_ids, True)
        if not mask.any():
            return BadRequest("no token of this model can continue the output in this grammar", param=self._field)
        return None

    def _failure(self) -> ServeError:
        """Why llguidance's matcher failed: on a token that was not allowed, or on one of its limits."""
        if "satisfy" in self.native.get_error():
            return EngineFault("the output no longer matches the grammar")
        return BadRequest("the grammar is too complex", param=self._field)

    def _ends_too_early(self) -> ServeError:
        return BadRequest("the output that the grammar allows ends before min_tokens", param="min_tokens")


def _set(mask: NDArray[int32], tokens: Set[int], allowed: bool) -> None:
    """Set the bits of tokens."""
    bits = mask.view(uint32)
    for token in tokens:
        if allowed:
            bits[token // 32] |= uint32(1 << token % 32)
        else:
            bits[token // 32] &= uint32(0xFFFFFFFF ^ (1 << token % 32))
