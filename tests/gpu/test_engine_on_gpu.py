"""The engine on the GPU with one step in flight, and the whole server."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from embedding_parity import describe_pooling, embed, embedding, hidden_states, pooled
from engine.engine_session import Session
from gpu_device import DEVICE, ON_GPU, here
from parity import load_peft, make_adapter
from server_process import ADAPTERS, ServerProcess
from support import reference

from demo.tasks import TASKS, heldout_prompts
from lora_serve.errors import Unavailable
from lora_serve.messages import Call, EvictAdapter, Publish
from lora_serve.model.batch import Batch

pytestmark = [*here, pytest.mark.filterwarnings("ignore::UserWarning")]  # PEFT warns
PROMPTS = [[5, 9, 33, 60, 21], [7, 8, 40], list(range(3, 40)), [11]]


@pytest.fixture
def session(tmp_path: Path) -> Iterator[Session]:
    session = Session(tmp_path, overlap=True, device=str(DEVICE), max_num_seqs=8)
    yield session
    session.engine.close()


def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    with torch.inference_mode():
        return model.generate(
            input_ids=torch.tensor([prompt]), max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0
        )[0, len(prompt):].tolist()  # fmt: skip


def test_greedy_batches_equal_transformers_generate(session: Session) -> None:
    for index, prompt in enumerate(PROMPTS):
        session.send(str(index), prompt, max_tokens=10)
    session.run()
    for index, prompt in enumerate(PROMPTS):
        assert session.tokens(str(index)) == greedy(reference("llama"), prompt, 10)
    assert session.blocks_used == 0


@pytest.mark.parametrize("mode", ["mean", "lasttoken"])
def test_embeddings_beside_generation_equal_transformers(tmp_path: Path, mode: str) -> None:
    describe_pooling(tmp_path / "base", mode, normalize=False)
    session = Session(tmp_path, overlap=True, device=str(DEVICE), max_num_seqs=8)
    session.send("running", PROMPTS[0], max_tokens=10)
    session.step()
    for index, prompt in enumerate(PROMPTS):
        embed(session, str(index), prompt)
    session.run()
    assert session.tokens("running") == greedy(reference("llama"), PROMPTS[0], 10)
    for index, prompt in enumerate(PROMPTS):
        want = pooled(hidden_states(reference("llama").model, prompt), mode, normalize=False)
        torch.testing.assert_close(embedding(session, str(index)), want, atol=1e-4, rtol=1e-4)
    session.engine.close()


def test_adapters_that_are_loaded_and_evicted_equal_peft(session: Session, tmp_path: Path) -> None:
    for seed, rank in enumerate((4, 32)):
        folder = tmp_path / f"a{seed}"
        make_adapter("llama", folder, seed, peft.LoraConfig(r=rank, target_modules=["q_proj", "down_proj"]))
        session.engine.receive(Call(seed, Publish(folder.name, str(folder))))
    while len(session.replies) < 2:
        session.step()
    for turn in range(2):
        for index, prompt in enumerate(PROMPTS):
            adapter = None if index == 3 else f"a{index % 2}"
            session.send(f"{turn}/{index}", prompt, adapter=adapter, max_tokens=10)
        session.run()
        for seed in range(2):
            session.engine.receive(Call(10 + 2 * turn + seed, EvictAdapter(f"a{seed}")))
        session.run()
    models = [load_peft("llama", tmp_path / f"a{seed}") for seed in range(2)]
    for index, prompt in enumerate(PROMPTS):
        wanted = greedy(reference("llama") if index == 3 else models[index % 2], prompt, 10)
        for turn in range(2):
            assert session.tokens(f"{turn}/{index}") == wanted


def test_a_prompt_that_runs_out_of_memory_ends_only_its_own_request(session: Session) -> None:
    base = session.engine._runner._base
    forward = base.forward

    def forward_that_runs_out_of_memory(batch: Batch) -> torch.Tensor:
        if any(position > 40 for position in batch.positions):
            torch.empty(1 << 46, device=DEVICE)  # raises OutOfMemoryError
        return forward(batch)

    base.forward = forward_that_runs_out_of_memory  # type: ignore[method-assign]
    session.send("small", PROMPTS[0], max_tokens=20)
    session.send("large", list(range(3, 90)), max_tokens=4)
    session.send("other", PROMPTS[1], max_tokens=20)
    session.run()
    failure = session.end("large").failure
    assert failure is not None
    assert failure.kind == Unavailable.kind  # a 503
    for id, prompt in (("small", PROMPTS[0]), ("other", PROMPTS[1])):
        assert session.tokens(id) == greedy(reference("llama"), prompt, 20)
    assert session.ask("later", PROMPTS[3]) == greedy(reference("llama"), PROMPTS[3], 8)
    assert session.blocks_used == 0


def test_a_server_on_the_gpu_answers_as_one_on_the_cpu(tmp_path: Path) -> None:
    texts = heldout_prompts(4 if ON_GPU else 1, seed=21)
    jobs = [(text, name) for text in texts for name in (None, *TASKS)]

    def answers(device: str) -> list[str]:
        options = ("--adapters", str(ADAPTERS), "--device", device, "--dtype", "float32", "--max-num-seqs", "16")
        with ServerProcess(tmp_path / f"store-{device}", *options) as server, ThreadPoolExecutor(8) as pool:
            return [*pool.map(lambda job: server.complete(*job), jobs)]

    found = answers(DEVICE.type)
    assert found == answers("cpu")
    right = sum(answer == TASKS[name].answer(text) for (text, name), answer in zip(jobs, found, strict=True) if name)
    assert right >= 0.8 * len(texts) * len(TASKS)
