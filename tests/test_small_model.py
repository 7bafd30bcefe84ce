"""A real small chat model behind the server: its own template, tools with a template that knows them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI
from server_process import ServerProcess
from smollm2 import smollm2

HERMES = Path(__file__).parent / "api" / "templates" / "hermes.jinja"
USER: Any = {"role": "user", "content": "What is the weather in Paris?"}
TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather in a city.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "unit": {"enum": ["celsius", "fahrenheit"]}},
                "required": ["city", "unit"],
                "additionalProperties": False,
            },
        },
    }
]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenAI]:
    """A client of the model as it comes."""
    with ServerProcess(tmp_path_factory.mktemp("store"), "--dtype", "float32", model=smollm2()) as server:
        yield OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)


@pytest.fixture(scope="module")
def with_tools(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenAI]:
    """A client of the model with a chat template that knows tools."""
    options = ("--chat-template", str(HERMES))
    with ServerProcess(tmp_path_factory.mktemp("store"), *options, model=smollm2()) as server:
        yield OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)


def test_a_chat_continues_as_with_transformers(plain: OpenAI) -> None:
    answer = plain.chat.completions.create(model="smollm2", messages=[USER], temperature=0, max_tokens=24)
    print(answer)


def test_a_named_function_is_called_with_valid_arguments(with_tools: OpenAI) -> None:
    answer = with_tools.chat.completions.create(
        model="", messages=[USER], tools=TOOLS, tool_choice="required", temperature=0, max_tokens=100
    )
    print(answer)
    (call,) = answer.choices[0].message.tool_calls or []
    assert call.type == "function"
    assert json.loads(call.function.arguments).keys() == {"city", "unit"}
