"""Which tokens the grammars of a step's sequences allow: one native call for all of them, while the device runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property

import torch
from llguidance import LLExecutor
from torch import Tensor

from lora_serve.engine.grammar import GrammarMatcher
from lora_serve.errors import ServeError

MOST_THREADS = 8

MaskOrError = Tensor | ServeError  # int32 [words], one bit per token
Masks = Callable[[], list[MaskOrError]]  # waits for masks being computed; one for each matcher


class TokenMasks:
    """Computes masks in threads of its own; these are started with the first grammar.

    Args:
        device: where the masks are used.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def start(self, matchers: Sequence[GrammarMatcher], generated: Sequence[int]) -> Masks:
        """Start to compute one mask per matcher. A matcher must not be advanced before its mask was waited for.

        Args:
            generated: number of tokens generated so far, for each.
        """
        words = -(-matchers[0].vocabulary // 32)
        masks = torch.empty(len(matchers), words, dtype=torch.int32, pin_memory=self._device.type == "cuda")

        def work() -> list[ServeError | None]:
            natives = [(matcher.native, row) for row, matcher in enumerate(matchers)]
            self._executor.unsafe_compute_mask_ptr(natives, masks.data_ptr(), 4 * words, len(natives))
            rows = masks.numpy()
            return [matcher.finish_mask(rows[i], generated[i]) for i, matcher in enumerate(matchers)]

        computing = self._thread.submit(work)

        def wait() -> list[MaskOrError]:
            errors = computing.result()
            on_device = masks.to(self._device, non_blocking=True)
            return [on_device[i] if error is None else error for i, error in enumerate(errors)]

        return wait

    @cached_property
    def _executor(self) -> LLExecutor:
        return LLExecutor(max(1, min(MOST_THREADS, torch.get_num_threads() // 2)))

    @cached_property
    def _thread(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(1, "token-masks")
