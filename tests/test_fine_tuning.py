"""Fine-tuning jobs on a real server that is killed, and its engine: they go on, to the same bits."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import tarfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import peft
import pytest
import torch
from server_process import DEMO, ServerProcess, until
from transformers import AutoModelForCausalLM, AutoTokenizer

from demo.tasks import heldout_prompts

pytestmark = pytest.mark.slow

PROMPTS = heldout_prompts(24, seed=21)
CHAT = [
    {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": text.upper()}]}
    for text in PROMPTS
]
PREFERENCES = [
    {
        "input": {"messages": [{"role": "user", "content": text}]},
        "preferred_output": [{"role": "assistant", "content": text.upper()}],
        "non_preferred_output": [{"role": "assistant", "content": text}],
    }
    for text in PROMPTS
]
METHODS: dict[str, tuple[list[dict[str, Any]], float]] = {"supervised": (CHAT, 1e-3), "dpo": (PREFERENCES, 1e-4)}
P_TUNING = {
    "peft_type": "P_TUNING", "num_virtual_tokens": 4, "encoder_reparameterization_type": "LSTM",
    "encoder_hidden_size": 16,
}  # fmt: skip


def start(store: Path) -> ServerProcess:
    return ServerProcess(store, "--served-model-name", "demo", "--training-memory", "64MiB")


def upload(server: ServerProcess, lines: list[dict[str, Any]]) -> str:
    content = "\n".join(json.dumps(line) for line in lines).encode()
    answer = server.http.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": ("a.jsonl", content)})
    return str(answer.raise_for_status().json()["id"])


def create(server: ServerProcess, method: str, epochs: int = 6, **adapter: Any) -> str:
    lines, rate = METHODS[method]
    hyperparameters = {"n_epochs": epochs, "batch_size": 6}
    body = {
        "model": "demo", "training_file": upload(server, lines), "validation_file": upload(server, lines[:10]),
        "seed": 5, "method": {"type": method, method: {"hyperparameters": hyperparameters}},
        "trainer": {"learning_rate": rate}, "adapter": "made", **(adapter or {"lora": {"r": 4}}),
    }  # fmt: skip
    return str(server.http.post("/v1/fine_tuning/jobs", json=body).raise_for_status().json()["id"])


def job(server: ServerProcess, id_: str, action: str = "") -> dict[str, Any]:
    path = f"/v1/fine_tuning/jobs/{id_}{action}"
    answer = server.http.post(path) if action else server.http.get(path)
    found: dict[str, Any] = answer.raise_for_status().json()
    return found


def metrics(server: ServerProcess, id_: str) -> dict[int, dict[str, float]]:
    """Metrics by step; asserts that each step was told once."""
    events = server.http.get(f"/v1/fine_tuning/jobs/{id_}/events?limit=1000").json()["data"]
    found = [event["data"] for event in events if event["type"] == "metrics"]
    assert len({each["step"] for each in found}) == len(found)
    return {each["step"]: each for each in found}


def finish(server: ServerProcess, id_: str) -> str:
    """Wait for the end; returns the digest of the result."""
    until(lambda: job(server, id_)["status"] in ("succeeded", "failed", "cancelled"), 120)
    done = job(server, id_)
    assert (done["status"], done["error"]) == ("succeeded", None)
    return str(done["adapter"])


def reach(server: ServerProcess, id_: str, step: int) -> None:
    def reached() -> bool:
        assert job(server, id_)["status"] not in ("succeeded", "failed"), "it ended before it was disturbed"
        return max(metrics(server, id_), default=0) >= step

    until(reached, 60)


@pytest.fixture(scope="module", params=[*METHODS])
def undisturbed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, Any]:
    """A method, and the result and metrics of a job to which nothing happens."""
    with start(tmp_path_factory.mktemp("undisturbed")) as server:
        id_ = create(server, request.param)
        return request.param, finish(server, id_), metrics(server, id_)


def test_a_killed_engine_changes_no_bit(undisturbed: tuple[str, str, Any], tmp_path: Path) -> None:
    method, result, told = undisturbed
    with start(tmp_path / "store") as server:
        id_ = create(server, method)
        for step in (2, 9):
            reach(server, id_, step)
            os.kill(server.engine_pid, signal.SIGKILL)
            time.sleep(1)
        assert finish(server, id_) == result
        assert metrics(server, id_) == told
        assert server.metric("lora_serve_engine_restarts_total") == 2


def test_a_killed_server_changes_no_bit(undisturbed: tuple[str, str, Any], tmp_path: Path) -> None:
    method, result, told = undisturbed
    with start(tmp_path / "store") as server:
        id_ = create(server, method)
        reach(server, id_, 6)
        server.signal(signal.SIGKILL)
        server.wait(10)
    for number in (signal.SIGTERM, None):
        with start(tmp_path / "store") as server:
            reach(server, id_, 13)
            if number is not None:
                server.signal(number)
                assert server.wait(60) == 0
                continue
            assert finish(server, id_) == result
            assert metrics(server, id_) == told


def test_a_job_is_paused_while_others_answer_and_goes_on_after_a_restart(
    undisturbed: tuple[str, str, Any], tmp_path: Path
) -> None:
    method, result, told = undisturbed
    with start(tmp_path / "store") as server:
        id_ = create(server, method)
        reach(server, id_, 5)
        assert job(server, id_, "/pause")["status"] == "paused"
        assert server.complete(PROMPTS[0]) == PROMPTS[0]
        seen = metrics(server, id_)
        time.sleep(1)
        assert max(metrics(server, id_)) <= max(seen) + 1
    with start(tmp_path / "store") as server:
        assert job(server, id_)["status"] == "paused"
        job(server, id_, "/resume")
        assert finish(server, id_) == result
        assert metrics(server, id_) == told


def test_a_server_that_is_killed_at_any_moment_loses_no_job(tmp_path: Path) -> None:
    server = start(tmp_path / "store")
    ids = []
    for wait in (0.0, 0.1, 0.3, 0.6, 1.0):
        with server, suppress(httpx.TransportError):
            ids.append(create(server, "supervised", epochs=2))
            time.sleep(wait)
            server.signal(signal.SIGKILL)
            server.wait(10)
        server = start(tmp_path / "store")
    with server:
        for id_ in ids:
            until(lambda id_=id_: job(server, id_)["status"] == "succeeded", 120)  # type: ignore[misc]
        digests = {job(server, id_)["adapter"] for id_ in ids}
        assert len(digests) == 1
        staged = [path for path in (tmp_path / "store" / "staging").iterdir() if re.match("upload-", path.name)]
        assert staged == []


@pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")
def test_p_tuning_goes_on_after_a_killed_engine_and_is_served_as_peft_computes_it(tmp_path: Path) -> None:
    with start(tmp_path / "store") as server:
        first = finish(server, create(server, "supervised", epochs=3, peft=P_TUNING))
        id_ = create(server, "supervised", epochs=3, peft=P_TUNING)
        reach(server, id_, 5)
        os.kill(server.engine_pid, signal.SIGKILL)
        assert finish(server, id_) == first
        with tarfile.open(fileobj=io.BytesIO(server.http.get("/v1/adapters/made/files").content)) as files:
            files.extractall(tmp_path / "peft", filter="data")
        tokenizer = AutoTokenizer.from_pretrained(DEMO)
        base = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32)
        model = peft.PeftModel.from_pretrained(base, tmp_path / "peft").eval()
        for text in PROMPTS[:4]:
            ids = tokenizer(text + "\n", return_tensors="pt").input_ids
            with torch.no_grad():
                wanted = model.generate(input_ids=ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
            answer = tokenizer.decode(wanted, skip_special_tokens=True)
            assert server.complete(text, "made", max_tokens=12).rstrip("\n") == answer.rstrip("\n")


def test_jobs_train_every_method_at_once(tmp_path: Path) -> None:
    tokens = {"num_virtual_tokens": 4}
    asked: dict[str, dict[str, Any]] = {
        "lora": {"peft_type": "LORA", "r": 4, "use_dora": True},
        "ia3": {"peft_type": "IA3", "feedforward_modules": ["down_proj"]},
        "prompt": {"peft_type": "PROMPT_TUNING", **tokens},
        "mlp": {"peft_type": "P_TUNING", "encoder_hidden_size": 16, **tokens},
        "prefix": {"peft_type": "PREFIX_TUNING", **tokens},
        "projection": {"peft_type": "PREFIX_TUNING", "prefix_projection": True, **tokens},
    }
    with start(tmp_path / "store") as server:
        ids = [create(server, "supervised", epochs=2, adapter=name, peft=own) for name, own in asked.items()]
        for name, id_ in zip(asked, ids, strict=True):
            assert finish(server, id_).startswith(f"{name}@")
            assert len(metrics(server, id_)) == 8
            assert server.complete(PROMPTS[0], name)
