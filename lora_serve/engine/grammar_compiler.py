"""Compile grammars in threads beside the engine loop, with bounds on their size, time and states.

llguidance's own limits ("fuel") bound time and memory: of a compilation, and later of each step. A compilation recurses
as deep as the grammar's rules refer to each other, so the threads have large stacks. Compiled grammars are cached.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from queue import Empty, SimpleQueue

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from lora_serve.engine.grammar import GrammarMatcher
from lora_serve.errors import BadRequest, EngineFault, ServeError
from lora_serve.request import Sampling

THREADS = 2  # so that one slow grammar does not delay the others
STACK = 256 << 20  # bytes, of address space; a grammar of the greatest length has used a quarter of it
CACHED = 32
LONGEST_MESSAGE = 300  # characters

# A lexer's fuel is about 50 per µs of compilation and 14 per µs of a step, an item 0.05 µs, a state 1 to 2 kB.
LIMITS = LLParserLimits(
    initial_lexer_fuel=400_000,
    step_lexer_fuel=50_000,
    step_max_items=20_000,
    max_lexer_states=20_000,
    max_grammar_size=200_000,
    verbose_errors=False,
)

Done = Callable[["CompiledGrammar | ServeError"], None]


@dataclass(frozen=True)
class CompiledGrammar:
    """A grammar at its start, shared by all sequences that use it."""

    native: LLMatcher
    tokenizer: LLTokenizer

    def matcher(self, sampling: Sampling) -> GrammarMatcher:
        """The state of a new sequence."""
        return GrammarMatcher(
            self.native.deep_copy(), self.tokenizer.vocab_size, frozenset(self.tokenizer.eos_tokens), sampling
        )


class GrammarCompiler:
    """Compiles grammars; the engine loop collects the results with `poll`.

    Args:
        load_tokenizer: called once, in a thread, with the first grammar. Raises a `ServeError` if there is none.
        wake: called from a thread when a result is ready for `poll`.
    """

    def __init__(self, load_tokenizer: Callable[[], LLTokenizer], wake: Callable[[], None]) -> None:
        self._load_tokenizer = load_tokenizer
        self._wake = wake
        self._tokenizer: LLTokenizer | ServeError | None = None
        self._loading = threading.Lock()
        self._queue: SimpleQueue[str | None] = SimpleQueue()
        self._finished: SimpleQueue[tuple[str, CompiledGrammar | ServeError]] = SimpleQueue()
        self._waiting: dict[str, list[Done]] = {}
        self._cache: OrderedDict[str, CompiledGrammar | ServeError] = OrderedDict()  # least recently used first
        self._threads: list[threading.Thread] = []

    def compile(self, grammar: str, done: Done) -> None:
        """Compile a grammar; `poll` passes the result, or the error that refuses it, to `done`."""
        if grammar in self._cache:
            self._cache.move_to_end(grammar)
            done(self._cache[grammar])
            return
        if not self._threads:
            self._threads = _start_threads(self._work)
        is_new = grammar not in self._waiting
        self._waiting.setdefault(grammar, []).append(done)
        if is_new:  # queued last: a thread leaves out what nobody waits for
            self._queue.put(grammar)

    def cancel(self, grammar: str, done: Done) -> None:
        """Forget who waits for a grammar; one that nobody waits for any more is not compiled."""
        waiting = self._waiting.get(grammar, [])
        if done in waiting:
            waiting.remove(done)
        if not waiting:
            self._waiting.pop(grammar, None)

    def poll(self) -> bool:
        """Pass on the results that are ready, in the calling thread; returns whether there were any."""
        any_ = False
        while True:
            try:
                grammar, result = self._finished.get_nowait()
            except Empty:
                return any_
            any_ = True
            self._cache[grammar] = result
            if len(self._cache) > CACHED:
                self._cache.popitem(last=False)
            for done in self._waiting.pop(grammar, ()):
                done(result)

    def close(self) -> None:
        """Wait for running compilations and drop queued ones."""
        while True:
            try:
                self._queue.get_nowait()
            except Empty:
                break
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while (grammar := self._queue.get()) is not None:
            if grammar not in self._waiting:
                continue  # cancelled
            try:
                result: CompiledGrammar | ServeError = self._compile(grammar)
            except ServeError as error:
                result = error
            except Exception as error:  # a bug: report it, keep the thread alive
                result = EngineFault(f"the grammar could not be compiled ({type(error).__name__})")
            self._finished.put((grammar, result))
            self._wake()

    def _compile(self, grammar: str) -> CompiledGrammar:
        with self._loading:
            if self._tokenizer is None:
                try:
                    self._tokenizer = self._load_tokenizer()
                except ServeError as error:
                    self._tokenizer = error
        if isinstance(self._tokenizer, ServeError):
            raise self._tokenizer
        native = LLMatcher(self._tokenizer, grammar, log_level=0, limits=LIMITS)
        if not native.is_error():
            native.compute_bitmask()  # builds the lexer's first states, which all copies share
        if native.is_error():
            raise BadRequest(f"the grammar is refused: {_message(native.get_error())}")
        return CompiledGrammar(native, self._tokenizer)


def _message(text: str) -> str:
    """An error of llguidance without what it shows of its own state."""
    shown = text.partition("\n<")[0].partition("<backtrace>")[0].strip()
    return "it allows no output" if shown.startswith("NoExtension") else shown[:LONGEST_MESSAGE]


def _start_threads(work: Callable[[], None]) -> list[threading.Thread]:
    threads = [threading.Thread(target=work, name=f"grammar-{i}", daemon=True) for i in range(THREADS)]
    default = threading.stack_size(STACK)
    try:
        for thread in threads:
            thread.start()
    finally:
        threading.stack_size(default)
    return threads
