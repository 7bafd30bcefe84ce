"""Anthropic's SDK and a real small chat model: system prompt, prefill and token counts, as transformers sees them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from anthropic import Anthropic
from anthropic.types import MessageParam
from server_process import ServerProcess
from smollm2 import smollm2
from transformers import AutoTokenizer

GREEDY = {"temperature": 0}  # which the SDK has no argument for
SYSTEM = "You answer in one sentence."
HI: list[MessageParam] = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Anthropic]:
    options = ("--dtype", "float32", "--served-model-name", "smollm2")
    with (
        ServerProcess(tmp_path_factory.mktemp("store"), *options, model=smollm2()) as server,
        Anthropic(base_url=server.url, api_key="any", max_retries=0) as client,
    ):
        yield client


def say(client: Anthropic, messages: list[MessageParam], max_tokens: int) -> str:
    answer = client.messages.create(
        model="smollm2", system=SYSTEM, messages=messages, max_tokens=max_tokens, extra_body=GREEDY
    )
    return "".join(block.text for block in answer.content if block.type == "text")


def test_an_answer_goes_on_from_its_beginning(client: Anthropic) -> None:
    whole = say(client, HI, 12)
    begun = whole[: whole.index(" ", len(whole) // 2)]
    rest = say(client, [*HI, {"role": "assistant", "content": begun}], 12)
    assert (begun + rest).startswith(whole)
    assert rest


def test_tokens_are_counted_as_transformers_encodes_them(client: Anthropic) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2())
    turns: list[MessageParam] = [*HI, {"role": "assistant", "content": "Paris."}, {"role": "user", "content": "Why?"}]
    expected = tokenizer.apply_chat_template(
        [{"role": "system", "content": SYSTEM}, *turns], add_generation_prompt=True, return_dict=False
    )
    counted = client.messages.count_tokens(model="smollm2", system=SYSTEM, messages=turns)
    assert counted.input_tokens == len(expected)
