"""Requests are made by the settings of the exact version that answers; the oracle of prompts is transformers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest
from stub_completions import CONTEXT, EOS, StubCompletionApp, StubCompletionEngine, byte_tokenizer

from lora_serve.api.bounded_template import TemplateTooSlow, run_template
from lora_serve.api.openai.encode import TextEncoder
from lora_serve.api.settings_cache import PromptTools, make_tools
from lora_serve.errors import AdapterNotFound, Failure, SettingsNotApplied
from lora_serve.messages import AdapterInfo, AdapterVersion, Operation, ResolveAdapters
from lora_serve.request import Event, Finished, Request
from lora_serve.serve_settings import ServeSettings

HI = [{"role": "user", "content": "hi"}]
OWN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<me>{% endif %}"


class SettingsEngine(StubCompletionEngine):
    """Has adapters with settings, and refuses requests that were not made by those of their version.

    `before_admission`: called once, when the next request has arrived.
    """

    def __init__(self, store: Path) -> None:
        super().__init__(store)
        self.digests = ["d" * 64]
        self.settings: dict[str, ServeSettings | None] = {"poet": None, "clerk": None}
        self.current = dict.fromkeys(("poet", "clerk"), "d" * 64)
        self.asked = 0  # how often versions were asked for
        self.before_admission: list[Any] = []

    def publish(self, name: str, settings: ServeSettings | None, digest: str = "d" * 64) -> None:
        self.settings[name], self.current[name] = settings, digest
        size = None if settings is None or not settings.added_tokens else 260
        version = AdapterVersion(digest, 5.5, 8, 2, 10, 10, ["disk"], 0, vocab_size=size, settings=settings)
        self.adapters[name] = AdapterInfo(name, False, [version])
        self.stats.settings_state += 1

    async def call(self, operation: Operation) -> Any:
        if not isinstance(operation, ResolveAdapters):
            return await super().call(operation)
        self.asked += 1
        names = [self.resolves.get(use.name, use.name) for use in operation.adapters]
        for name in names:
            if name not in self.settings:
                raise AdapterNotFound(f"adapter {name} does not exist", param="adapter")
        return [
            {
                "name": name,
                "digest": self.current[name],
                "settings": _builtins(self.settings[name]),
                "vocab_size": self.adapters[name].versions[0].vocab_size if name in self.adapters else None,
            }
            for name in names
        ]

    async def generate(self, request: Request) -> AsyncGenerator[Event, None]:
        while self.before_admission:
            self.before_admission.pop()()
        for use in request.adapters:
            name = self.resolves.get(use.name, use.name)
            error: Exception | None = None
            if use.version not in (None, self.current.get(name)):
                error = AdapterNotFound(f"adapter {use.name}@{use.version} does not exist", param="adapter")
            elif self.settings.get(name) is not None and not use.settings_applied:
                error = SettingsNotApplied("ask again")
            if error is not None:
                self.requests.append(request)
                yield Finished(request.id, "error", failure=Failure.of(error))
                return
        async for event in super().generate(request):
            yield event


def _builtins(settings: ServeSettings | None) -> dict[str, Any] | None:
    return None if settings is None else settings.given


class Server(StubCompletionApp):
    def __init__(self, store: Path, tokenizer: Any = None) -> None:
        super().__init__(store, tokenizer=tokenizer)
        self.engine: SettingsEngine = SettingsEngine(store)
        services = self.app.state.services
        self.app.state.services = services.__class__(
            **{name: getattr(services, name) for name in services.__dataclass_fields__} | {"engine": self.engine}
        )

    @property
    def last(self) -> Request:
        return self.engine.requests[-1]

    async def ok(self, path: str, **body: Any) -> Any:
        answer = await self.post(path, body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    async def talk(self, **body: Any) -> str:
        """The prompt of a conversation."""
        await self.ok("/v1/chat/completions", **{"messages": HI, **body})
        return bytes(self.last.prompt).decode()


@pytest.fixture
def server(tmp_path: Path) -> Server:
    return Server(tmp_path)


# --- what counts -----------------------------------------------------------------------------------------------------


async def test_without_settings_nothing_is_asked(server: Server) -> None:
    await server.talk(adapter="poet")
    assert (server.engine.asked, server.last.adapters[0].version) == (0, None)


async def test_the_request_counts_before_the_adapter_and_that_before_the_base(server: Server) -> None:
    server.engine.info = type(server.engine.info)(  # type: ignore[misc]
        **{name: getattr(server.engine.info, name) for name in server.engine.info.__struct_fields__}
        | {"generation_defaults": {"temperature": 0.9, "top_p": 0.8, "top_k": 5}}
    )
    server.engine.publish(
        "poet", ServeSettings(temperature=0.3, top_p=0.4, min_p=0.1, presence_penalty=1.5, max_tokens=7, stop=("xx",))
    )
    for path, prompt in (("/v1/completions", {"prompt": "hi"}), ("/v1/chat/completions", {"messages": HI})):
        await server.ok(path, **prompt, adapter="poet", temperature=0.0, max_tokens=2)
        sampling = server.last.sampling
        assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.0, 0.4, 5, 0.1)
        assert (sampling.presence_penalty, sampling.max_tokens) == (1.5, 2)
        await server.ok(path, **prompt, adapter="poet")
        assert (server.last.sampling.temperature, server.last.sampling.max_tokens) == (0.3, 7)
        await server.ok(path, **prompt)
        assert (server.last.sampling.temperature, server.last.sampling.min_p) == (0.9, 0.0)


async def test_stop_strings_are_defaults_and_stop_tokens_always_end(server: Server) -> None:
    server.engine.publish("poet", ServeSettings(stop=("l",), stop_tokens=("q",)))
    said = await server.ok("/v1/completions", prompt="hi", adapter="poet")
    assert said["choices"][0]["text"] == "he"
    assert server.last.sampling.stop_token_ids == (ord("q"),)
    said = await server.ok("/v1/completions", prompt="hi", adapter="poet", stop=["lo"], stop_token_ids=[5])
    assert said["choices"][0]["text"] == "hel"
    assert server.last.sampling.stop_token_ids == (5, ord("q"))
    said = await server.ok("/v1/completions", prompt="hi", adapter="poet", stop=[], ignore_eos=True)
    assert said["choices"][0]["text"] == "hello"
    assert server.last.sampling.stop_token_ids == ()


async def test_a_system_prompt_is_for_conversations_without_one(server: Server) -> None:
    server.engine.publish("poet", ServeSettings(system="be"))
    assert await server.talk(adapter="poet") == "system:be|user:hi|assistant:"
    for role in ("system", "developer"):
        own = [{"role": role, "content": "no"}, *HI]
        assert await server.talk(adapter="poet", messages=own) == "system:no|user:hi|assistant:"
    await server.ok("/v1/responses", input="hi", adapter="poet", model="base")
    assert bytes(server.last.prompt) == b"system:be|user:hi|assistant:"
    await server.ok("/v1/responses", input="hi", adapter="poet", model="base", instructions="no")
    assert bytes(server.last.prompt) == b"system:no|user:hi|assistant:"
    for more, prompt in (({}, b"system:be|user:hi|assistant:"), ({"system": "no"}, b"system:no|user:hi|assistant:")):
        given = {"model": "poet", "messages": HI, **more}
        await server.ok("/v1/messages", **given, max_tokens=9)
        assert bytes(server.last.prompt) == prompt
        counted = await server.ok("/v1/messages/count_tokens", **given)
        assert counted == {"input_tokens": len(prompt)}
    await server.ok("/v1/completions", prompt="hi", adapter="poet")
    assert bytes(server.last.prompt) == b"hi"
    tokens = (await server.ok("/tokenize", messages=HI, adapter="poet"))["tokens"]
    assert bytes(tokens) == b"system:be|user:hi|assistant:"


@pytest.mark.parametrize("base_template", [None, "{{ raise_exception('not this one') }}"])
async def test_a_chat_template_replaces_the_base_s(tmp_path: Path, base_template: str | None) -> None:
    base = byte_tokenizer(template=base_template)
    server = Server(tmp_path, base)
    server.engine.publish("poet", ServeSettings(chat_template=OWN, system="be"))
    talk = [{"role": "system", "content": "be"}, *HI]
    expected = base.apply_chat_template(talk, chat_template=OWN, tokenize=False, add_generation_prompt=True)
    assert await server.talk(adapter="poet") == expected
    await server.ok("/v1/messages", model="poet", messages=HI, max_tokens=9)
    assert bytes(server.last.prompt).decode() == expected
    assert (await server.chat()).status_code == 400  # the base is as it was
    assert (await server.chat(adapter="clerk")).status_code == 400
    await server.ok("/v1/completions", prompt="hi", adapter="poet")


async def test_added_tokens_are_those_that_transformers_adds(server: Server) -> None:
    added = ("<|im_start|>", "<|im_end|>", "</s>")
    server.engine.publish("poet", ServeSettings(chat_template=OWN, added_tokens=added, stop_tokens=("<|im_end|>",)))
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([*added])
    text = "a<|im_start|>hi<|im_end|>\n</s>"
    expected = tokenizer.encode(text, add_special_tokens=False)
    assert {258, 259, EOS} < {*expected}
    await server.ok("/v1/completions", prompt=text, adapter="poet")
    assert server.last.prompt == expected
    assert server.last.sampling.stop_token_ids == (259,)
    await server.ok("/v1/completions", prompt=text, adapter="clerk")
    assert server.last.prompt == byte_tokenizer().encode(text, add_special_tokens=False) != expected
    assert (await server.ok("/tokenize", prompt=text, adapter="poet"))["tokens"] == expected
    assert (await server.ok("/detokenize", tokens=[104, 258], adapter="poet"))["prompt"] == "h<|im_start|>"


async def test_added_tokens_that_are_generated_are_part_of_the_text(server: Server) -> None:
    added = ("<|verse|>", "<|end|>")
    server.engine.publish("poet", ServeSettings(added_tokens=added, stop=("<|end|>",)))
    server.engine.reply = [ord("a"), 258, ord("b"), 259, ord("c")]
    said = await server.ok("/v1/completions", prompt="hi", adapter="poet", logprobs=0)
    assert said["choices"][0]["text"] == "a<|verse|>b"
    assert said["choices"][0]["logprobs"]["tokens"][:3] == ["a", "<|verse|>", "b"]
    said = await server.ok("/v1/chat/completions", messages=HI, adapter="poet", stop=[])
    assert said["choices"][0]["message"]["content"] == "a<|verse|>b<|end|>c"
    said = await server.ok("/v1/chat/completions", messages=HI, adapter="clerk")
    assert said["choices"][0]["message"]["content"] == "abc"


async def test_a_stop_token_that_is_none_is_the_adapter_s_fault(server: Server) -> None:
    server.engine.publish("poet", ServeSettings(stop_tokens=("<|nothing|>",)))
    answer = await server.chat(adapter="poet")
    assert answer.status_code == 409
    assert "'<|nothing|>' in stop_tokens, which is no token" in answer.json()["error"]["message"]


async def test_a_stop_token_that_the_model_cannot_have_is_the_adapter_s_fault(server: Server) -> None:
    """One that was added, but for which the adapter has no row: nothing that the client sent is wrong."""
    server.engine.publish("poet", ServeSettings(added_tokens=("<|a|>", "<|b|>", "<|c|>"), stop_tokens=("<|c|>",)))
    answer = await server.chat(adapter="poet")
    assert answer.status_code == 409
    assert "'<|c|>' in stop_tokens, token 260 of a model that has 260" in answer.json()["error"]["message"]


# --- several adapters ------------------------------------------------------------------------------------------------


async def test_adapters_with_different_settings_need_the_request_s_word(server: Server) -> None:
    server.engine.publish("poet", ServeSettings(temperature=0.3, top_k=9, system="be"))
    server.engine.publish("clerk", ServeSettings(temperature=0.4, top_k=9))
    both = [{"name": "poet"}, {"name": "clerk"}]
    answer = await server.chat(adapter=both)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == (
        "adapters poet and clerk have different settings of temperature (serve.yaml); "
        "say in the request which it shall be"
    )
    assert await server.talk(adapter=both, temperature=0.5) == "system:be|user:hi|assistant:"
    assert (server.last.sampling.temperature, server.last.sampling.top_k) == (0.5, 9)


async def test_adapters_with_different_limits_need_the_request_s_word_alone(server: Server) -> None:
    server.engine.publish("poet", ServeSettings(max_tokens=3, temperature=0.3))
    server.engine.publish("clerk", ServeSettings(max_tokens=4, temperature=0.4))
    both = {"adapter": [{"name": "poet"}, {"name": "clerk"}], "model": "base"}
    said = {**both, "temperature": 0.5, "max_tokens": 2}
    for path, prompt in (
        ("/v1/completions", {"prompt": "hi"}),
        ("/v1/chat/completions", {"messages": HI}),
        ("/v1/messages", {"messages": HI}),
    ):
        await server.ok(path, **prompt, **said)
        assert server.last.sampling.max_tokens == 2
    answer = await server.post("/v1/completions", {"prompt": "hi", **both, "temperature": 0.5})
    assert (answer.status_code, "of max_tokens" in answer.json()["error"]["message"]) == (400, True)
    counted = await server.ok("/v1/messages/count_tokens", messages=HI, **both)  # the prompt is the same in any case
    assert counted == {"input_tokens": len("user:hi|assistant:")}


async def test_different_chat_templates_cannot_be_composed_in_a_conversation(server: Server) -> None:
    server.engine.publish("poet", ServeSettings(chat_template=OWN))
    server.engine.publish("clerk", ServeSettings(chat_template=OWN + " "))
    both = [{"name": "poet"}, {"name": "clerk"}]
    answer = await server.chat(adapter=both)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "adapter")
    await server.ok("/v1/completions", prompt="hi", adapter=both)


# --- the version that answers ----------------------------------------------------------------------------------------


async def test_the_version_is_named_exactly_and_asked_for_once(server: Server) -> None:
    server.engine.publish("poet", ServeSettings(system="be"))
    for _ in range(3):
        await server.talk(adapter="poet", n=2)
        assert [(use.name, use.version) for use in server.last.adapters] == [("poet", "d" * 64)]
    assert server.engine.asked == 1
    await server.talk(adapter="clerk")
    await server.talk(adapter="clerk")
    assert (server.engine.asked, server.last.adapters[0].version) == (2, None)
    server.engine.publish("clerk", None)  # any change of names
    await server.talk(adapter="poet")
    assert server.engine.asked == 3


async def test_settings_that_come_while_a_request_begins_are_heeded(server: Server) -> None:
    for first in (None, ServeSettings(system="old")):
        server.engine.publish("poet", first)
        server.engine.digests = ["e" * 64]
        server.engine.before_admission = [lambda: server.engine.publish("poet", ServeSettings(system="new"), "e" * 64)]
        assert await server.talk(adapter="poet") == "system:new|user:hi|assistant:"
        assert server.last.adapters[0].version == "e" * 64
        server.engine.publish("poet", None)


async def test_an_adapter_that_is_deleted_while_a_request_begins_is_404(server: Server) -> None:
    server.engine.publish("poet", ServeSettings(system="be"))

    def delete() -> None:
        del server.engine.settings["poet"], server.engine.current["poet"]
        server.engine.stats.settings_state += 1

    server.engine.before_admission = [delete]
    answer = await server.post("/v1/chat/completions", {"messages": HI, "adapter": "poet@ddd"})
    assert answer.status_code == 404
    assert len(server.engine.requests) < 6


async def test_a_request_that_is_overtaken_every_time_is_told_to_come_again(server: Server) -> None:
    server.engine.publish("poet", ServeSettings(system="be"))
    server.engine.refusals = {number: SettingsNotApplied("ask again", retry_after=1) for number in range(99)}
    answer = await server.chat(adapter="poet")
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
    assert len(server.engine.requests) == 4


async def test_of_an_alias_the_chosen_target_is_kept_from_prompt_to_answer(server: Server) -> None:
    server.engine.publish("poet", ServeSettings(system="be"))
    server.engine.resolves = {"prod": "clerk"}
    assert await server.talk(adapter="prod") == "user:hi|assistant:"
    assert [(use.name, use.version) for use in server.last.adapters] == [("clerk", "d" * 64)]
    server.engine.resolves = {"prod": "poet"}  # no name of an adapter has changed
    assert await server.talk(adapter="prod") == "system:be|user:hi|assistant:"


async def test_choices_that_begin_later_are_made_by_the_settings_too(tmp_path: Path) -> None:
    server = Server(tmp_path)
    server.engine.publish("poet", ServeSettings(top_k=3))
    services = server.app.state.services
    object.__setattr__(services, "config", services.config.model_copy(update={"max_queue": 1}))
    await server.ok("/v1/completions", prompt="hi", adapter="poet", n=3)
    assert [use.settings_applied for request in server.engine.requests for use in request.adapters] == [True] * 3


async def test_an_unknown_adapter_is_404_where_others_have_settings(server: Server) -> None:
    server.engine.publish("poet", ServeSettings(system="be"))
    answer = await server.chat(adapter="nobody")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "adapter_not_found")


# --- hostile templates -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "what"),
    [
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ x.y.z }}", "undefined"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "Range too big"),
        ("{{ cycler().next() }}", "at least one item"),  # Python's RuntimeError
    ],
)
async def test_what_a_template_may_not_do_is_400(server: Server, template: str, what: str) -> None:
    server.engine.publish("poet", ServeSettings(chat_template=template))
    answer = await server.chat(adapter="poet")
    assert answer.status_code == 400, answer.text
    assert what in answer.json()["error"]["message"]


async def test_a_template_that_does_not_end_is_ended(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    loops = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(TemplateTooSlow):
        await asyncio.to_thread(
            run_template, lambda: byte_tokenizer(template=loops).apply_chat_template(HI, tokenize=False), 0.05
        )


async def test_a_template_cannot_make_a_prompt_beyond_the_context(server: Server) -> None:
    server.engine.publish("poet", ServeSettings(chat_template="{% for i in range(99999) %}xxxxxxxxxx{% endfor %}"))
    answer = await server.chat(adapter="poet")
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert str(CONTEXT) in answer.json()["error"]["message"]


@pytest.mark.parametrize("twice", [False, True])
async def test_a_tokenizer_with_added_tokens_leaves_the_base_s_alone(twice: bool) -> None:
    """Also one that is made from another one of this kind."""
    base, copied = byte_tokenizer(bos=True), byte_tokenizer(bos=True)
    for tokenizer in (base, copied):
        tokenizer.add_tokens(["<|known|>"], special_tokens=True)
    tools = make_tools(PromptTools(base, TextEncoder(base), None), (None, ("<|new|>", "<|known|>", " and ")))
    if twice:
        tools = make_tools(PromptTools(tools.tokenizer, tools.encoder, None), (None, ("<|other|>",)))
        copied.add_tokens(["<|new|>", " and ", "<|other|>"])
    else:
        copied.add_tokens(["<|new|>", "<|known|>", " and "])
    for text in ("a<|new|>b and <|known|> c", " and <|new|><|new|>", "<|other|>", "é"):
        ids = copied.encode(text)
        assert await tools.encoder.encode([text], 99, add_special_tokens=True) == [ids]
        assert tools.tokenizer.decode(ids) == copied.decode(ids)
        assert len(base.encode(text)) >= len(ids)
    assert base.convert_tokens_to_ids("<|new|>") in (None, base.unk_token_id)
