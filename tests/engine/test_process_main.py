"""The engine process's loop, driven over a socket: when it sends, when it waits, when it pauses for a slow parent."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zmq
from fake_engine import Act, FakeEngine

from lora_serve.config import ServeConfig
from lora_serve.engine.process_main import run
from lora_serve.messages import Exit, FromEngine, Generate, Ready, Update, decode_from_engine, encode
from lora_serve.request import Finished, Request, Sampling


class Parent:
    """The parent's end of the socket, which queues at most `unread` messages."""

    def __init__(self, folder: Path, unread: int) -> None:
        self.address = f"ipc://{folder}/e"
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.DEALER)
        self.socket.rcvhwm = unread
        self.socket.rcvtimeo = 5000
        self.socket.bind(self.address)

    def receive(self) -> FromEngine:
        return decode_from_engine(self.socket.recv())

    def send(self, message: Generate | Exit) -> None:
        self.socket.send(encode(message))


class Counting(FakeEngine):
    pace = 0.0001
    steps = 0

    def step(self) -> Update:
        self.steps += 1
        return super().step()


class Training(Counting):
    """Trains for `left` quanta of a millisecond."""

    left = 0

    @property
    def busy(self) -> bool:
        return super().busy or self.left > 0

    def train(self) -> bool:
        if self.left:
            time.sleep(0.001)
            self.left -= 1
            return True
        return False


class Hosted:
    """A counting fake engine under `run`, in a thread."""

    def __init__(self, parent: Parent, kind: type[Counting] = Counting) -> None:
        self.kind = kind
        self.status: int | None = None
        self.built = threading.Event()
        self.thread = threading.Thread(target=self._run, args=(parent.address,))
        self.thread.start()
        self.built.wait(5)

    def _run(self, address: str) -> None:
        self.status = run(self._build, address, ServeConfig(model="fake", threads=1))

    def _build(
        self, config: ServeConfig, *, wake: Callable[[], None], progress: Callable[[str, float], None]
    ) -> Counting:
        self.engine = self.kind(config, 1)
        self.wake = wake
        self.built.set()
        return self.engine


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("s")


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def parent(folder: Path, environment: None) -> Iterator[Parent]:
    parent = Parent(folder, unread=10)
    yield parent
    parent.context.destroy(linger=0)


def test_an_idle_loop_sleeps_but_keeps_its_heartbeat_and_can_be_woken(parent: Parent) -> None:
    hosted = Hosted(parent)
    assert isinstance(parent.receive(), Ready)
    began = time.monotonic()
    first, second = parent.receive(), parent.receive()
    assert isinstance(first, Update)
    assert isinstance(second, Update)
    assert second.stats is not None
    assert time.monotonic() - began < 1.5
    assert hosted.engine.steps < 6
    before = hosted.engine.steps
    hosted.wake()
    time.sleep(0.1)
    assert hosted.engine.steps > before
    parent.send(Exit())
    hosted.thread.join(5)
    assert hosted.status == 0


def test_exit_gives_running_requests_their_terminal_event(parent: Parent) -> None:
    hosted = Hosted(parent)
    parent.send(Generate(Request("r", [Act.COUNT], Sampling(max_tokens=100_000))))
    while not (isinstance(message := parent.receive(), Update) and message.step):
        pass
    parent.send(Exit())
    events = []
    while not (events and events[-1] == Finished("r", "abort")):
        message = parent.receive()
        assert isinstance(message, Update)
        events += message.events
    hosted.thread.join(5)
    assert hosted.status == 0


def test_a_parent_that_does_not_read_pauses_generation_and_loses_nothing(parent: Parent) -> None:
    hosted = Hosted(parent)
    parent.send(Generate(Request("r", [Act.COUNT], Sampling(max_tokens=6000))))
    paused = -1
    while paused != hosted.engine.steps:  # until it no longer steps
        paused = hosted.engine.steps
        time.sleep(0.3)
    assert paused < 6000
    got: list[int] = []
    while len(got) < 6000:
        message = parent.receive()
        if isinstance(message, Update):
            got += [id for event in message.events for id in getattr(event, "token_ids", [])]
    assert got == list(range(6000))
    parent.send(Exit())
    hosted.thread.join(5)
    assert hosted.status == 0


def test_an_idle_engine_trains_without_pauses_hears_messages_meanwhile_and_sleeps_afterwards(parent: Parent) -> None:
    hosted = Hosted(parent, Training)
    engine = hosted.engine
    assert isinstance(engine, Training)
    engine.left = 400
    hosted.wake()
    time.sleep(0.1)
    began, left = time.monotonic(), engine.left
    assert left < 390
    parent.send(Generate(Request("r", [Act.COUNT], Sampling(max_tokens=3))))
    while not (isinstance(message := parent.receive(), Update) and Finished("r", "length") in message.events):
        pass
    assert engine.left > 0
    while engine.left:
        time.sleep(0.01)
    assert (time.monotonic() - began) / left < 0.004  # with a pause after each it were 0.006
    steps = engine.steps
    time.sleep(0.2)
    assert engine.steps - steps < 4
    parent.send(Exit())
    hosted.thread.join(5)
    assert hosted.status == 0
