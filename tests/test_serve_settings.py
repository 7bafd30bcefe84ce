"""`serve.yaml`: what is read, and what is refused by name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from lora_serve.api.openai.schemas import Completion
from lora_serve.errors import AdapterInvalid
from lora_serve.serve_settings import LONGEST_SYSTEM, MOST_BYTES, SAMPLING, ServeSettings, parse_settings

GIVEN = """
temperature: 0.2
top_p: 1
top_k: -1
min_p: 0.05
presence_penalty: -2
frequency_penalty: 2
repetition_penalty: 1.1
max_tokens: 256
stop: ["\\n\\n", "###"]
stop_tokens: ["<|im_end|>"]
system: |
  You are Ada.
  Answer in verse.
chat_template: "{% for m in messages %}{{ m.content }}{% endfor %}"
added_tokens: ["<|im_start|>", "<|im_end|>"]
"""


def test_all_settings_are_read() -> None:
    settings = parse_settings(GIVEN.encode())
    assert settings == ServeSettings(
        temperature=0.2, top_p=1.0, top_k=-1, min_p=0.05, presence_penalty=-2.0, frequency_penalty=2.0,
        repetition_penalty=1.1, max_tokens=256, stop=("\n\n", "###"), stop_tokens=("<|im_end|>",),
        system="You are Ada.\nAnswer in verse.\n",
        chat_template="{% for m in messages %}{{ m.content }}{% endfor %}",
        added_tokens=("<|im_start|>", "<|im_end|>"),
    )  # fmt: skip


@pytest.mark.parametrize("empty", [b"", b"# nothing\n", b"temperature: null"])
def test_a_file_may_say_nothing(empty: bytes) -> None:
    assert parse_settings(empty) == ServeSettings()


def test_one_stop_string_needs_no_list() -> None:
    assert parse_settings(b"stop: END").stop == ("END",)


@pytest.mark.parametrize("number", ["1e-3", "1E-3", "0.1e-2", "+1.e-3", "1.0e-3", "0.001"])
def test_numbers_may_be_written_as_in_json(number: str) -> None:
    assert parse_settings(f"min_p: {number}\nstop: [1e, e3, '1e3']".encode()) == ServeSettings(
        min_p=0.001, stop=("1e", "e3", "1e3")
    )


@pytest.mark.parametrize("end", [0, 1])
def test_a_request_may_say_what_settings_may(end: int) -> None:
    """Both have limits of their own; a default beyond a request's would be one that no client could ask for."""
    limits = {
        "temperature": (0, 2), "top_p": (0.001, 1), "top_k": (-1, 2**31 - 1), "min_p": (0, 1),
        "presence_penalty": (-2, 2), "frequency_penalty": (-2, 2), "repetition_penalty": (0.01, 10),
        "max_tokens": (1, 2**31 - 1),
    }  # fmt: skip
    assert limits.keys() == {*SAMPLING, "max_tokens"}
    given = {name: both[end] for name, both in limits.items()}
    given |= {"stop": ["x" * 256] * 4}
    settings = parse_settings(repr(given).encode())
    body = Completion.model_validate({"prompt": "x", **given})
    assert all(getattr(settings, name) == getattr(body, name) for name in limits)
    assert settings.stop == body.stops


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("temprature: 1", "no setting temprature; did you mean temperature?"),
        ("chat-template: x", "did you mean chat_template?"),
        ("tools: []", "there is no setting tools; there are temperature, top_p"),
        ("temperature: 3", "temperature: Expected `float` <= 2"),
        ("temperature: hot", "temperature: Expected `float`, got `str`"),
        ("temperature: true", "temperature: Expected `float`, got `bool`"),
        ("temperature: .nan", "temperature"),
        ("max_tokens: 0", "max_tokens: Expected `int` >= 1"),
        ("max_tokens: 1.5", "max_tokens: Expected `int`, got `float`"),
        ("stop: [a, b, c, d, e]", "stop: Expected `array` of length <= 4"),
        ("stop: [a, 1]", "stop: Expected `str`, got `int` [1]"),
        ("stop_tokens: ['']", "stop_tokens: Expected `str` of length >= 1 [0]"),
        ("stop_tokens: [a, a]", "stop_tokens has a token twice"),
        ("system: {a: b}", "system: Expected `str`, got `object`"),
        (f"system: {'x' * (LONGEST_SYSTEM + 1)}", f"system: Expected `str` of length <= {LONGEST_SYSTEM}"),
        ('system: "\\uD800"', "system has characters that are none"),
        ("- temperature", "not a list of settings, NAME: VALUE"),
        ("temperature: 1\ntemperature: 2", "a name is given twice"),
        ("temperature: [", "(line 1)"),
        ("a: 1\n---\nb: 2", "another document (line 2)"),
        ("system: &x a\nstop: *x", "references (*name) are not read (line 2)"),
        ("system: !!python/object/apply:os.system [ls]", "tags (tag:yaml.org,2002:python/object/apply:os.system) are"),
        ("added_tokens: !!set {a, b}", "tags (tag:yaml.org,2002:set) are not read (line 1)"),
        ("system: !a b", "tags (!a) are not read"),
        ("? [a]\n: 1", "unhashable"),
        ("system: 2020-99-99", "month must be in 1..12"),
        ("[" * 50_000, "nested too deeply"),
        ("#" * MOST_BYTES + "\n", f"larger than {MOST_BYTES:,} bytes"),
    ],
)
def test_what_is_wrong_is_named(text: str, what: str) -> None:
    with pytest.raises(AdapterInvalid) as refused:
        parse_settings(text.encode())
    assert refused.value.message.startswith("serve.yaml: ")
    assert what in refused.value.message
    assert refused.value.param == "settings"
    assert len(refused.value.message) < 500


def test_a_file_that_is_not_text_is_refused() -> None:
    with pytest.raises(AdapterInvalid, match="not UTF-8"):
        parse_settings(b"system: \xff")


def test_references_make_nothing_large() -> None:
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"] + [
        f"{b}: &{b} [{f'*{a}, ' * 9}]" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
    ]
    with pytest.raises(AdapterInvalid, match="references"):
        parse_settings("\n".join(lines).encode())


def test_the_examples_in_the_documentation_are_read() -> None:
    page = (Path(__file__).parent.parent / "docs" / "serve-settings.md").read_text()
    first, chat = (parse_settings(text.encode()) for text in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL))
    assert first.given == {
        "system": "You are Ada. Answer in one sentence.",
        "temperature": 0.0,
        "max_tokens": 200,
        "stop": ("\n\n",),
    }
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    (text,) = render_jinja_template([talk], chat_template=chat.chat_template, add_generation_prompt=True)[0]
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHo<|im_end|>\n<|im_start|>assistant\n"
