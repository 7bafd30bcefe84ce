"""A real small chat model, with a chat template that knows tools, through every API; transformers is the oracle."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from anthropic import Anthropic
from openai import OpenAI
from server_process import ServerProcess
from smollm2 import smollm2
from transformers import AutoModelForCausalLM, AutoTokenizer

TEMPLATE = Path(__file__).parent / "api" / "templates" / "hermes.jinja"
MODEL = "smollm2"
USER: Any = {"role": "user", "content": "What is the weather in Paris?"}
ARGUMENTS = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 20}, "unit": {"enum": ["celsius", "fahrenheit"]}},
    "required": ["city", "unit"],
    "additionalProperties": False,
}
FUNCTION = {"name": "weather", "description": "The weather in a city.", "parameters": ARGUMENTS}
TOOLS: Any = [{"type": "function", "function": FUNCTION}]
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 30},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b", "c"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
FORMAT: Any = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    options = ("--dtype", "float32", "--served-model-name", MODEL, "--chat-template", str(TEMPLATE))
    with ServerProcess(tmp_path_factory.mktemp("store"), *options, model=smollm2()) as server:
        yield server


@pytest.fixture(scope="module")
def openai(server: ServerProcess) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def anthropic(server: ServerProcess) -> Iterator[Anthropic]:
    with Anthropic(base_url=server.url, api_key="any", max_retries=0) as client:
        yield client


def ask(client: OpenAI, **fields: Any) -> Any:
    options = {"model": MODEL, "messages": [USER], "temperature": 0, "max_tokens": 80}
    return client.chat.completions.create(**(options | fields))


def test_a_chat_continues_as_with_transformers(openai: OpenAI) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2())
    model = AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32)
    prompt = tokenizer.apply_chat_template(
        [USER], chat_template=TEMPLATE.read_text(), add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    length = prompt["input_ids"].shape[1]
    expected = model.generate(**prompt, max_new_tokens=24, do_sample=False)[0, length:]
    answer = ask(openai, max_tokens=24)
    assert answer.choices[0].message.content == tokenizer.decode(expected, skip_special_tokens=True)
    assert answer.usage.prompt_tokens == length


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_function_that_must_be_called_gets_valid_arguments(openai: OpenAI, choice: Any) -> None:
    answer = ask(openai, tools=TOOLS, tool_choice=choice, temperature=1.0, seed=1, n=3, parallel_tool_calls=False)
    for each in answer.choices:
        assert each.finish_reason == "tool_calls"
        (call,) = each.message.tool_calls
        jsonschema.validate(json.loads(call.function.arguments), ARGUMENTS)


def test_a_streamed_call_is_the_call_and_its_result_can_be_sent_back(openai: OpenAI) -> None:
    fields: Any = {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False}
    message = ask(openai, **fields).choices[0].message
    chunks = [*ask(openai, stream=True, **fields)]
    pieces = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
    streamed = "".join(piece.function.arguments or "" for piece in pieces)
    assert streamed == message.tool_calls[0].function.arguments
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "It is sunny."}
    assert ask(openai, tools=TOOLS, messages=[USER, message, result]).choices[0].message.content


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_an_answer_in_a_schema_is_valid_streamed_or_not(openai: OpenAI, temperature: float) -> None:
    whole = ask(openai, response_format=FORMAT, temperature=temperature, seed=3, logprobs=True)
    jsonschema.validate(json.loads(whole.choices[0].message.content), PERSON)
    assert len(whole.choices[0].logprobs.content) == whole.usage.completion_tokens
    chunks = ask(openai, response_format=FORMAT, temperature=temperature, seed=3, stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    jsonschema.validate(json.loads(text), PERSON)
    cut = ask(openai, response_format=FORMAT, max_tokens=3)
    assert cut.choices[0].finish_reason == "length"


def test_free_rows_are_the_same_beside_rows_with_grammars(openai: OpenAI) -> None:
    alone = ask(openai, max_tokens=40).choices[0].message.content
    with ThreadPoolExecutor(5) as pool:
        bound = [pool.submit(ask, openai, response_format=FORMAT, temperature=1.0, seed=n) for n in range(4)]
        free = pool.submit(ask, openai, max_tokens=40)
        assert free.result().choices[0].message.content == alone
        for each in bound:
            jsonschema.validate(json.loads(each.result().choices[0].message.content), PERSON)


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"structured_outputs": {"regex": "[A-Z]{3}-[0-9]{4}"}}, r"[A-Z]{3}-[0-9]{4}"),
        ({"structured_outputs": {"choice": ["sunny", "rainy"]}}, "sunny|rainy"),
        ({"guided_choice": ["warm", "cold"]}, "warm|cold"),
        ({"structured_outputs": {"grammar": 'start: "a" b+\nb: "b" | "c"'}, "max_tokens": 6}, "a[bc]+"),
    ],
)
def test_other_forms_that_text_can_be_held_to(openai: OpenAI, fields: dict[str, Any], pattern: str) -> None:
    text = ask(openai, extra_body=fields, temperature=1.0, seed=2).choices[0].message.content
    assert re.fullmatch(pattern, text), text


def test_responses_call_functions_and_hold_text_to_a_schema(openai: OpenAI) -> None:
    tool: Any = {"type": "function", "strict": True, **FUNCTION}
    called = openai.responses.create(
        model=MODEL, input="Weather in Rome?", tools=[tool], tool_choice="required", max_output_tokens=80, temperature=0
    )
    call = next(item for item in called.output if item.type == "function_call")
    jsonschema.validate(json.loads(call.arguments), ARGUMENTS)
    form: Any = {"type": "json_schema", "name": "person", "schema": PERSON, "strict": True}
    answer = openai.responses.create(
        model=MODEL, input="Who?", text={"format": form}, max_output_tokens=80, temperature=0
    )
    jsonschema.validate(json.loads(answer.output_text), PERSON)


def test_messages_call_tools(anthropic: Anthropic) -> None:
    tool: Any = {"name": "weather", "input_schema": ARGUMENTS}
    answer = anthropic.messages.create(
        model=MODEL,
        max_tokens=80,
        messages=[USER],
        tools=[tool],
        tool_choice={"type": "any", "disable_parallel_tool_use": True},
        extra_body={"temperature": 0},
    )
    assert answer.stop_reason == "tool_use"
    use = next(block for block in answer.content if block.type == "tool_use")
    jsonschema.validate(use.input, ARGUMENTS)


def test_messages_go_on_from_a_beginning_and_are_counted_as_transformers_encodes_them(anthropic: Anthropic) -> None:
    def say(messages: list[Any]) -> str:
        answer = anthropic.messages.create(
            model=MODEL, system="Be brief.", messages=messages, max_tokens=12, extra_body={"temperature": 0}
        )
        return "".join(block.text for block in answer.content if block.type == "text")

    whole = say([USER])
    begun = whole[: whole.index(" ", len(whole) // 2)]
    assert (begun + say([USER, {"role": "assistant", "content": begun}])).startswith(whole)
    expected = AutoTokenizer.from_pretrained(smollm2()).apply_chat_template(
        [{"role": "system", "content": "Be brief."}, USER],
        chat_template=TEMPLATE.read_text(),
        add_generation_prompt=True,
        return_dict=False,
    )
    counted = anthropic.messages.count_tokens(model=MODEL, system="Be brief.", messages=[USER])
    assert counted.input_tokens == len(expected)
