"""Adapters being copied to the device while steps run, and a device with little memory for adapters."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import peft
import pytest
import torch
from engine_session import Session
from parity import make_adapter
from torch import Tensor

from lora_serve.adapters.device_copy import DeviceCopier, PendingCopy
from lora_serve.adapters.device_slots import DeviceSlots
from lora_serve.messages import Call, PinAdapter
from lora_serve.request import AdapterUse, Tokens


class Later:
    """A CUDA event that completes when the test says so."""

    def __init__(self) -> None:
        self.come = False
        self.awaited = 0

    def query(self) -> bool:
        return self.come


class SlowCopy(PendingCopy):
    def __init__(self, source: Tensor, event: Later) -> None:
        super().__init__(source, event)  # type: ignore[arg-type]
        self._later = event

    def make_stream_wait(self) -> None:
        self._later.awaited += 1


class SlowCopier(DeviceCopier):
    """Copies that stay pending until the test completes them."""

    bytes_per_second = 1.0

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.events: list[Later] = []
        self.pinned = 0

    def pin_memory(self, flat: Tensor) -> None:
        self.pinned += 1

    def copy(self, flat: Tensor) -> tuple[Tensor, PendingCopy | None]:
        self.events.append(Later())
        return flat.clone(), SlowCopy(flat, self.events[-1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(("one", "two", "three")):
        make_adapter(
            "llama", folder / name, seed, peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
        )
    return folder


def device_slots(session: Session) -> DeviceSlots:
    return session.engine._registry.memory._device_slots


def evict_all_from_device(session: Session) -> None:
    memory = session.engine._registry.memory
    for version in list(memory._residency.device):
        memory._evict_from_device(version)


@pytest.fixture(params=[False, True], ids=["step by step", "overlapped"])
def session(folder: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Session]:
    session = Session(tmp_path, overlap=request.param, adapters=folder)
    device_slots(session).copier = SlowCopier()
    yield session
    session.engine.close()


def count(session: Session, id: str) -> int:
    return sum(isinstance(event, Tokens) for event in session.events.get(id, []))


def steps(session: Session, number: int) -> None:
    for _ in range(number):
        session.step()


def load(session: Session, name: str) -> None:
    """Load an adapter into host memory by running a request that uses it."""
    session.send(f"loads {name}", [7], adapter=name, max_tokens=1)
    session.run()


def test_other_streams_continue_while_an_adapter_is_copied(session: Session) -> None:
    copier = device_slots(session).copier
    assert isinstance(copier, SlowCopier)
    load(session, "two")
    evict_all_from_device(session)
    session.send("base", [5, 9, 33], max_tokens=40)
    steps(session, 3)
    session.send("waits", [5, 9, 33], adapter="two", max_tokens=4)
    before = count(session, "base")
    steps(session, 10)
    assert count(session, "base") - before >= 9
    assert count(session, "waits") == 0
    copier.events[-1].come = True
    session.run()
    assert (count(session, "base"), count(session, "waits")) == (40, 4)
    assert copier.pinned == 1


def test_a_copy_begins_with_the_adapters_turn_and_not_with_its_first_step(folder: Path, tmp_path: Path) -> None:
    session = Session(tmp_path, adapters=folder, max_num_seqs=1)
    load(session, "two")
    evict_all_from_device(session)
    device_slots(session).copier = copier = SlowCopier()
    session.send("base", [5, 9, 33], max_tokens=40)
    steps(session, 1)
    session.send("waits", [5, 9, 33], adapter="two", max_tokens=4)
    steps(session, 1)
    assert (count(session, "waits"), len(copier.events)) == (0, 1)
    session.engine.close()


def test_if_nothing_else_can_run_the_step_waits_for_the_copy(session: Session) -> None:
    copier = device_slots(session).copier
    assert isinstance(copier, SlowCopier)
    session.send("alone", [5, 9, 33], adapter="one", max_tokens=3)
    session.run()
    assert count(session, "alone") == 3
    assert copier.events[-1].awaited >= 3


def test_adapters_beyond_the_device_s_memory_take_turns(folder: Path, tmp_path: Path) -> None:
    session = Session(tmp_path, adapters=folder)
    wanted = {name: session.ask(f"first {name}", [5, 9, 33], adapter=name) for name in ("one", "two", "three")}
    size = device_slots(session).bytes // 3
    session.engine.close()
    capacity = 3 * size - 64
    session = Session(tmp_path / "small", adapters=folder, adapter_device_memory=capacity)
    for name in wanted:
        for number in range(3):
            session.send(f"{name} {number}", [5, 9, 33], adapter=name)
    most = 0
    while session.engine.busy or session.engine.stats().waiting:
        session.step()
        most = max(most, len(device_slots(session).ranks))
        assert device_slots(session).bytes <= capacity
    assert most == 2
    for name, tokens in wanted.items():
        assert all(session.tokens(f"{name} {number}") == tokens for number in range(3))
    session.engine.close()


def test_no_request_or_pin_gets_more_than_half_of_the_device_s_memory(folder: Path, tmp_path: Path) -> None:
    session = Session(tmp_path, adapters=folder)
    size = session.engine._calls._operations.describe("one").versions[0].memory_bytes
    session.engine.close()
    session = Session(tmp_path, adapter_device_memory=3 * size)
    session.send("both", [5, 9, 33], uses=(AdapterUse("one"), AdapterUse("two")))
    session.step()
    assert f"{3 * size // 2} are there for one request's" in session.refusal("both").message
    for number, name in enumerate(("one", "two")):
        session.engine.receive(Call(number, PinAdapter(name, True)))
    while len(session.replies) < 2:
        session.step()
    assert session.replies[0].failure is None
    assert "half of the memory" in session.replies[1].failure.message
    session.engine.close()
    session = Session(tmp_path, adapter_device_memory=2 * size - 2)
    assert session.engine._calls._operations.describe_some("")[0].broken is not None
    assert any("half of --adapter-device-memory" in note for note in session.engine.info.notes)
    session.send("large", [5, 9, 33], adapter="one")
    session.step()
    assert session.refusal("large").kind == "adapter_broken"
    session.engine.close()


class SmallDeviceCopier(DeviceCopier):
    """A device without memory for large copies."""

    def __init__(self, most: int) -> None:
        super().__init__(torch.device("cpu"))
        self._most = most

    def copy(self, flat: Tensor) -> tuple[Tensor, PendingCopy | None]:
        if flat.nbytes > self._most:
            raise torch.OutOfMemoryError("no memory")
        return super().copy(flat)


def test_if_the_device_is_out_of_memory_for_an_adapter_only_its_requests_fail(tmp_path: Path) -> None:
    for name, rank in (("small", 2), ("large", 16)):
        config = peft.LoraConfig(r=rank, target_modules=["q_proj"], task_type="CAUSAL_LM")
        make_adapter("llama", tmp_path / "adapters" / name, 1, config)
    session = Session(tmp_path, adapters=tmp_path / "adapters")
    wanted = {name: session.ask(f"{name} alone", [5, 9], adapter=name) for name in ("small", "large")}
    evict_all_from_device(session)
    device_slots(session).copier = SmallDeviceCopier(8000)
    for name in ("small", "large"):
        session.send(name, [5, 9], adapter=name)
    session.send("base", [5, 9])
    session.run()
    failure = session.end("large").failure
    assert failure is not None
    assert (failure.kind, session.tokens("large")) == ("unavailable", [])
    assert session.tokens("small") == wanted["small"]
    assert len(session.tokens("base")) == 8
    session.engine.close()
