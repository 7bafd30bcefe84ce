"""Quotas of keys: what is refused, when it is allowed again, and the headers that say so."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx
import pytest
from stub_admin import refusal
from stub_completions import StubCompletionApp

from lora_serve.api.caller import Caller, Limits
from lora_serve.api.error_handlers import RateLimited
from lora_serve.api.key_file import Keys, hash_key
from lora_serve.api.quotas import SWEEP, Quotas
from lora_serve.api.request_record import RequestRecord


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def quotas(clock: Clock) -> Quotas:
    return Quotas(clock)


def use(quotas: Quotas, caller: Caller, *adapters: str, tokens: int = 0) -> dict[str, str]:
    """Run a request of so many tokens, at once; its response headers."""
    record = RequestRecord()
    with quotas.use(caller, adapters, record) as quota:
        record.prompt_tokens, record.completion_tokens = tokens // 2, tokens - tokens // 2
    return quota.headers


def refused(quotas: Quotas, caller: Caller, *adapters: str) -> RateLimited:
    with pytest.raises(RateLimited) as error:
        use(quotas, caller, *adapters)
    return error.value


def test_requests_come_back_evenly_over_the_minute(quotas: Quotas, clock: Clock) -> None:
    caller = Caller("a", limits=Limits(requests_per_minute=6))
    for left in (5, 4, 3, 2, 1, 0):
        assert use(quotas, caller)["x-ratelimit-remaining-requests"] == str(left)
    error = refused(quotas, caller)
    assert error.retry_after == pytest.approx(10)
    assert error.headers == {
        "x-ratelimit-limit-requests": "6",
        "x-ratelimit-remaining-requests": "0",
        "x-ratelimit-reset-requests": "1m0s",
    }
    clock.now += 10.01
    use(quotas, caller)
    refused(quotas, caller)


def test_tokens_are_taken_when_a_request_ends_and_a_debt_is_waited_for(quotas: Quotas, clock: Clock) -> None:
    caller = Caller("a", limits=Limits(tokens_per_minute=600))
    assert use(quotas, caller, tokens=900)["x-ratelimit-remaining-tokens"] == "600"
    assert refused(quotas, caller).retry_after == pytest.approx(30.1)
    clock.now += 31
    assert use(quotas, caller)["x-ratelimit-remaining-tokens"] == "10"


def test_requests_at_the_same_time_are_counted_until_each_has_ended(quotas: Quotas) -> None:
    caller = Caller("a", limits=Limits(concurrent=1))
    with quotas.use(caller, (), RequestRecord()):
        assert "1 requests at the same time" in refused(quotas, caller).message
    use(quotas, caller)


def test_a_refused_request_takes_nothing(quotas: Quotas) -> None:
    caller = Caller("a", limits=Limits(concurrent=1, requests_per_minute=3))
    with quotas.use(caller, (), RequestRecord()):
        for _ in range(5):
            refused(quotas, caller)
    assert use(quotas, caller)["x-ratelimit-remaining-requests"] == "1"


def test_keys_and_adapters_have_quotas_of_their_own(quotas: Quotas) -> None:
    one, other = (Caller(name, limits_per_adapter=Limits(requests_per_minute=1)) for name in "ab")
    use(quotas, one, "poet")
    assert "for key a with adapter poet" in refused(quotas, one, "poet").message
    assert "for key a with adapter poet" in refused(quotas, one, "clerk", "poet").message
    use(quotas, one, "clerk")  # of which nothing was taken by the refused one
    use(quotas, one)
    assert "for key a with the base" in refused(quotas, one).message
    use(quotas, other, "poet")


def test_what_an_alias_chose_counts_as_well_as_the_alias(quotas: Quotas) -> None:
    caller = Caller("a", limits_per_adapter=Limits(requests_per_minute=2, concurrent=1))
    with quotas.use(caller, ("prod",), RequestRecord()) as quota:
        quota.count(["poet"])
        quota.count(["poet"])  # of another choice of the same call
        assert "with adapter poet" in refused(quotas, caller, "poet").message
        assert "with adapter prod" in refused(quotas, caller, "prod").message
    use(quotas, caller, "poet")
    with quotas.use(caller, ("other",), RequestRecord()) as quota, pytest.raises(RateLimited, match="adapter poet"):
        quota.count(["poet"])
    use(quotas, caller, "prod")


def test_limits_that_the_key_file_changes_count_at_once(quotas: Quotas) -> None:
    use(quotas, Caller("a", limits=Limits(requests_per_minute=1)))
    use(quotas, Caller("a", limits=Limits(requests_per_minute=2)))
    use(quotas, Caller("a"))


def test_a_sweep_forgets_nothing_that_is_in_use(quotas: Quotas) -> None:
    caller = Caller("a", limits=Limits(concurrent=1), limits_per_adapter=Limits(requests_per_minute=1))
    for number in range(SWEEP + 5):
        use(quotas, caller, f"made-up-{number}")
    with quotas.use(caller, ("one",), RequestRecord()):
        refused(quotas, caller, "another")


def test_names_that_are_made_up_do_not_fill_the_memory(quotas: Quotas, clock: Clock) -> None:
    caller = Caller("a", limits_per_adapter=Limits(requests_per_minute=60))
    for number in range(3 * SWEEP):
        clock.now += 0.01
        use(quotas, caller, f"made-up-{number}")
    assert len(quotas._states) < 2 * SWEEP


@pytest.fixture
def server(tmp_path: Path) -> StubCompletionApp:
    callers = {
        "sk-few": Caller("few", limits=Limits(requests_per_minute=2, tokens_per_minute=100)),
        "sk-one": Caller("one", limits=Limits(concurrent=1)),
        "sk-free": Caller("free"),
    }
    return StubCompletionApp(tmp_path, Keys({hash_key(key): caller for key, caller in callers.items()}))


@pytest.mark.parametrize("stream", [False, True])
async def test_a_response_says_what_is_left_and_a_refusal_when_to_try_again(
    server: StubCompletionApp, stream: bool
) -> None:
    answers = [await server.complete("sk-few", max_tokens=2, stream=stream) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert [answer.headers["x-ratelimit-remaining-requests"] for answer in answers] == ["1", "0", "0"]
    assert [answer.headers["x-ratelimit-limit-tokens"] for answer in answers] == ["100"] * 3
    assert int(answers[1].headers["x-ratelimit-remaining-tokens"]) < 100
    assert answers[2].json()["error"]["code"] == "rate_limit_exceeded"
    assert answers[2].json()["error"]["type"] == "rate_limit_error"
    assert 25 <= int(answers[2].headers["Retry-After"]) <= 30
    assert (await server.post("/v1/embeddings", {"input": "hi"}, "sk-few")).status_code == 429


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/embeddings"])
async def test_the_quota_of_an_adapter_cannot_be_gone_round_by_an_alias(tmp_path: Path, path: str) -> None:
    caller = Caller("some", limits_per_adapter=Limits(requests_per_minute=1))
    server = StubCompletionApp(tmp_path, Keys({hash_key("sk-some"): caller}))
    server.engine.resolves.update(prod="poet", test="poet")
    body = {"prompt": "hi", "max_tokens": 2} if path == "/v1/completions" else {"input": "hi"}
    assert (await server.post(path, body | {"adapter": "prod"}, "sk-some")).status_code == 200
    for name in ("poet", "test"):
        answer = await server.post(path, body | {"adapter": name}, "sk-some")
        assert refusal(answer)[::2] == (429, "1 requests a minute are allowed for key some with adapter poet")
    assert len(server.engine.closed) == 2


async def test_a_key_without_limits_has_no_such_headers(server: StubCompletionApp) -> None:
    assert not [name for name in (await server.complete("sk-free")).headers if name.startswith("x-ratelimit")]


async def test_a_request_that_its_client_leaves_counts_no_longer(server: StubCompletionApp) -> None:
    server.engine.forever = True
    running = asyncio.create_task(server.complete("sk-one", max_tokens=60))
    while not server.engine.requests:
        await asyncio.sleep(0)
    status, _, message = refusal(await server.complete("sk-one"))
    assert (status, message) == (429, "1 requests at the same time are allowed for key one")
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    server.engine.forever = False
    answer: httpx.Response = await server.complete("sk-one")
    assert answer.status_code == 200
