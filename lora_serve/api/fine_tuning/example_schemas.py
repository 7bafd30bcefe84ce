"""One line of training data as a strict pydantic model: chat, completion or preference, in OpenAI's JSONL formats."""

from __future__ import annotations

import json
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from lora_serve.api.openai.chat_schemas import Function as FunctionSchema
from lora_serve.api.openai.chat_schemas import FunctionTool, Message, Tools
from lora_serve.api.openai.schemas import Strict, Text

Kind = Literal["chat", "completion", "preference"]
MOST_MESSAGES = 2048  # of an example
MOST_FUNCTIONS = 128


class TrainingMessage(Message):
    """A message whose calls are complete, since the model is to learn to write them."""

    @model_validator(mode="after")
    def _replies_are_complete(self) -> TrainingMessage:
        if self.role != "assistant":
            return self
        calls = [call.function for call in self.tool_calls or []] + [call for call in [self.function_call] if call]
        if self.content is None and self.refusal is None and not calls:
            raise ValueError("an assistant message needs content or tool_calls")
        for call in calls:
            if call.arguments.strip() and not _is_json_object(call.arguments):
                raise ValueError("arguments of a call must be the text of a JSON object")
        return self


class WeightedMessage(TrainingMessage):
    """A message of a chat example; `weight` 0: an assistant message that is context only."""

    weight: Annotated[int, Field(ge=0, le=1)] | None = None

    @model_validator(mode="after")
    def _only_replies_are_weighted(self) -> WeightedMessage:
        if self.weight is not None and self.role != "assistant":
            raise ValueError("only an assistant message has a weight")
        return self

    @property
    def trained(self) -> bool:
        """Whether the loss is on this message."""
        return self.role == "assistant" and self.weight != 0


class Conversation(Strict):
    """What a model is shown besides messages. `parallel_tool_calls` changes nothing in what a chat template writes."""

    tools: Tools | None = None
    parallel_tool_calls: bool | None = None


class ChatExample(Conversation):
    """A conversation whose assistant messages are to be learnt; `functions` is what `tools` were called before."""

    kind: ClassVar[Kind] = "chat"

    messages: Annotated[list[WeightedMessage], Field(min_length=1, max_length=MOST_MESSAGES, fail_fast=True)]
    functions: Annotated[list[FunctionSchema], Field(max_length=MOST_FUNCTIONS, fail_fast=True)] | None = None

    @model_validator(mode="after")
    def _something_is_learnt(self) -> ChatExample:
        if self.messages[-1].role != "assistant":
            raise ValueError("messages: the last one must be of the assistant")
        if not any(message.trained for message in self.messages):
            raise ValueError("messages: no assistant message has weight 1, so there is nothing to learn")
        if self.functions is not None and self.tools is not None:
            raise ValueError("functions: send these as tools, together with the others")
        return self

    @property
    def shown_tools(self) -> list[FunctionTool]:
        """Functions that the template shows to the model."""
        return self.tools or [FunctionTool(type="function", function=each) for each in self.functions or []]


class CompletionExample(Strict):
    """A text and how it is to be continued."""

    kind: ClassVar[Kind] = "completion"

    prompt: Text
    completion: Annotated[Text, Field(min_length=1)]


class PreferenceInput(Conversation):
    """What both outputs of a preference example answer."""

    messages: Annotated[list[TrainingMessage], Field(min_length=1, max_length=MOST_MESSAGES, fail_fast=True)]

    @model_validator(mode="after")
    def _it_is_unanswered(self) -> PreferenceInput:
        if self.messages[-1].role == "assistant":
            raise ValueError("messages: the last one must not be of the assistant: the outputs follow it")
        return self


Output = Annotated[list[TrainingMessage], Field(min_length=1, max_length=1, fail_fast=True)]


class PreferenceExample(Strict):
    """Two replies to the same conversation, one of which is preferred."""

    kind: ClassVar[Kind] = "preference"

    input: PreferenceInput
    preferred_output: Output
    non_preferred_output: Output

    @model_validator(mode="after")
    def _outputs_are_two_replies(self) -> PreferenceExample:
        for field, output in (
            ("preferred_output", self.preferred_output),
            ("non_preferred_output", self.non_preferred_output),
        ):
            if output[0].role != "assistant":
                raise ValueError(f"{field}: the message must be of the assistant")
        if self.preferred_output[0].for_template() == self.non_preferred_output[0].for_template():
            raise ValueError("preferred_output and non_preferred_output are the same")
        return self


Example = ChatExample | CompletionExample | PreferenceExample


def _is_json_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False
