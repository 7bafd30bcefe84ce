"""Adapters of many PEFT methods for the demo's base, uploaded to a real server and served in the same batches.

Each response must equal PEFT's greedy continuation.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from parity import save_noisy_adapter
from server_process import DEMO, ServerProcess
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_serve.cli import main

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT warns about heads and tied weights

PROMPT = "three happy wolves sing tonight\n"
LENGTH = 16
TASK = {"task_type": "CAUSAL_LM"}
LINEAR = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]


def configs(invocation: list[int]) -> dict[str, peft.PeftConfig]:
    lora: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": LINEAR, **TASK}
    return {
        "plain": peft.LoraConfig(**lora),
        "dora": peft.LoraConfig(**lora, use_dora=True),
        "biased": peft.LoraConfig(**lora, lora_bias=True),
        "embedded": peft.LoraConfig(**lora | {"target_modules": ["embed_tokens", "lm_head", "k_proj"]}),
        "saved": peft.LoraConfig(**lora, modules_to_save=["lm_head", "norm"]),
        "invoked": peft.LoraConfig(**lora, alora_invocation_tokens=invocation),
        "invoked-replacing": peft.LoraConfig(
            **lora, alora_invocation_tokens=invocation, modules_to_save=["norm"], lora_bias=True
        ),
        "pissa": peft.LoraConfig(**lora, init_lora_weights="pissa"),
        "ia3": peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], **TASK),
        "norms": peft.LNTuningConfig(target_modules=["input_layernorm", "post_attention_layernorm"], **TASK),
        "vera": peft.VeraConfig(r=8, target_modules=["q_proj", "o_proj"], **TASK),
        "lokr": peft.LoKrConfig(r=4, target_modules=["q_proj", "gate_proj"], **TASK),
        "prompted": peft.PromptTuningConfig(num_virtual_tokens=21, **TASK),
        "prefixed": peft.PrefixTuningConfig(num_virtual_tokens=9, **TASK),
    }


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path | None, str]]:
    """By name, the adapter's folder and PEFT's continuation of the prompt; '' is the base."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    base = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()
    inputs = tokenizer(PROMPT, return_tensors="pt", add_special_tokens=False)
    found: dict[str, tuple[Path | None, str]] = {}

    def note(name: str, folder: Path | None, model: Any) -> None:
        with torch.inference_mode():
            tokens = model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                max_new_tokens=LENGTH,
                min_new_tokens=LENGTH,
                do_sample=False,
            )[0]
        found[name] = folder, tokenizer.decode(tokens[inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    note("", None, base)
    for seed, (name, config) in enumerate(configs(inputs["input_ids"][0, -3:-1].tolist()).items()):
        folder = tmp_path_factory.mktemp("adapters") / name
        save_noisy_adapter(base, folder, seed, config, noise=0.1)
        note(name, folder, peft.PeftModel.from_pretrained(copy.deepcopy(base), folder).eval())
    return found


@pytest.fixture(scope="module")
def server(
    tmp_path_factory: pytest.TempPathFactory, answers: dict[str, tuple[Path | None, str]]
) -> Iterator[ServerProcess]:
    with ServerProcess(tmp_path_factory.mktemp("store"), "--dtype", "float32", "--adapter-slots", "16") as server:
        for folder, _ in answers.values():
            if folder is not None:
                assert main(["adapter", "upload", str(folder), "--url", server.url]) == 0
        yield server


def ask(server: ServerProcess, name: str) -> str:
    body = {"prompt": PROMPT, "max_tokens": LENGTH, "min_tokens": LENGTH, "temperature": 0, "adapter": name or None}
    answer = server.http.post("/v1/completions", json=body)
    answer.raise_for_status()
    text: str = answer.json()["choices"][0]["text"]
    return text


def test_all_methods_in_one_batch_give_peft_s_output(
    server: ServerProcess, answers: dict[str, tuple[Path | None, str]]
) -> None:
    names = list(answers) * 2
    with ThreadPoolExecutor(len(names)) as pool:
        said = list(pool.map(lambda name: ask(server, name), names))
    assert said == [answers[name][1] for name in names]
    assert len({text for _, text in answers.values()}) > len(answers) // 2  # the adapters differ


def test_an_adapter_that_cannot_be_composed_is_refused_with_the_reason(server: ServerProcess) -> None:
    body = {"prompt": PROMPT, "max_tokens": 4, "adapter": [{"name": "plain", "weight": 0.5}, {"name": "biased"}]}
    assert server.http.post("/v1/completions", json=body).status_code == 200
    for name, reason in {"dora": "rescales", "saved": "replaces", "prompted": "virtual tokens"}.items():
        answer = server.http.post("/v1/completions", json=body | {"adapter": [{"name": "plain"}, {"name": name}]})
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert error["param"] == "adapter"
        assert name in error["message"]
        assert reason in error["message"]
