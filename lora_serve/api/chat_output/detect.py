"""The format of tool calls that a chat template renders, which is the one its model was trained to write."""

from __future__ import annotations

from lora_serve.api.chat_output.hermes import HermesFormat
from lora_serve.api.chat_output.llama import LlamaFormat
from lora_serve.api.chat_output.mistral import ARGS, BEGIN, CALL_ID, MistralFormat
from lora_serve.api.chat_output.qwen_coder import QwenCoderFormat
from lora_serve.api.chat_output.tool_format import ToolFormat

LLAMA_HEADERS = ("<|start_header_id|>", "<|header_start|>")  # Llama 3, Llama 4


def detect_tool_format(chat_template: str) -> ToolFormat | None:
    """The format that a chat template mentions; None if it knows of no tools, or of a format that is not served."""
    if "<tool_call>" in chat_template:
        if "<function=" in chat_template:
            return QwenCoderFormat()
        # Others write something else between the same tags (GLM: <arg_key>).
        return HermesFormat() if "arguments" in chat_template and "<arg_key>" not in chat_template else None
    if BEGIN in chat_template:
        return MistralFormat(with_array=ARGS not in chat_template, with_call_id=CALL_ID in chat_template)
    if any(header in chat_template for header in LLAMA_HEADERS) and '"parameters": ' in chat_template:
        return LlamaFormat()
    return None
