"""lm-evaluation-harness scores an adapter through the server as it does with transformers and PEFT by itself."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import lm_eval
import pytest
from server_process import ADAPTERS, DEMO, ServerProcess

from demo.tasks import TASKS

SENTENCES = ("two red foxes run", "five old cats sleep home", "nine blue birds sing together")


def tasks(folder: Path) -> list[dict[str, Any]]:
    """Three tasks on the demo's sentences: choices that differ in the last word, perplexity of a text, generation."""
    rows = []
    for sentence in SENTENCES:
        right = TASKS["shout"].answer(sentence)
        *head, _ = right.split()
        rows.append({"text": f"{sentence}\n", "right": right, "choices": [" ".join([*head, "STONES"]), right]})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
        "test_split": "test",
        "target_delimiter": "",
        "doc_to_text": "{{text}}",
        "metadata": {"version": 1},
    }
    return [
        common
        | {"task": "choices", "output_type": "multiple_choice", "doc_to_choice": "{{choices}}", "doc_to_target": 1,
           "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}]},
        common
        | {"task": "rolling", "output_type": "loglikelihood_rolling", "doc_to_text": "",
           "doc_to_target": "{{text}}{{right}}",
           "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}]},
        common
        | {"task": "generation", "output_type": "generate_until", "doc_to_target": "{{right}}",
           "generation_kwargs": {"until": ["\n"], "max_gen_toks": 40, "do_sample": False},
           "metric_list": [{"metric": "exact_match"}]},
    ]  # fmt: skip


def evaluate(model: str, arguments: dict[str, Any], configs: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = lm_eval.simple_evaluate(
            model=model, model_args=arguments, tasks=configs, bootstrap_iters=0, batch_size=1, log_samples=False
        )["results"]
    return {
        task: {name: value for name, value in scores.items() if isinstance(value, float) and "stderr" not in name}
        for task, scores in found.items()
    }


@pytest.mark.filterwarnings("ignore")
def test_scores_equal_those_of_transformers_and_peft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    configs = tasks(tmp_path)
    arguments = {"pretrained": str(DEMO), "peft": str(ADAPTERS / "shout"), "dtype": "float32", "device": "cpu"}
    local = evaluate("hf", arguments, configs)
    assert local["choices"]["acc,none"] == 1.0
    options = ("--adapters", str(ADAPTERS), "--dtype", "float32")
    with ServerProcess(tmp_path / "store", *options) as server:
        arguments = {"model": "shout", "base_url": f"{server.url}/v1/completions", "tokenizer": str(DEMO)}
        served = evaluate("local-completions", arguments, configs)
    assert served.keys() == local.keys()
    for task, scores in local.items():
        assert served[task] == pytest.approx(scores, rel=1e-3, abs=1e-3), task
