"""The real server around an engine without a model: every stream gets the next token of a text in every step.

    python -m bench.serving.scripted_engine serve MODEL --step-ms 5 --port 8000

Of MODEL only the tokenizer is used. What the API process costs can so be measured alone: the engine's process, its
messages and the whole HTTP side are the ones that serve.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from lora_serve.config import ServeConfig
from lora_serve.engine.client import EngineClient
from lora_serve.engine.process_main import main as run_engine
from lora_serve.messages import Abort, Call, EngineInfo, Generate, Reply, Stats, StepReport, Update
from lora_serve.request import Admitted, Event, Finished, Request, Tokens

TEXT = Path(__file__).parents[2] / "LICENSE"
CONTEXT = 1 << 21  # tokens: streams that end when their clients leave


class ScriptedEngine:
    """One token per stream and step; steps begin `pace` seconds apart, or as soon as possible."""

    step_in_flight = False

    def train(self) -> bool:
        return False

    def __init__(self, script: list[int], pace: float, info: EngineInfo) -> None:
        self.info = info
        self._script = script
        self._pace = pace
        self._next = time.monotonic()
        self._running: dict[str, tuple[Request, int]] = {}  # with the number of tokens sent
        self._events: list[Event] = []
        self._replies: list[Reply] = []

    @property
    def busy(self) -> bool:
        return bool(self._running or self._events)

    def receive(self, message: Generate | Abort | Call) -> None:
        match message:
            case Generate(request):
                self._running[request.id] = (request, 0)
                self._events.append(Admitted(request.id, []))
            case Abort(id):
                if self._running.pop(id, None) is not None:
                    self._events.append(Finished(id, "abort"))
            case Call(id):
                self._replies.append(Reply(id))

    def step(self) -> Update:
        events, self._events = self._events, []
        if not self._running:
            return Update(events)
        self._next = max(self._next + self._pace, now := time.monotonic())
        time.sleep(self._next - now)
        for id, (request, sent) in list(self._running.items()):
            events.append(Tokens(id, [self._script[sent % len(self._script)]]))
            self._running[id] = (request, sent + 1)
            if sent + 1 == request.sampling.max_tokens:
                del self._running[id]
                events.append(Finished(id, "length"))
        return Update(events, step=StepReport(len(self._running), len(self._running), 0, self._pace))

    def replies(self) -> list[Reply]:
        replies, self._replies = self._replies, []
        return replies

    def stats(self) -> Stats:
        return Stats(running=len(self._running))

    def close(self) -> None:
        self._events += [Finished(id, "abort") for id in self._running]
        self._running.clear()


def build(
    pace: float, config: ServeConfig, *, wake: Callable[[], None], progress: Callable[[str, float], None]
) -> ScriptedEngine:
    """Build the engine of a process (`engine/process_main.py: Build`, after its first argument)."""
    tokenizer = Tokenizer.from_file(str(Path(config.model) / "tokenizer.json"))
    info = EngineInfo(
        model="scripted",
        root=config.model,
        device="none",
        dtype="none",
        kernels="none",
        max_model_len=CONTEXT,
        vocab_size=tokenizer.get_vocab_size(),
        eos_token_ids=(),
        kv_tokens=CONTEXT,
        adapter_slots=0,
        adapters=0,
        parameters=0,
        created=0,
    )
    return ScriptedEngine(tokenizer.encode(TEXT.read_text(), add_special_tokens=False).ids, pace, info)


def serve(model: str, step_ms: float, port: int) -> int:
    """Serve as `lora-serve serve MODEL` does (`cli.py: serve`), with this engine."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    sys.modules["torch"] = None  # type: ignore[assignment]
    from lora_serve import server
    from lora_serve.api.app import create_app
    from lora_serve.cli import load_tokenizer

    config = ServeConfig(model=model, port=port, max_num_seqs=4096)

    def make_app(engine: EngineClient, tokenizer: Any) -> server.App:
        app = create_app(engine, tokenizer, config, keys=None)
        return server.App(app, app.state.services.jobs.drain)

    return server.serve(
        config,
        load_tokenizer=lambda: load_tokenizer(config),
        make_app=make_app,
        engine=(sys.executable, "-m", "bench.serving.scripted_engine", "engine", str(step_ms)),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["engine"]:  # started by the server
        pace = float(given[1]) / 1e3
        run_engine(lambda config, **options: build(pace, config, **options), given[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("serve",))
    parser.add_argument("model", help="folder with a tokenizer.json")
    parser.add_argument("--step-ms", type=float, default=5.0, help="from one step's begin to the next one's")
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args(given)
    return serve(args.model, args.step_ms, args.port)


if __name__ == "__main__":
    sys.exit(main())
