"""The client with a real engine process and a fake core: streams, calls, crashes, hangs, slow readers, drain."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest
from fake_engine import Act

from lora_serve.config import ServeConfig
from lora_serve.engine.client import EngineClient
from lora_serve.engine.engine_process import EngineProcess
from lora_serve.errors import AdapterNotFound, EngineFault, ModelUnsupported, Overloaded, Unavailable
from lora_serve.messages import Abort, Call, ListAdapters, LoadAdapter, PinAdapter, Reply, Update
from lora_serve.request import Admitted, Event, Finished, Request, Sampling, Tokens

COMMAND = (sys.executable, str(Path(__file__).with_name("fake_engine.py")))


def config(model: str = "fake", **options: object) -> ServeConfig:
    return ServeConfig(model=model, **options)  # type: ignore[arg-type]


def request(id: str, act: Act = Act.COUNT, tokens: int = 5) -> Request:
    return Request(id, [int(act)], Sampling(max_tokens=tokens))


@asynccontextmanager
async def engine(model: str = "fake", unread_tokens: int = 4096, **options: object) -> AsyncIterator[EngineClient]:
    client = EngineClient(config(model, **options), command=COMMAND, unread_tokens=unread_tokens)
    await client.start()
    try:
        yield client
    finally:
        await client.stop()


def engine_pid(parent: int | None = None) -> int:
    """Process id of the fake engine that a process (default: this one) has started."""
    (pid,) = (child.pid for child in psutil.Process(parent).children() if COMMAND[1] in child.cmdline())
    return pid


async def read(stream: AsyncGenerator[Event, None]) -> list[Event]:
    return [event async for event in stream]


def tokens(events: list[Event]) -> list[int]:
    return [id for event in events if isinstance(event, Tokens) for id in event.token_ids]


def end(events: list[Event]) -> Finished:
    assert isinstance(events[-1], Finished)
    return events[-1]


async def reply(child: EngineProcess) -> Reply:
    while not isinstance(message := await child.receive(), Reply):
        assert message is not None
    return message


async def until(true: Callable[[], bool], seconds: float = 8.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "did not become true in time"
        await asyncio.sleep(0.01)


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


# --- streams and calls -----------------------------------------------------------------------------------------------


async def test_concurrent_streams_get_their_own_events_in_order() -> None:
    async with engine() as client:
        results = await asyncio.gather(*(read(client.generate(request(f"r{n}", tokens=n + 1))) for n in range(8)))
    for n, events in enumerate(results):
        assert events[0] == Admitted(f"r{n}", [])
        assert tokens(events) == list(range(n + 1))
        assert events[-1] == Finished(f"r{n}", "length")


async def test_a_message_that_has_arrived_is_read_even_if_one_is_sent_first() -> None:
    """Sending consumes the socket's signal, and it signals no other message before this one is read."""
    child = await EngineProcess.spawn(COMMAND, config())
    try:
        await child.wait_until_ready(lambda stage, fraction: None)
        for id in range(4):
            child.send(Call(id, ListAdapters()))
            answer = asyncio.ensure_future(reply(child))
            await asyncio.sleep(0)
            time.sleep(0.03)  # the answer arrives while the loop does not run
            child.send(Abort("unknown"))
            assert (await asyncio.wait_for(answer, 5)).id == id
    finally:
        await child.close()


async def test_a_closed_stream_aborts_its_request_and_late_events_are_ignored() -> None:
    async with engine() as client:
        stream = client.generate(request("left", tokens=100_000))
        await anext(stream)
        await stream.aclose()
        unstarted = client.generate(request("never", tokens=100_000))
        await unstarted.aclose()
        assert await client.call(ListAdapters()) == []  # the fake lists what runs
        assert tokens(await read(client.generate(request("next")))) == [0, 1, 2, 3, 4]
        assert "0 streams" in repr(client)


async def test_a_cancelled_reader_aborts_its_request() -> None:
    async with engine() as client:
        task = asyncio.create_task(read(client.generate(request("gone", tokens=100_000))))
        await until(lambda: client.stats.running == 1)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await until(lambda: client.stats.running == 0)


async def test_a_call_returns_its_answer_or_raises_the_engines_error() -> None:
    async with engine() as client:
        assert await client.call(ListAdapters()) == []
        with pytest.raises(AdapterNotFound, match="no adapter x") as caught:
            await client.call(PinAdapter("x", True))
        assert caught.value.param == "name"


async def test_observers_get_every_update_and_a_failing_one_affects_nothing_else() -> None:
    seen: list[Update] = []

    def faulty(update: Update) -> None:
        raise RuntimeError("a bug in an observer")

    async with engine() as client:
        client.observe(faulty)
        client.observe(seen.append)
        await read(client.generate(request("r")))
        assert sum(update.step.tokens for update in seen if update.step) >= 4
        seen.clear()
        await until(lambda: len(seen) >= 2, 3.0)  # idle: the heartbeat goes on, and carries numbers
        assert seen[-1].stats is not None


async def test_a_reader_that_does_not_read_is_cut_off_while_others_go_on() -> None:
    async with engine(unread_tokens=500) as client:
        slow = client.generate(request("slow", Act.FLOOD, tokens=1_000_000))
        await anext(slow)
        others = await read(client.generate(request("other", tokens=50)))
        await until(lambda: client.stats.running == 0)  # the engine was told to abort it
        rest = await read(slow)
        assert end(rest).reason == "error"
        assert 0 < len(tokens(rest)) <= 500
        assert tokens(rest) == list(range(len(tokens(rest))))  # what it does get has no gap
        assert tokens(others) == list(range(50))


async def test_requests_beyond_the_limit_are_refused_at_once() -> None:
    async with engine(max_queue=1, max_num_seqs=1) as client:
        open_streams = [client.generate(request(f"r{n}", tokens=100_000)) for n in range(2)]
        for stream in open_streams:
            await anext(stream)
        with pytest.raises(Overloaded) as caught:
            await anext(client.generate(request("third")))
        assert caught.value.retry_after
        for stream in open_streams:
            await stream.aclose()


# --- start -----------------------------------------------------------------------------------------------------------


async def test_start_reports_progress_and_passes_the_configuration_on() -> None:
    seen: list[tuple[str, float]] = []
    client = EngineClient(config(adapter_slots=7, threads=2), command=COMMAND)
    assert not client.ready
    assert client.info is None
    with pytest.raises(Unavailable):
        await anext(client.generate(request("early")))
    await client.start(lambda stage, fraction: seen.append((stage, fraction)))
    assert client.ready
    assert client.info is not None
    assert (client.info.adapter_slots, client.info.dtype) == (7, "threads 2, 2")
    assert seen == [("weights", 0.5), ("adapters", 1.0)]
    await client.stop()
    assert not client.alive


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        ("unsupported", ModelUnsupported, "no such architecture"),
        ("broken", EngineFault, "ValueError"),
        ("dies", EngineFault, "exit status 7"),
    ],
)
async def test_a_first_start_that_fails_says_why(model: str, error: type[Exception], message: str) -> None:
    client = EngineClient(config(model), command=COMMAND)
    with pytest.raises(error, match=message):
        await client.start()
    await client.stop()


async def test_a_start_can_be_cancelled() -> None:
    client = EngineClient(config("slow"), command=COMMAND)
    begun = asyncio.Event()
    start = asyncio.create_task(client.start(lambda stage, fraction: begun.set()))
    await begun.wait()
    start.cancel()
    await asyncio.wait_for(asyncio.gather(start, return_exceptions=True), 3)
    await client.stop()


# --- death -----------------------------------------------------------------------------------------------------------


async def test_when_the_engine_is_killed_its_requests_end_with_errors_and_it_is_restarted(tmp_path: Path) -> None:
    async with engine(store=tmp_path) as client:
        readers = [asyncio.create_task(read(client.generate(request(f"r{n}", tokens=100_000)))) for n in range(20)]
        call = asyncio.create_task(client.call(LoadAdapter("never-answered")))
        await until(lambda: client.stats.running == 20)
        os.kill(engine_pid(), signal.SIGKILL)
        killed = time.monotonic()
        for events in await asyncio.gather(*readers):
            failure = end(events).failure
            assert failure is not None
            assert isinstance(failure.error(), Unavailable)
            assert failure.retry_after
            assert tokens(events) == list(range(len(tokens(events))))
        with pytest.raises(Unavailable):
            await call
        assert time.monotonic() - killed < 1.0
        assert not client.ready
        with pytest.raises(Unavailable):
            await anext(client.generate(request("too-early")))
        await until(lambda: client.ready)
        assert client.restarts == 1
        assert client.info is not None
        assert client.info.parameters == 2  # the fake's second start: the API sees the new engine's info
        assert tokens(await read(client.generate(request("r0")))) == [0, 1, 2, 3, 4]


async def test_an_engine_whose_loop_hangs_is_detected_and_restarted() -> None:
    async with engine(heartbeat_timeout=1.6) as client:
        began = time.monotonic()
        reader = asyncio.create_task(read(client.generate(request("stuck", Act.HANG))))
        await until(lambda: not client.alive, 3)
        assert not reader.done()  # red before the watchdog acts
        events = await reader
        assert end(events).reason == "error"
        assert time.monotonic() - began < 4.0
        await until(lambda: client.ready)
        assert tokens(await read(client.generate(request("after")))) == [0, 1, 2, 3, 4]


async def test_an_engine_whose_step_raises_is_restarted() -> None:
    async with engine() as client:
        assert end(await read(client.generate(request("bad", Act.CRASH)))).reason == "error"
        await until(lambda: client.restarts == 1)
        assert client.ready


async def test_a_failed_restart_is_retried(tmp_path: Path) -> None:
    async with engine("second-start-fails", store=tmp_path) as client:
        os.kill(engine_pid(), signal.SIGKILL)
        await until(lambda: client.restarts == 1)
        assert client.ready
        assert len(list(tmp_path.iterdir())) == 3


async def test_what_is_sent_to_an_engine_that_has_just_died_ends_like_what_was_running() -> None:
    async with engine() as client:
        os.kill(engine_pid(), signal.SIGKILL)
        time.sleep(0.1)  # its end of the socket is gone, and this process has not heard of it
        stream = asyncio.create_task(read(client.generate(request("late"))))
        call = asyncio.create_task(client.call(ListAdapters()))
        assert end(await asyncio.wait_for(stream, 5.0)).reason == "error"
        with pytest.raises(Unavailable):
            await call
        await until(lambda: client.ready, 5.0)
        begun = time.monotonic()
        await client.drain(10.0)  # no reader is left over
        assert time.monotonic() - begun < 2.0


async def test_a_client_can_be_stopped_when_its_engine_has_just_died() -> None:
    async with engine():
        os.kill(engine_pid(), signal.SIGKILL)
        time.sleep(0.1)


async def test_the_engine_does_not_outlive_a_killed_parent() -> None:
    parent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", PARENT, *COMMAND, stdout=asyncio.subprocess.PIPE
    )
    assert parent.stdout is not None
    await parent.stdout.readline()  # its engine is ready
    child = engine_pid(parent.pid)
    parent.kill()
    await parent.communicate()
    await until(lambda: gone(child), 3.0)


PARENT = """
import asyncio, sys
from lora_serve.config import ServeConfig
from lora_serve.engine.client import EngineClient

async def main():
    client = EngineClient(ServeConfig(model="fake"), command=sys.argv[1:])
    await client.start()
    print("ready", flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


# --- drain and stop --------------------------------------------------------------------------------------------------


async def test_drain_lets_running_requests_finish_and_refuses_new_ones() -> None:
    async with engine() as client:
        reader = asyncio.create_task(read(client.generate(request("running", tokens=100))))
        await until(lambda: client.stats.running == 1)
        drain = asyncio.create_task(client.drain(10.0))
        await asyncio.sleep(0)
        assert client.alive
        assert not client.ready
        with pytest.raises(Unavailable):
            await anext(client.generate(request("late")))
        await drain
        assert reader.done()
        assert end(reader.result()).reason == "length"


async def test_drain_has_a_deadline_and_stop_ends_the_rest_with_an_error() -> None:
    async with engine() as client:
        reader = asyncio.create_task(read(client.generate(request("long", tokens=100_000))))
        await until(lambda: client.stats.running == 1)
        pid = engine_pid()
        began = time.monotonic()
        await client.drain(0.2)
        assert time.monotonic() - began < 1.0
        assert not reader.done()
        await client.stop()
        failure = end(await reader).failure
        assert failure is not None
        assert isinstance(failure.error(), Unavailable)
        assert gone(pid)


@pytest.mark.parametrize("model", ["fake", "slow-close"])
async def test_the_engine_ends_by_itself_even_while_it_waits_for_a_load(
    model: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with engine(model) as client:
        pid = engine_pid()
        began = time.monotonic()
        await client.stop()
        assert time.monotonic() - began < 3
    assert not psutil.pid_exists(pid)
    assert "is killed" not in caplog.text


async def test_stop_during_a_restart_leaves_nothing_running(tmp_path: Path) -> None:
    async with engine("second-start-fails", store=tmp_path) as client:
        os.kill(engine_pid(), signal.SIGKILL)
        await until(lambda: not client.alive)
        await asyncio.wait_for(client.stop(), 3)
        assert not client.alive
