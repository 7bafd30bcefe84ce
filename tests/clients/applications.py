"""Applications' own libraries, unmodified, against a running server: text, streams, tools, structured output.

Run in an environment with the libraries: `python applications.py http://127.0.0.1:8000 MODEL [NAME …]`. Each is a
function below; one whose library is missing is skipped. Prints a line per client; the exit status is 1 if any failed.
"""

from __future__ import annotations

import asyncio
import sys
import traceback
from collections.abc import Callable
from typing import Any

from pydantic import BaseModel

Client = Callable[[str, str], None]
CLIENTS: dict[str, Client] = {}
QUESTION = "What is the weather in Paris?"


class Place(BaseModel):
    """A place."""

    city: str
    country: str


def client(function: Client) -> Client:
    CLIENTS[function.__name__] = function
    return function


def weather(city: str) -> str:
    """The weather in a city."""
    return f"It is sunny in {city}."


@client
def openai_chat(url: str, model: str) -> None:
    from openai import OpenAI, pydantic_function_tool

    with OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as api:
        messages: list[Any] = [{"role": "user", "content": QUESTION}]
        first = api.chat.completions.create(model=model, messages=messages, max_tokens=20)
        messages += [first.choices[0].message, {"role": "user", "content": "And in Rome?"}]
        assert api.chat.completions.create(model=model, messages=messages, max_tokens=20).choices
        parsed = api.chat.completions.parse(
            model=model, messages=messages, response_format=Place, max_tokens=400, temperature=0
        )
        assert parsed.choices[0].message.parsed is not None
        tools: list[Any] = [pydantic_function_tool(Place)]
        called = api.chat.completions.parse(
            model=model, messages=messages, tools=tools, tool_choice="required", max_tokens=400, temperature=0
        )
        message = called.choices[0].message
        assert message.tool_calls
        assert isinstance(message.tool_calls[0].function.parsed_arguments, Place)
        messages += [message, {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "sunny"}]
        with api.chat.completions.stream(model=model, messages=messages, max_tokens=400, temperature=0) as stream:
            assert stream.get_final_completion().choices[0].finish_reason in ("stop", "length")


@client
def openai_responses(url: str, model: str) -> None:
    from openai import OpenAI, pydantic_function_tool

    with OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as api:
        assert api.responses.create(model=model, input=QUESTION, max_output_tokens=20).output_text
        parsed = api.responses.parse(model=model, input=QUESTION, text_format=Place, max_output_tokens=100)
        assert parsed.output_parsed is not None
        with api.responses.stream(model=model, input=QUESTION, max_output_tokens=20) as stream:
            kinds = [event.type for event in stream]
        assert kinds[0] == "response.created"
        assert kinds[-1] in ("response.completed", "response.incomplete")
        tools: list[Any] = [pydantic_function_tool(Place)]
        called = api.responses.parse(
            model=model, input=QUESTION, tools=tools, tool_choice="required", max_output_tokens=100
        )
        call = called.output[-1]
        assert call.type == "function_call"
        assert isinstance(call.parsed_arguments, Place)
        result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
        turns: list[Any] = [{"role": "user", "content": QUESTION}, *called.output, result]
        assert api.responses.create(model=model, input=turns, max_output_tokens=20).output


@client
def anthropic_messages(url: str, model: str) -> None:
    from anthropic import Anthropic

    api = Anthropic(base_url=url, api_key="x", max_retries=0)
    user: list[Any] = [{"role": "user", "content": QUESTION}]
    assert api.messages.create(model=model, max_tokens=20, messages=user).content
    assert api.messages.count_tokens(model=model, messages=user).input_tokens > 5
    tool: Any = {"name": "weather", "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}}}
    called = api.messages.create(model=model, max_tokens=100, messages=user, tools=[tool], tool_choice={"type": "any"})
    uses = [block for block in called.content if block.type == "tool_use"]
    assert uses
    results = [{"type": "tool_result", "tool_use_id": use.id, "content": "sunny"} for use in uses]
    follow = [*user, {"role": "assistant", "content": called.content}, {"role": "user", "content": results}]
    with api.messages.stream(model=model, max_tokens=20, messages=follow, tools=[tool], system="Be brief.") as stream:
        assert stream.get_final_message().stop_reason in ("end_turn", "max_tokens", "tool_use")


@client
def openai_agents(url: str, model: str) -> None:
    from agents import (
        Agent,
        ModelSettings,
        OpenAIResponsesModel,
        RunConfig,
        Runner,
        function_tool,
        set_tracing_disabled,
    )
    from openai import AsyncOpenAI

    set_tracing_disabled(True)

    async def run() -> None:
        served = OpenAIResponsesModel(model, AsyncOpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0))
        # An answer cut off by max_tokens is an error to this library.
        settings = ModelSettings(max_tokens=400, temperature=0)
        plain = Agent(name="a", instructions="Be brief.", model=served, model_settings=settings)
        assert (await Runner.run(plain, QUESTION)).final_output is not None
        tool = function_tool(weather)
        forced = ModelSettings(max_tokens=400, temperature=0, tool_choice="required")
        agent = Agent(name="b", instructions="Use tools.", model=served, tools=[tool], model_settings=forced)
        result = await Runner.run(agent, QUESTION, run_config=RunConfig(), max_turns=3)
        assert any(item.type == "tool_call_output_item" for item in result.new_items)
        typed = Agent(name="c", instructions="x", model=served, output_type=Place, model_settings=settings)
        assert isinstance((await Runner.run(typed, QUESTION)).final_output, Place)
        streamed = Runner.run_streamed(plain, QUESTION)
        assert [event async for event in streamed.stream_events()]

    asyncio.run(run())


@client
def langchain(url: str, model: str) -> None:
    from langchain_core.tools import tool
    from langchain_openai import ChatOpenAI, OpenAI

    chat = ChatOpenAI(model=model, base_url=f"{url}/v1", api_key="x", max_tokens=60, max_retries=0)  # type: ignore[arg-type,call-arg]
    assert chat.invoke(QUESTION).content
    assert "".join(str(piece.content) for piece in chat.stream(QUESTION))
    assert isinstance(chat.with_structured_output(Place).invoke(QUESTION), Place)
    assert isinstance(chat.with_structured_output(Place, method="function_calling").invoke(QUESTION), Place)
    called = chat.bind_tools([tool(weather)], tool_choice="any").invoke(QUESTION)
    assert called.tool_calls
    responses = ChatOpenAI(model=model, base_url=f"{url}/v1", api_key="x", max_tokens=60, use_responses_api=True)  # type: ignore[arg-type,call-arg]
    assert responses.invoke(QUESTION).text
    assert OpenAI(model=model, base_url=f"{url}/v1", api_key="x", max_tokens=10).invoke("Paris is")  # type: ignore[arg-type,call-arg]


@client
def langgraph_agent(url: str, model: str) -> None:
    from langchain.agents import create_agent
    from langchain_openai import ChatOpenAI

    chat = ChatOpenAI(model=model, base_url=f"{url}/v1", api_key="x", max_tokens=60, max_retries=0)  # type: ignore[arg-type,call-arg]
    agent = create_agent(chat, [weather], response_format=None)
    assert agent.invoke({"messages": [{"role": "user", "content": QUESTION}]})["messages"]


@client
def llama_index(url: str, model: str) -> None:
    from llama_index.core.llms import ChatMessage
    from llama_index.core.tools import FunctionTool
    from llama_index.llms.openai_like import OpenAILike

    llm = OpenAILike(
        model=model, api_base=f"{url}/v1", api_key="x", is_chat_model=True, is_function_calling_model=True,
        max_tokens=60, max_retries=0, context_window=8192, should_use_structured_outputs=True,
    )  # fmt: skip
    assert llm.complete("Paris is").text
    assert llm.chat([ChatMessage(role="user", content=QUESTION)]).message.content
    assert [*llm.stream_chat([ChatMessage(role="user", content=QUESTION)])]
    called = llm.chat_with_tools([FunctionTool.from_defaults(weather)], user_msg=QUESTION, tool_required=True)
    assert llm.get_tool_calls_from_response(called)
    assert isinstance(llm.as_structured_llm(Place).complete(QUESTION).raw, Place)


@client
def instructor(url: str, model: str) -> None:
    import instructor
    from openai import OpenAI

    api = OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0)
    for mode in (
        instructor.Mode.TOOLS,
        instructor.Mode.TOOLS_STRICT,
        instructor.Mode.JSON_SCHEMA,  # Mode.JSON does not send the schema as one
    ):
        made = instructor.from_openai(api, mode=mode).chat.completions.create(
            model=model, response_model=Place, messages=[{"role": "user", "content": "Paris, France"}], max_tokens=100,
            max_retries=0,
        )  # fmt: skip
        assert isinstance(made, Place), mode


@client
def pydantic_ai(url: str, model: str) -> None:
    from pydantic_ai import Agent, NativeOutput, ToolOutput
    from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
    from pydantic_ai.providers.openai import OpenAIProvider

    provider = OpenAIProvider(base_url=f"{url}/v1", api_key="x")
    settings: Any = {"max_tokens": 100}
    for served in (OpenAIChatModel(model, provider=provider), OpenAIResponsesModel(model, provider=provider)):
        assert Agent(served, model_settings=settings).run_sync(QUESTION).output
        typed = Agent(served, output_type=ToolOutput(Place), model_settings=settings, retries=0)
        assert isinstance(typed.run_sync(QUESTION).output, Place)
        native = Agent(served, output_type=NativeOutput(Place), model_settings=settings, retries=0)
        assert isinstance(native.run_sync(QUESTION).output, Place)


@client
def litellm(url: str, model: str) -> None:
    import litellm

    options: Any = {"model": f"openai/{model}", "api_base": f"{url}/v1", "api_key": "x", "num_retries": 0}
    messages = [{"role": "user", "content": QUESTION}]
    assert litellm.completion(messages=messages, max_tokens=20, **options).choices[0].message.content
    assert [*litellm.completion(messages=messages, max_tokens=20, stream=True, **options)]
    made = litellm.completion(messages=messages, max_tokens=100, response_format=Place, **options)
    assert Place.model_validate_json(made.choices[0].message.content)
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]
    called = litellm.completion(messages=messages, max_tokens=60, tools=tools, tool_choice="required", **options)
    assert called.choices[0].message.tool_calls
    long = [{"role": "user", "content": "word " * 20_000}]
    try:
        litellm.completion(messages=long, **options)
    except litellm.ContextWindowExceededError:
        return
    raise AssertionError("context overflow is not recognised")


@client
def dspy(url: str, model: str) -> None:
    import dspy

    lm = dspy.LM(f"openai/{model}", api_base=f"{url}/v1", api_key="x", max_tokens=100, cache=False, num_retries=0)
    assert lm(QUESTION)
    assert Place.model_validate_json(str(lm(QUESTION, response_format=Place)[0]))


def main(url: str, model: str, *names: str) -> int:
    failed = 0
    for name in names or CLIENTS:
        try:
            CLIENTS[name](url, model)
        except ModuleNotFoundError as error:
            print(f"{name:22} skipped: {error}")
        except Exception as error:
            failed += 1
            where = traceback.extract_tb(error.__traceback__)
            line = next((frame.lineno for frame in reversed(where) if frame.filename == __file__), 0)
            print(f"{name:22} FAILED at line {line}: {type(error).__name__}: {' '.join(str(error).split())[:600]}")
        else:
            print(f"{name:22} ok")
        sys.stdout.flush()
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
