"""The demo on the real server: every adapter does its task, in mixed batches, together with the base.

And what the documentation says that people see with it: sizes, and an adapter of their own.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from server_process import ADAPTERS, DEMO, ROOT, ServerProcess

from demo.tasks import TASKS, heldout_prompts
from lora_serve.kv.tensors import LayerShape, bytes_per_token

DOCS = ROOT / "docs"
NODE = shutil.which("node")
COUNT = 40  # held-out sentences for each adapter


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with ServerProcess(tmp_path_factory.mktemp("store"), "--adapters", str(ADAPTERS)) as server:
        yield server


def test_every_adapter_is_exact_on_held_out_prompts_in_mixed_batches(demo: ServerProcess) -> None:
    jobs = [(text, name) for text in heldout_prompts(COUNT, seed=11) for name in TASKS]
    before = demo.metric("lora_serve_batch_adapters_sum"), demo.metric("lora_serve_batch_adapters_count")
    with ThreadPoolExecutor(24) as pool:
        answers = [*pool.map(lambda job: demo.complete(*job), jobs)]
    for name in TASKS:
        answered = [(text, answer) for (text, task), answer in zip(jobs, answers, strict=True) if task == name]
        right = sum(answer == TASKS[name].answer(text) for text, answer in answered)
        assert right >= 0.95 * COUNT, name
    mixed = demo.metric("lora_serve_batch_adapters_sum") - before[0]
    steps = demo.metric("lora_serve_batch_adapters_count") - before[1]
    assert mixed / steps > 3  # adapters shared batches


def test_the_base_without_an_adapter_does_none_of_the_tasks(demo: ServerProcess) -> None:
    prompts = heldout_prompts(COUNT, seed=12)
    with ThreadPoolExecutor(16) as pool:
        answers = [*pool.map(demo.complete, prompts)]
    for task in TASKS.values():
        right = sum(answer == task.answer(text) for text, answer in zip(prompts, answers, strict=True))
        assert right <= 0.05 * COUNT, task.name


def test_chat_uses_the_adapter_as_completions_do(demo: ServerProcess) -> None:
    text = heldout_prompts(1, seed=13)[0]
    answer = demo.http.post(
        "/v1/chat/completions",
        json={"messages": [{"role": "user", "content": text}], "adapter": "shout", "temperature": 0},
    ).json()
    assert answer["choices"][0]["message"]["content"] == text.upper()
    assert answer["choices"][0]["finish_reason"] == "stop"


# --- what the documentation says of it -------------------------------------------------------------------------------


def javascript(expression: str) -> Any:
    """The value of an expression with the functions of the page about sizes."""
    code = f"const s = require('{DOCS / 'assets' / 'sizing.js'}'); console.log(JSON.stringify({expression}))"
    assert NODE is not None
    done = subprocess.run([NODE, "-e", code], capture_output=True, text=True, check=True, timeout=60)
    return json.loads(done.stdout)


@pytest.mark.skipif(NODE is None, reason="there is no node")
def test_sizes_are_those_that_the_server_counts(demo: ServerProcess) -> None:
    config = (DEMO / "config.json").read_text()
    counted = {each["name"]: each["versions"][0] for each in demo.http.get("/v1/adapters").json()["data"]}
    for name, rank, modules in (("reverse", 16, "all"), ("json", 2, "all"), ("count", 8, "mlp")):
        computed = javascript(f"s.adapterBytes(s.moduleShapes({config}, '{modules}'), {rank}, 2)")
        assert computed == counted[name]["memory_bytes"], name
    limits = "{memory: s.readBytes('1GiB'), blockSize: 16, maxModelLen: 512, maxNumSeqs: 64}"
    assert javascript(f"s.kvTokens({config}, 2, {limits})") == 16 * demo.metric("lora_serve_kv_blocks")
    layers = [LayerShape(kv_heads=2, key_dim=32, value_dim=32)] * 6
    assert javascript(f"s.kvBytesPerToken({config}, 2)") == bytes_per_token(layers, torch.bfloat16)


def test_what_the_first_page_trains_is_served(
    demo: ServerProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (code,) = re.findall(r"```python\n(import torch.*?)```", (DOCS / "index.md").read_text(), flags=re.DOTALL)
    assert code.count("\n") < 20
    (tmp_path / "demo").symlink_to(ROOT / "demo")
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    files = [
        ("files", (name, (tmp_path / "quiet" / name).read_bytes()))
        for name in ("adapter_config.json", "adapter_model.safetensors")
    ]
    demo.http.post("/v1/adapters", data={"name": "quiet"}, files=files).raise_for_status()
    assert demo.complete("eight small bears dance", "quiet") == "all is quiet tonight"
