"""Training data as tokens: the loss is on what the server would have to generate, and on nothing else."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any, Literal

import pytest
from chat_templates import CONVERSATION, TEMPLATES, TOOLS, render, tool_call, written_reply
from stub_completions import StubCompletionApp, byte_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from lora_serve.api.fine_tuning.example_encoder import EncodedSequence, ExampleEncoder, PreferencePair
from lora_serve.api.fine_tuning.example_lines import InvalidExamples, parse_example
from lora_serve.errors import BadRequest

SPECIAL = ["<s>", "<|im_start|>", "<|im_end|>"]
TEXTS = ["How are you today? I am fine, and how are you?\n\nWell, thank you for asking.", "user\nassistant\nsystem\n"]
CHATML = """
{%- for m in messages -%}
{%- if m.role == 'assistant' -%}
{{ '<|im_start|>assistant\n' }}{% generation %}{{ m.content }}
{%- for call in m.tool_calls or [] %}[{{ call.function.name + call.function.arguments | tojson }}]{% endfor -%}
{{ '<|im_end|>' }}{% endgeneration %}{{ '\n' }}
{%- else -%}
{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif -%}
"""
UNMARKED = CHATML.replace("{% generation %}", "").replace("{% endgeneration %}", "")
QWEN3 = (Path(__file__).parent / "templates" / "qwen3.jinja").read_text()
LAST_QUESTION = "{{ (messages | selectattr('role', 'equalto', 'user') | list)[-1].content }}{{ '\n' }}"

DIALOGUE = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "How are you?"},
    {"role": "assistant", "content": "\n\n I am fine. ", "weight": 1},
    {"role": "user", "content": "And today?"},
    {"role": "assistant", "content": "Fine, today", "weight": 0},
    {"role": "user", "content": "Thank you\n"},
    {"role": "assistant", "content": "For asking?"},
]


@cache
def tokenizer(template: str | None = UNMARKED, *, kind: Literal["bytes", "words"] = "bytes") -> PreTrainedTokenizerFast:
    """A small BPE: of bytes as GPT-2's, in which line breaks and spaces merge, or of words as Llama's, with BOS."""
    backend = Tokenizer(models.BPE())
    if kind == "bytes":
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
        backend.decoder = decoders.Metaspace()
        alphabet = sorted({*"".join(TEXTS), "▁"} - {" "})
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(TEXTS * 3, trainer)
    if kind == "words":
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", chat_template=template)


END = 2


def encoder(tokenizer: Any, most: int = 1000, assistants: Literal["all", "last"] = "all") -> ExampleEncoder:
    return ExampleEncoder(tokenizer, end_tokens=[END], most_tokens=most, assistants=assistants)


def encode(encoder: ExampleEncoder, **line: Any) -> EncodedSequence:
    encoded = encoder.encode(parse_example(json.dumps(line).encode()))
    assert isinstance(encoded, EncodedSequence)
    return encoded


def trained_texts(sequence: EncodedSequence, tokenizer: Any) -> list[str]:
    """The pieces that the loss is on, as texts."""
    pieces: list[list[int]] = [[]]
    for token, weight in zip(sequence.tokens, sequence.weights, strict=True):
        if weight:
            pieces[-1].append(token)
        elif pieces[-1]:
            pieces.append([])
    return [tokenizer.decode(piece) for piece in pieces if piece]


# --- chat ------------------------------------------------------------------------------------------------------------


def of_transformers(messages: list[dict[str, Any]]) -> tuple[list[int], list[int]]:
    """Tokens, and mask of the assistant's, by transformers and a template that marks what is generated."""
    found = tokenizer(CHATML).apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    return found["input_ids"], found["assistant_masks"]


@pytest.mark.parametrize("template", [CHATML, UNMARKED], ids=["marked", "unmarked"])
def test_the_loss_is_where_transformers_masks_generated_tokens(template: str) -> None:
    messages = [{key: message[key] for key in ("role", "content")} for message in DIALOGUE]
    messages[2]["content"] = "I am fine."  # so that no token reaches across its beginning
    encoded = encode(encoder(tokenizer(template)), messages=messages)
    assert (encoded.tokens, encoded.weights) == of_transformers(messages)
    assert trained_texts(encoded, tokenizer()) == [
        "I am fine.<|im_end|>",
        "Fine, today<|im_end|>",
        "For asking?<|im_end|>",
    ]


def test_weight_0_is_context() -> None:
    for template in (CHATML, UNMARKED):
        encoded = encode(encoder(tokenizer(template)), messages=DIALOGUE)
        assert trained_texts(encoded, tokenizer()) == ["\n\n I am fine. <|im_end|>", "For asking?<|im_end|>"]


def test_marks_that_are_not_one_for_each_reply_are_not_relied_on() -> None:
    twice = CHATML.replace("{{ m.content }}", "{{ m.content }}{% endgeneration %}{{ '!' }}{% generation %}")
    encoded = encode(encoder(tokenizer(twice)), messages=DIALOGUE)
    assert trained_texts(encoded, tokenizer()) == ["\n\n I am fine. !<|im_end|>", "For asking?!<|im_end|>"]


@pytest.mark.parametrize("template", [CHATML, UNMARKED], ids=["marked", "unmarked"])
def test_only_the_last_reply_may_be_learnt(template: str) -> None:
    encoded = encode(encoder(tokenizer(template), assistants="last"), messages=DIALOGUE)
    assert trained_texts(encoded, tokenizer()) == ["For asking?<|im_end|>"]


async def test_what_comes_before_a_reply_is_what_the_server_makes_of_these_messages(tmp_path: Path) -> None:
    server = StubCompletionApp(tmp_path, tokenizer=tokenizer(), context=1000)
    encoded = encode(encoder(tokenizer()), messages=DIALOGUE)
    for index in (2, 6):
        sent = [{key: message[key] for key in ("role", "content")} for message in DIALOGUE[:index]]
        assert (await server.chat(messages=sent, max_tokens=1)).status_code == 200
        prompt = server.engine.requests[-1].prompt
        assert encoded.tokens[: len(prompt)] == prompt
        assert encoded.weights[len(prompt) - 1 : len(prompt) + 1] == [0, 1]


def test_calls_of_tools_are_learnt() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "how", "arguments": '{"a": 1}'}}
    messages = [
        {"role": "user", "content": "How?"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "fine"},
        {"role": "assistant", "content": "Fine."},
    ]
    function = {"name": "how", "parameters": {"type": "object", "properties": {}}}
    for tools in ({"tools": [{"type": "function", "function": function}]}, {"functions": [function]}):
        encoded = encode(encoder(tokenizer()), messages=messages, **tools)
        assert trained_texts(encoded, tokenizer()) == ['[how{"a": 1}]<|im_end|>', "Fine.<|im_end|>"]


@pytest.mark.parametrize("name", sorted(TEMPLATES))
@pytest.mark.parametrize(
    "message", [{"content": "Sunny."}, {"content": None, "tool_calls": [tool_call("get_weather", '{"at": "x"}')]}]
)
def test_of_every_family_s_template_the_reply_is_learnt_and_nothing_before_it(
    name: str, message: dict[str, Any]
) -> None:
    base = byte_tokenizer(bos=True, template=TEMPLATES[name])
    tokens = ExampleEncoder(base, end_tokens=[257], most_tokens=5000)
    line = {"messages": [*CONVERSATION, {"role": "assistant", **message}], "tools": TOOLS}
    if name == "qwq":  # whose prompt begins a reasoning that these messages do not have
        with pytest.raises(BadRequest, match=r"messages\.1"):
            encode(tokens, **line)
        return
    encoded = encode(tokens, **line)
    (learnt,) = trained_texts(encoded, base)
    prompt = render(name, CONVERSATION, add_generation_prompt=True)
    assert base.decode(encoded.tokens) == prompt + learnt
    assert learnt.startswith(written_reply(name, message))
    assert encoded.tokens[-1] == 257


def test_a_template_that_rewrites_earlier_turns_is_refused_by_name_but_for_the_last_reply() -> None:
    with pytest.raises(BadRequest, match=r"messages\.2: the base's chat template writes .* otherwise") as refused:
        encode(encoder(tokenizer(QWEN3)), messages=DIALOGUE)
    assert refused.value.param == "messages.2"
    encoded = encode(encoder(tokenizer(QWEN3), assistants="last"), messages=DIALOGUE)
    assert trained_texts(encoded, tokenizer()) == ["<think>\n\n</think>\n\nFor asking?<|im_end|>"]


def test_a_template_that_writes_no_replies_is_trained_on_what_the_server_would_generate() -> None:
    base = tokenizer(LAST_QUESTION)
    encoded = encode(encoder(base), messages=[DIALOGUE[1], DIALOGUE[6]])
    assert base.decode(encoded.tokens) == "How are you?\nFor asking?<|im_end|>"
    assert trained_texts(encoded, base) == ["For asking?<|im_end|>"]
    with pytest.raises(BadRequest, match=r"messages\.2"):
        encode(encoder(base), messages=DIALOGUE)


def test_a_reply_without_an_end_token_gets_one_at_the_end_of_the_conversation() -> None:
    base = byte_tokenizer()  # its template ends a message with |
    encoded = encode(ExampleEncoder(base, end_tokens=[257], most_tokens=1000), messages=[DIALOGUE[1], DIALOGUE[6]])
    assert trained_texts(encoded, base) == ["For asking?|</s>"]


def test_what_a_template_raises_is_told_and_a_base_without_one_is_refused() -> None:
    strict = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(BadRequest, match="roles must alternate"):
        encode(encoder(tokenizer(strict)), messages=DIALOGUE)
    with pytest.raises(BadRequest, match="no chat template"):
        encode(encoder(tokenizer(None)), messages=DIALOGUE)


def test_a_conversation_of_thousands_of_replies_is_refused_before_it_takes_minutes() -> None:
    turns = [{"role": "user", "content": "How? " * 100}, {"role": "assistant", "content": "Fine. " * 100}]
    with pytest.raises(BadRequest, match="too many replies"):
        encode(encoder(tokenizer()), messages=turns * 500)


# --- completions and preferences -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ("How are you?", " I am fine."),
        ("How are you?\n", "\nI am fine."),  # \n\n is one token
        ("How are y", "ou today?"),  # and so are words
        ("How are you? ", "I am fine."),  # and a space and a word
        ("", "I am fine."),
    ],
)
def test_a_completion_is_learnt_after_the_tokens_of_its_prompt(prompt: str, completion: str) -> None:
    base = tokenizer()
    encoded = encode(encoder(base), prompt=prompt, completion=completion)
    given = base(prompt)["input_ids"]
    assert encoded.tokens[: len(given)] == given
    assert base.decode(encoded.tokens) == f"{prompt}{completion}<|im_end|>"
    count = len(encoded.tokens)
    assert encoded.weights == [0.0] * max(1, len(given)) + [1.0] * (count - max(1, len(given)))


def test_a_completion_may_bring_its_own_end_token() -> None:
    encoded = encode(encoder(tokenizer()), prompt="How?\n", completion="Fine.<|im_end|>")
    assert encoded.tokens.count(END) == 1
    assert encoded.tokens[-1] == END


def test_bos_comes_first_as_in_completions() -> None:
    base = tokenizer(kind="words")
    encoded = encode(encoder(base), prompt="How are you?", completion=" I am fine")
    given = base("How are you?")["input_ids"]
    assert given[0] == 0
    assert encoded.tokens[: len(given)] == given
    assert trained_texts(encoded, base) == ["I am fine<|im_end|>"]


def test_a_completion_that_begins_within_a_word_is_refused_where_pieces_would_be_other_texts() -> None:
    with pytest.raises(BadRequest, match="cannot be told where the reply begins"):
        encode(encoder(tokenizer(kind="words")), prompt="How are y", completion="ou today?")


def preference(chosen: str, rejected: str, prompt: str = "How are you?") -> dict[str, Any]:
    return {
        "input": {"messages": [{"role": "user", "content": prompt}]},
        "preferred_output": [{"role": "assistant", "content": chosen}],
        "non_preferred_output": [{"role": "assistant", "content": rejected}],
    }


@pytest.mark.parametrize("template", [CHATML, UNMARKED], ids=["marked", "unmarked"])
@pytest.mark.parametrize("chosen", ["I am fine.", "\n\nfine"])
def test_a_preference_is_two_replies_to_one_prompt(template: str, chosen: str) -> None:
    base = tokenizer(template)
    line = json.dumps(preference(chosen, "Well."))
    pair = encoder(base).encode(parse_example(line.encode()))
    assert isinstance(pair, PreferencePair)
    assert [trained_texts(each, base) for each in pair] == [[f"{chosen}<|im_end|>"], ["Well.<|im_end|>"]]
    if template == UNMARKED:
        prompts = [each.tokens[: each.weights.index(1.0)] for each in pair]
        assert prompts[0] == prompts[1]


# --- lengths ---------------------------------------------------------------------------------------------------------


def test_long_examples_are_cut_at_their_end_and_counted() -> None:
    whole = encode(encoder(tokenizer()), prompt="How are you?\n", completion="I am fine.")
    length, context = len(whole.tokens), whole.weights.index(1.0)
    lines = [{"prompt": "How are you?\n" * times, "completion": "I am fine."} for times in (1, 9)]
    examples = [(number, parse_example(json.dumps(line).encode())) for number, line in enumerate(lines, 1)]
    short = encoder(tokenizer(), most=length - 1)
    assert [*short.encode_all(examples)] == [
        (1, EncodedSequence(whole.tokens[:-1], whole.weights[:-1], truncated=True))
    ]
    counts = short.counts
    assert (counts.examples, counts.truncated, counts.dropped, counts.tokens) == (2, 1, 1, length - 1)
    none = encoder(tokenizer(), most=context)
    assert [*none.encode_all(examples[:1])] == []
    assert (none.counts.dropped, none.counts.truncated, none.counts.tokens) == (1, 0, 0)


def test_of_a_pair_that_is_cut_something_of_both_replies_must_remain() -> None:
    example = parse_example(json.dumps(preference("Well, I am fine.", "Fine.")).encode())
    pair = encoder(tokenizer()).encode(example)
    assert isinstance(pair, PreferencePair)
    prompt = pair.chosen.weights.index(1.0)
    short = encoder(tokenizer(), most=len(pair.rejected.tokens))
    cut = short.encode(example)
    assert isinstance(cut, PreferencePair)
    assert [each.truncated for each in cut] == [True, False]
    assert (short.counts.truncated, short.counts.dropped) == (1, 0)
    none = encoder(tokenizer(), most=prompt)
    assert none.encode(example) is None
    assert (none.counts.truncated, none.counts.dropped) == (0, 1)


def test_counts_are_of_what_is_trained_on() -> None:
    whole = encoder(tokenizer())
    examples = [parse_example(json.dumps(preference("Well.", "Fine.")).encode())] * 3
    encoded = [pair for _, pair in whole.encode_all(enumerate(examples))]
    sequences = [each for pair in encoded if isinstance(pair, PreferencePair) for each in pair]
    assert whole.counts.examples == 3
    assert whole.counts.tokens == sum(len(each.tokens) for each in sequences)
    assert whole.counts.trained_tokens == sum(each.trained_tokens for each in sequences) > 0
    assert (whole.counts.truncated, whole.counts.dropped) == (0, 0)


def test_an_error_names_the_line() -> None:
    bad = parse_example(json.dumps({"messages": DIALOGUE}).encode())
    with pytest.raises(InvalidExamples, match=r"^line 7: messages\.2: "):
        list(encoder(tokenizer(QWEN3)).encode_all([(7, bad)]))
