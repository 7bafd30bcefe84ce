"""A minimal `/v1/completions` server with transformers' `generate` and PEFT adapters, as a baseline.

    python -m bench.peers.peft_server MODEL --adapters DIR --port 8000

Batches are static: the requests that wait when a batch ends form the next one, which runs until its longest request is
done. A batch with one adapter runs with it active, a batch on the base with adapters disabled, and only a mixed batch
with PEFT's `adapter_names`, so each uses the fastest way that PEFT has. Greedy, without EOS, prompts are token ids, as
`bench.serving.client` asks for.
"""

from __future__ import annotations

import argparse
import queue
import threading
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import uvicorn
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.generation.streamers import BaseStreamer

from bench.peers.completions_app import Completion, build

GATHER = 0.02  # seconds that a batch waits for further requests after its first


class BatchStreamer(BaseStreamer):
    """Streams each step's tokens to the requests of a batch, to each as many as it asked for."""

    def __init__(self, batch: Sequence[Completion]) -> None:
        self._batch = batch
        self._step = -1  # the first call has the prompt

    def put(self, value: torch.Tensor) -> None:  # [batch, prompt] at first, then [batch]
        if self._step >= 0:
            for request, token in zip(self._batch, value.tolist(), strict=True):
                if self._step < request.count:
                    request.put(token)
        self._step += 1

    def end(self) -> None:
        pass


class StaticBatches:
    """The model, and the thread that runs batches one after the other."""

    def __init__(self, model: str, adapters: Sequence[Path], batch_size: int) -> None:
        self._tokenizer: Any = AutoTokenizer.from_pretrained(model)
        self.adapters = [folder.name for folder in adapters]
        base: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
        self._model: Any = base
        for folder in adapters:
            if self._model is base:
                self._model = PeftModel.from_pretrained(base, str(folder), folder.name)
            else:
                self._model.load_adapter(str(folder), folder.name)
        self._model.to(torch.bfloat16).eval()
        self._batch_size = batch_size
        self._waiting: queue.Queue[Completion] = queue.Queue()
        threading.Thread(target=self._run, daemon=True).start()

    def submit(self, request: Completion) -> None:
        self._waiting.put(request)

    def decode(self, tokens: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(tokens)
        return text

    def _run(self) -> None:
        while True:
            batch = [self._waiting.get()]
            try:
                while len(batch) < self._batch_size:
                    batch.append(self._waiting.get(timeout=GATHER))
            except queue.Empty:
                pass
            try:
                self._generate(batch)
            except Exception as error:  # the next batch has to run whatever happened
                for request in batch:
                    request.put(error)

    @torch.inference_mode()
    def _generate(self, batch: Sequence[Completion]) -> None:
        width = max(len(request.prompt) for request in batch)
        ids = torch.zeros(len(batch), width, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, request in enumerate(batch):  # generate needs padding on the left
            ids[row, width - len(request.prompt) :] = torch.tensor(request.prompt)
            mask[row, width - len(request.prompt) :] = 1
        names = {request.adapter for request in batch}
        more: dict[str, Any] = {}
        context: Any = nullcontext()
        if len(names) > 1:
            more["adapter_names"] = [request.adapter or "__base__" for request in batch]
        elif (only := names.pop()) is not None:
            self._model.set_adapter(only)
        elif self.adapters:
            context = self._model.disable_adapter()
        longest = max(request.count for request in batch)
        with context:
            self._model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=longest,
                min_new_tokens=longest,
                do_sample=False,
                streamer=BatchStreamer(batch),
                **more,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--adapters", type=Path, help="folder of PEFT adapter folders (default: none)")
    parser.add_argument("--batch-size", type=int, default=8, help="largest number of requests in a batch")
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args()
    folders = sorted(args.adapters.iterdir()) if args.adapters else []
    uvicorn.run(build(StaticBatches(args.model, folders, args.batch_size)), port=args.port, log_level="warning")


if __name__ == "__main__":
    main()
