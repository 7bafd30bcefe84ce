"""Small chat templates in the formats of several families, rendered by transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stub_completions import byte_tokenizer

from lora_serve.api.chat_template import template_messages, template_tools

TEMPLATES = {path.stem: path.read_text() for path in sorted((Path(__file__).parent / "templates").glob("*.jinja"))}
ENDS = ("</s>", "<|im_end|>\n", "<|eot_id|>", "<|eot|>")
CONVERSATION = [{"role": "user", "content": "What is the weather?"}]
TOOLS = [{"type": "function", "function": {"name": "get_weather"}}]


def render(name: str, messages: list[dict[str, Any]], **options: Any) -> str:
    """A rendered prompt."""
    template = TEMPLATES[name]
    text: str = byte_tokenizer(bos=True, template=template).apply_chat_template(
        template_messages(messages, template), tools=template_tools(TOOLS), tokenize=False, **options
    )
    return text


def written_reply(name: str, message: dict[str, Any]) -> str:
    """What a model writes for an assistant's message, by its template: what is rendered after the prompt."""
    prompt = render(name, CONVERSATION, add_generation_prompt=True).removesuffix("<think>\n")
    rendered = render(name, [*CONVERSATION, {"role": "assistant", **message}])
    assert rendered.startswith(prompt)
    reply = rendered.removeprefix(prompt)
    return next(reply.removesuffix(end) for end in ENDS if reply.endswith(end))


def tool_call(name: str, arguments: str, id_: str = "call00001") -> dict[str, Any]:
    """A tool call of an assistant's message."""
    return {"id": id_, "type": "function", "function": {"name": name, "arguments": arguments}}
