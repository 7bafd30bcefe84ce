"""An engine whose base two processes share generates the tokens of one that has it whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import psutil
import pytest
import torch
from embedding_parity import embed, embedding
from engine_session import Session
from parity import make_adapter
from server_process import until

from lora_serve.adapters.adapter import Adapter, BaseShape
from lora_serve.engine.base_setup import device_of
from lora_serve.engine.cores import compute_threads
from lora_serve.engine.rank_commands import EmptySlot, FilledSlot
from lora_serve.engine.ranks import LeadingDeviceSlots
from lora_serve.errors import ModelUnsupported
from lora_serve.messages import Call, EvictAdapter
from lora_serve.model.tensor_parallel import RanksOutOfStep

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

TASK: dict[str, Any] = {"task_type": "CAUSAL_LM"}
CONFIGS: dict[str, Any] = {
    "odd": peft.LoraConfig(r=5, target_modules=["q_proj", "o_proj", "down_proj"], use_rslora=True, **TASK),
    "wide": peft.LoraConfig(r=24, target_modules=["v_proj", "up_proj", "down_proj"], bias="all", **TASK),
    "prefix": peft.PrefixTuningConfig(num_virtual_tokens=6, **TASK),
}
EMBEDDER = peft.LoraConfig(r=3, target_modules=["q_proj", "down_proj"], task_type="FEATURE_EXTRACTION")
PROMPTS = [[5, 9, 33, 60, 21], [7, 8, 40], list(range(3, 40))]  # the last one is prefilled in three chunks
NAMES = [None, *CONFIGS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    for seed, (name, config) in enumerate((CONFIGS | {"embedder": EMBEDDER}).items()):
        make_adapter("qwen2", folder / name, seed, config, reload=False)
    return folder


def answers(session: Session) -> dict[str, list[int]]:
    """Tokens of every prompt under every adapter: all at once, with more adapters than slots, then after evictions."""
    found = {}
    for again in ("", " again"):
        requests = [(f"{name} {index}{again}", name, index) for name in NAMES for index in range(len(PROMPTS))]
        for id, name, index in requests:
            session.send(id, PROMPTS[index], adapter=name, tenant=str(index))
        session.run()
        found |= {id: session.tokens(id) for id, _, _ in requests}
        session.engine.receive(Call(1, EvictAdapter("odd")))
        session.run()
    return found


def session(size: int, folder: Path, store: Path, *, overlap: bool = False, **options: Any) -> Session:
    shared: dict[str, Any] = {"adapters": folder, "adapter_slots": 2, "dtype": "float32", "tensor_parallel": size}
    return Session(store, architecture="qwen2", overlap=overlap, **(shared | options))


@pytest.fixture(scope="module")
def one(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, list[int]], torch.Tensor]:
    """What an engine generates that has the base whole, and an embedding that it makes."""
    whole = session(1, folder, tmp_path_factory.mktemp("whole"))
    found = answers(whole)
    embed(whole, "embedded", PROMPTS[2], adapter="embedder")
    whole.run()
    whole.engine.close()
    each = [tuple(tuple(found[f"{name} {index}"]) for index in range(len(PROMPTS))) for name in NAMES]
    assert len(set(each)) == len(NAMES), "an adapter that changes nothing proves nothing"
    return found, embedding(whole, "embedded")


def ranks() -> list[int]:
    """Process ids of this process's ranks."""
    return [each.pid for each in psutil.Process().children() if "lora_serve.engine.rank_main" in each.cmdline()]


@pytest.mark.parametrize("overlap", [False, True], ids=["step by step", "overlapped"])
def test_two_processes_generate_what_one_does(
    overlap: bool, folder: Path, one: tuple[dict[str, list[int]], torch.Tensor], tmp_path: Path
) -> None:
    wanted, embedded = one
    shared = session(2, folder, tmp_path, overlap=overlap, threads=2)
    assert shared.engine.info.tensor_parallel == 2
    assert len(ranks()) == 1
    assert torch.get_num_threads() == 1  # of 2
    assert answers(shared) == wanted
    embed(shared, "embedded", PROMPTS[2], adapter="embedder")
    shared.run()
    torch.testing.assert_close(embedding(shared, "embedded"), embedded, atol=1e-5, rtol=1e-5)
    shared.engine.close()
    assert ranks() == []


def test_a_base_that_cannot_be_shared_is_refused_and_leaves_no_process(tmp_path: Path) -> None:
    with pytest.raises(ModelUnsupported, match="gpt2 has no plan for tensor parallelism"):
        Session(tmp_path, architecture="gpt2", tensor_parallel=2)
    until(lambda: ranks() == [])


@pytest.mark.parametrize("device", ["cuda", "auto"])
def test_more_devices_than_there_are_are_refused(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [str(device_of(device, rank, 2)) for rank in range(2)] == ["cuda:0", "cuda:1"]
    with pytest.raises(ModelUnsupported, match=r"--tensor-parallel 3: torch \S+ sees 2 GPUs"):
        device_of(device, 0, 3)
    with pytest.raises(ModelUnsupported, match="cuda:1 is one device"):
        device_of("cuda:1", 0, 2)


def test_an_adapter_for_which_one_rank_has_no_memory_is_in_none(tmp_path: Path) -> None:
    class OneRank:
        """The other ranks, one of which has no memory for the first adapter."""

        def __init__(self) -> None:
            self.slots, self.told = [None, 2], list[object]()

        def tell(self, command: object, flat: object = None) -> None:
            self.told.append(command)

        def answers(self) -> list[FilledSlot]:
            return [FilledSlot(self.slots.pop(0))]

    others = OneRank()
    base = BaseShape({}, (), lambda site: torch.empty(0))
    device_slots = LeadingDeviceSlots(others, base, 2, torch.float32, torch.device("cpu"))  # type: ignore[arg-type]
    adapter = Adapter("digest", torch.zeros(16), {})
    with pytest.raises(torch.OutOfMemoryError):
        device_slots.load(adapter)
    assert repr(device_slots) == "<DeviceSlots 0 of 2 slots, 0 bytes>"
    assert isinstance(others.told[-1], EmptySlot)
    with pytest.raises(RanksOutOfStep, match="different slots"):  # slot 1 here, 2 there
        device_slots.load(adapter)


@pytest.mark.parametrize(("configured", "ranks", "each"), [(8, 2, 4), (3, 2, 1), (1, 4, 1)])
def test_threads_are_divided_among_ranks(configured: int, ranks: int, each: int) -> None:
    assert compute_threads(configured, ranks) == each
