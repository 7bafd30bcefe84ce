"""Sequences with grammars: what they generate matches, and nothing changes for the others."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from ascii_tokenizer import EOS, ascii_tokenizer
from engine_session import Session
from llguidance import LLMatcher, LLTokenizer

from lora_serve.engine.grammar_compiler import GrammarCompiler
from lora_serve.errors import Unavailable
from lora_serve.messages import Abort
from lora_serve.request import Admitted, Finished, Tokens

Start = Callable[..., Session]

TOKENIZER = ascii_tokenizer()
SCHEMAS: list[dict[str, Any]] = [
    {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 5}, "ok": {"type": "boolean"}},
        "required": ["name", "ok"],
        "additionalProperties": False,
    },
    {"type": "array", "items": {"enum": ["a", 7, None, True]}, "minItems": 1, "maxItems": 3},
    {"type": "integer", "minimum": 3, "maximum": 123},
    {"anyOf": [{"const": {"name": [1.5]}}, {"type": "string", "format": "date"}]},
]
PROMPT = [5, 9, 33]


def schema(value: dict[str, Any]) -> str:
    return LLMatcher.grammar_from_json_schema(json.dumps(value), overrides={"whitespace_flexible": False})


def regex(pattern: str) -> str:
    return LLMatcher.grammar_from_regex(pattern)


def ids(text: str) -> list[int]:
    found: list[int] = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    return found


@pytest.fixture(scope="module")
def start() -> Iterator[Start]:
    """Starts engines whose base has a tokenizer."""
    started: list[Session] = []

    def start(folder: Path, **options: Any) -> Session:
        TOKENIZER.save_pretrained(folder / "base")
        started.append(Session(folder, **{"max_model_len": 96, "threads": 1, **options}))
        return started[-1]

    yield start
    for each in started:
        each.engine.close()


@pytest.fixture(scope="module", params=[False, True], ids=["synchronous", "overlapped"])
def shared(tmp_path_factory: pytest.TempPathFactory, start: Start, request: pytest.FixtureRequest) -> Session:
    return start(tmp_path_factory.mktemp("engine"), overlap=request.param)


@pytest.fixture
def engine(shared: Session) -> Session:
    shared.events.clear()
    return shared


def text(session: Session, id: str) -> str:
    found: str = TOKENIZER.decode(session.tokens(id))
    return found


def ask(engine: Session, id: str, grammar: str, **sampling: Any) -> str:
    """Run a request with a grammar to its end; returns its text."""
    engine.send(id, PROMPT, grammar=grammar, **{"ignore_eos": False, "max_tokens": 60, **sampling})
    engine.run()
    return text(engine, id)


MIXED: dict[str, dict[str, Any]] = {
    f"{kind} {number}": {"grammar": grammar, "temperature": temperature, "seed": number, "ignore_eos": False}
    for number, grammar in enumerate([*map(schema, SCHEMAS), regex(r"(na|me){3,6}!"), None])
    for kind, temperature in (("greedy", 0.0), ("sampled", 0.9))
}


def penalised(options: dict[str, Any]) -> dict[str, Any]:
    return options | {"repetition_penalty": 1.2, "logit_bias": {ids('"')[0]: 3.0}, "top_p": 0.9, "logprobs": 1}


def outputs(session: Session) -> dict[str, Any]:
    return {id: (session.tokens(id), session.end(id).reason, session.end(id).stop_token) for id in session.events}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_row_of_a_mixed_batch_generates_what_it_does_alone(tmp_path: Path, start: Start, dtype: str) -> None:
    requests = MIXED | {f"{id} penalised": penalised(options) for id, options in MIXED.items()}
    found = []
    for overlap in (False, True):
        together = start(tmp_path / str(overlap), overlap=overlap, dtype=dtype, max_num_batched_tokens=64)
        for id, options in requests.items():
            together.send(id, PROMPT, max_tokens=40, **options)
        together.run()
        found.append(outputs(together))
    together_alone = start(tmp_path / "alone", dtype=dtype)
    for id, options in requests.items():
        together_alone.send(id, PROMPT, max_tokens=40, **options)
        together_alone.run()
    found.append(outputs(together_alone))
    assert found[0] == found[1] == found[2]
    for id in requests:
        number = int(id.split()[1])
        if number < len(SCHEMAS) and found[0][id][1] == "stop":
            jsonschema.validate(json.loads(text(together_alone, id)), SCHEMAS[number])
    assert sum(reason == "stop" for _, reason, _ in found[0].values()) > len(requests) // 2


@pytest.mark.parametrize("overlap", [False, True])
def test_preemption_changes_nothing(tmp_path: Path, start: Start, overlap: bool) -> None:
    roomy, tight = (
        start(tmp_path / str(blocks), overlap=overlap, kv_cache_memory=768 * 4 * blocks, max_model_len=64)
        for blocks in (100, 17)
    )
    for each in (roomy, tight):
        for id, options in MIXED.items():
            each.send(id, PROMPT, max_tokens=40, **options)
        each.run()
    assert tight.engine.stats().preemptions_total > 0
    assert outputs(roomy) == outputs(tight)


def test_a_complete_output_ends_the_sequence_without_another_step(engine: Session) -> None:
    assert ask(engine, "a", regex("name")) == "name"
    assert (engine.end("a").reason, engine.end("a").stop_token) == ("stop", None)


def test_eos_is_allowed_exactly_where_the_grammar_may_end(engine: Session) -> None:
    wants_to_end = {"logit_bias": {EOS: 100.0}}
    assert ask(engine, "a", regex("(abc)+"), **wants_to_end) == "abc"
    assert engine.end("a").stop_token == EOS


def test_so_are_the_request_s_own_stop_tokens(engine: Session) -> None:
    (z,) = ids("z")
    wants = {"stop_token_ids": (z,), "logit_bias": {z: 100.0}}
    assert ask(engine, "a", regex("(abc)+"), **wants) == "abc"
    assert engine.end("a").stop_token == z
    assert ask(engine, "b", regex("a[yz]c"), **wants) == "ayc"


def test_with_ignore_eos_a_sequence_ends_where_the_grammar_must(engine: Session) -> None:
    wants = {"ignore_eos": True, "logit_bias": {EOS: 100.0}}
    assert ask(engine, "a", regex("a{5}"), **wants) == "aaaaa"
    assert engine.end("a").reason == "stop"
    assert len(ask(engine, "b", regex("a*"), **wants, max_tokens=9)) == 9
    assert engine.end("b").reason == "length"


def test_a_grammar_that_must_end_before_min_tokens_is_an_error_of_that_request(engine: Session) -> None:
    engine.send("beside", PROMPT, max_tokens=12)
    for id, pattern in (("a", "abc"), ("b", "abc(d{9})?"), ("c", "(abc)+"), ("d", "(abc)*")):
        engine.send(id, PROMPT, grammar=regex(pattern), min_tokens=6, logit_bias={EOS: 100.0}, ignore_eos=False)
    engine.run()
    failure = engine.end("a").failure
    assert failure is not None
    assert (failure.kind, failure.param) == ("bad_request", "min_tokens")
    assert text(engine, "c") == text(engine, "d") == "abcabc"
    assert text(engine, "b") == "abcddddd"  # cut at max_tokens
    assert len(engine.tokens("beside")) == 12


def test_a_grammar_that_the_vocabulary_cannot_spell_is_an_error_of_that_request(engine: Session) -> None:
    engine.send("beside", PROMPT, max_tokens=12)
    ask(engine, "a", regex("aX"), grammar_field="guided_regex")
    failure = engine.end("a").failure
    assert failure is not None
    assert (failure.kind, failure.param) == ("bad_request", "guided_regex")
    assert len(engine.tokens("beside")) == 12
    assert engine.blocks_used == 0


@pytest.mark.parametrize(
    "grammar", [regex("("), "start: %%%", "{}", "", schema({"type": "wombat"}), schema({"not": {}})]
)
def test_a_grammar_that_cannot_be_compiled_refuses_its_request_only(engine: Session, grammar: str) -> None:
    engine.send("beside", PROMPT, max_tokens=12)
    ask(engine, "a", grammar, grammar_field="guided_json")
    failure = engine.refusal("a")
    assert (failure.kind, failure.param) == ("bad_request", "guided_json")
    assert len(failure.message) < 400
    assert "panic" not in failure.message
    assert len(engine.tokens("beside")) == 12


def test_a_request_is_admitted_when_its_grammar_is_compiled_and_may_leave_before(engine: Session) -> None:
    engine.send("leaves", PROMPT, grammar=regex("na+me"))
    engine.engine.receive(Abort("leaves"))
    engine.send("stays", PROMPT, grammar=regex("na+me"))
    assert engine.engine.stats().waiting == 1
    engine.run()
    assert [type(event) for event in engine.events["leaves"]] == [Finished]
    assert isinstance(engine.events["stays"][0], Admitted)
    assert engine.end("stays").reason in ("stop", "length")


def test_log_probabilities_are_the_model_s_own(engine: Session) -> None:
    free = session_logprobs(engine, "free")
    bound = session_logprobs(engine, "bound", grammar=regex("[^a]*"))
    assert free[0][1] == bound[0][1]  # the likeliest tokens at the first position, masked or not


def session_logprobs(engine: Session, id: str, **options: Any) -> list[tuple[int, list[tuple[int, float]]]]:
    engine.send(id, PROMPT, logprobs=5, max_tokens=1, **options)
    engine.run()
    first = next(event for event in engine.events[id] if isinstance(event, Tokens))
    return [(each.token, each.top) for each in first.logprobs or []]


def test_a_base_without_a_tokenizer_refuses_grammars_only(tmp_path: Path) -> None:
    plain = Session(tmp_path)
    plain.send("a", PROMPT, grammar=regex("a"), grammar_field="guided_regex")
    plain.send("b", PROMPT)
    plain.run()
    assert plain.refusal("a").param == "guided_regex"
    assert plain.end("b").reason == "length"
    plain.engine.close()


FORCED = regex("(cat|dog): name name name name name(!|z)")


def steps_of(engine: Session, id: str, grammar: str, **sampling: Any) -> int:
    """Steps that computed something for one request run alone."""
    before = engine.engine.stats().steps_total
    ask(engine, id, grammar, **sampling)
    return engine.engine.stats().steps_total - before


def test_forced_tokens_are_not_sampled_one_by_one(engine: Session) -> None:
    steps = steps_of(engine, "a", FORCED)
    assert text(engine, "a")[3:-1] == ": name name name name name"
    assert engine.end("a").reason == "stop"
    assert steps < len(engine.tokens("a")) // 2


def test_forced_tokens_are_sampled_where_log_probabilities_are_wanted(engine: Session) -> None:
    steps = steps_of(engine, "a", FORCED, logprobs=1)
    listed = [each.token for event in engine.events["a"] if isinstance(event, Tokens) for each in event.logprobs or []]
    assert listed == engine.tokens("a")
    assert steps >= len(listed)


@pytest.mark.parametrize("most", [1, 2, 5])
def test_forced_tokens_end_at_max_tokens(engine: Session, most: int) -> None:
    ask(engine, "a", FORCED, max_tokens=most)
    assert len(engine.tokens("a")) == most
    assert engine.end("a").reason == "length"


def test_forced_tokens_end_before_a_stop_token(engine: Session) -> None:
    (blank,) = ids(" ")
    ask(engine, "a", FORCED, stop_token_ids=(blank,), grammar_field="guided_regex")
    assert text(engine, "a")[3:] == ":"
    failure = engine.end("a").failure  # nothing but the stop token can follow, where the grammar may not end
    assert failure is not None
    assert failure.param == "guided_regex"


def test_the_kv_of_forced_tokens_is_found_again(engine: Session) -> None:
    first = ask(engine, "a", FORCED)
    again = PROMPT + engine.tokens("a")
    engine.send("b", again, max_tokens=3)
    engine.run()
    found = next(event for event in engine.events["b"] if isinstance(event, Tokens))
    assert found.cached >= len(again) - 8
    engine.send("c", [4, *again], max_tokens=3)
    engine.send("d", [4, *again], max_tokens=3, prompt_logprobs=0)  # computed, not looked up
    engine.run()
    assert engine.tokens("c") == engine.tokens("d")
    assert first == text(engine, "a")


def test_a_grammar_that_nobody_waits_for_any_more_is_not_compiled() -> None:
    begun = threading.Event()
    release = threading.Event()
    compiled: list[None] = []

    def load_tokenizer() -> LLTokenizer:
        begun.set()
        release.wait(10)
        raise Unavailable("no tokenizer")

    compiler = GrammarCompiler(load_tokenizer, lambda: compiled.append(None))
    answers: list[str] = []
    waiting = {f'start: "{n}"': (lambda result, n=n: answers.append(str(n))) for n in range(50)}
    for grammar, done in waiting.items():
        compiler.compile(grammar, done)
    begun.wait(10)
    for grammar, done in list(waiting.items())[2:]:  # the first two are being compiled
        compiler.cancel(grammar, done)
    late: list[Any] = []
    compiler.compile('start: "late"', late.append)
    release.set()
    deadline = time.monotonic() + 10
    while not late and time.monotonic() < deadline:
        compiler.poll()
    assert isinstance(late[0], Unavailable)
    compiler.close()
    compiler.poll()
    assert sorted(answers) == ["0", "1"]
    assert len(compiled) == 3


def test_no_grammar_is_lost_by_a_thread_that_takes_it_at_once() -> None:
    def load_tokenizer() -> LLTokenizer:
        raise Unavailable("no tokenizer")

    compiler = GrammarCompiler(load_tokenizer, lambda: None)
    compiler._waiting = SlowToAdd()
    answers: list[Any] = []
    for number in range(5):
        compiler.compile(f'start: "{number}"', answers.append)
    deadline = time.monotonic() + 10
    while len(answers) < 5 and time.monotonic() < deadline:
        compiler.poll()
    compiler.close()
    assert len(answers) == 5


class SlowToAdd(dict[str, Any]):
    """Another thread may run before an entry is there."""

    def setdefault(self, key: str, default: Any = None) -> Any:
        time.sleep(0.02)
        return super().setdefault(key, default)
