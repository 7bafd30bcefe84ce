"""A minimal `/v1/completions` server with OpenVINO GenAI's continuous batching, as a baseline.

    python -m bench.peers.openvino_server FOLDER --port 8000

FOLDER is a model exported by `optimum-cli export openvino`; `bench/peers/README.md` says how. Requests join the running
batch at every step, prompts are token ids, decoding is greedy and ignores EOS, as `bench.serving.client` asks for. It
serves the base, or with `--adapter` the base with that one adapter in every request, under the base's name: an adapter
belongs to a pipeline of OpenVINO's, not to a request.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import threading
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as genai
import uvicorn
from tokenizers import Tokenizer

from bench.peers.completions_app import Completion, build


class ContinuousBatches:
    """A pipeline in a process of its own, as its steps hold the interpreter's lock; a thread reads from it."""

    adapters: Sequence[str] = ()

    def __init__(self, model: str, adapter: Path | None, batch_size: int, cache: int) -> None:
        self._tokenizer = Tokenizer.from_file(str(Path(model) / "tokenizer.json"))
        self._requests: list[Completion] = []
        spawn = multiprocessing.get_context("spawn")
        self._connection, other = spawn.Pipe()
        spawn.Process(target=run_pipeline, args=(other, model, adapter, batch_size, cache), daemon=True).start()
        other.close()
        self._connection.recv()  # it is loaded; EOFError if it failed
        threading.Thread(target=self._read, daemon=True).start()

    def submit(self, request: Completion) -> None:
        self._requests.append(request)
        self._connection.send((len(self._requests) - 1, request.prompt, request.count))

    def decode(self, tokens: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(tokens))
        return text

    def _read(self) -> None:
        while True:
            for number, token in self._connection.recv():
                self._requests[number].put(token)


def run_pipeline(connection: Connection, model: str, adapter: Path | None, batch_size: int, cache: int) -> None:
    """Load a model and run what arrives as (number, prompt, count), sending (number, token) after each step."""
    pipeline = load_pipeline(model, adapter, batch_size, cache)
    connection.send("loaded")
    running: dict[int, Any] = {}
    while True:
        while not running or connection.poll():
            number, prompt, count = connection.recv()
            config = genai.GenerationConfig(max_new_tokens=count, ignore_eos=True, do_sample=False)
            running[number] = pipeline.add_request(number, ov.Tensor(np.array([prompt], np.int64)), config)
        pipeline.step()
        connection.send([(number, token) for number, handle in running.items() for token in _new_tokens(handle)])
        running = {n: handle for n, handle in running.items() if handle.get_status() == genai.GenerationStatus.RUNNING}


def load_pipeline(model: str, adapter: Path | None, batch_size: int, cache: int) -> Any:
    """A pipeline on the CPU with its defaults, which were its fastest settings, and without prefix cache."""
    scheduler = genai.SchedulerConfig()
    scheduler.max_num_seqs, scheduler.cache_size, scheduler.enable_prefix_caching = batch_size, cache, False
    properties: dict[str, Any] = {}
    if adapter is not None:
        config = json.loads((adapter / "adapter_config.json").read_text())
        weights = genai.Adapter(str(adapter / "adapter_model.safetensors"))
        scaling = config["lora_alpha"] / config["r"]  # which the weights' file does not have
        properties["adapters"] = genai.AdapterConfig(weights, scaling, genai.AdapterConfig.Mode.MODE_STATIC)
    return genai.ContinuousBatchingPipeline(model, scheduler, "CPU", properties)


def _new_tokens(handle: Any) -> list[int]:
    return [token for output in handle.read().values() for token in output.generated_ids] if handle.can_read() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of an exported model")
    parser.add_argument("--adapter", type=Path, help="folder of a PEFT LoRA adapter for every request (default: none)")
    parser.add_argument("--batch-size", type=int, default=8, help="largest number of requests in a batch")
    parser.add_argument("--cache", type=int, default=1, help="GiB of the KV cache")
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args()
    batches = ContinuousBatches(args.model, args.adapter, args.batch_size, args.cache)
    uvicorn.run(build(batches), port=args.port, log_level="warning")


if __name__ == "__main__":
    main()
