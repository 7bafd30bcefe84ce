"""An engine core without a model, in a real process, whose behaviour is set by the request.

The prompt's first token selects the behaviour (`Act`); `config.model` selects how the start goes; `config.store`, if
given, is a folder in which every start leaves its process id.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from enum import IntEnum

from lora_serve.config import ServeConfig
from lora_serve.engine.process_main import main
from lora_serve.errors import AdapterNotFound, Failure, ModelUnsupported
from lora_serve.messages import (
    Abort,
    Call,
    Drain,
    EngineInfo,
    Generate,
    ListAdapters,
    PinAdapter,
    Reply,
    Stats,
    StepReport,
    Update,
)
from lora_serve.request import Admitted, Event, Finished, Request, Tokens


class Act(IntEnum):
    COUNT = 1  # one token a step: 0, 1, 2 …
    FLOOD = 2  # a hundred tokens a step
    HANG = 3  # the loop blocks
    CRASH = 4  # the step raises


class FakeEngine:
    pace = 0.002  # seconds a step takes

    def __init__(self, config: ServeConfig, starts: int) -> None:
        self.info = EngineInfo(
            model=config.model,
            root=config.model,
            device="cpu",
            dtype=f"threads {config.threads}, {os.environ['OMP_NUM_THREADS']}",
            kernels="none",
            max_model_len=4096,
            vocab_size=1 << 20,
            eos_token_ids=(0,),
            kv_tokens=4096,
            adapter_slots=config.adapter_slots,
            adapters=0,
            parameters=starts,
            created=0,
        )
        self.running: dict[str, tuple[Request, int]] = {}
        self.events: list[Event] = []
        self.answers: list[Reply] = []
        self.draining: Call | None = None

    step_in_flight = False

    def train(self) -> bool:
        return False

    @property
    def busy(self) -> bool:
        return bool(self.running)

    def receive(self, message: Generate | Abort | Call) -> None:
        match message:
            case Generate(request):
                self.running[request.id] = (request, 0)
                self.events.append(Admitted(request.id, []))
            case Abort(request_id):
                if self.running.pop(request_id, None):
                    self.events.append(Finished(request_id, "abort"))
            case Call(id, ListAdapters()):
                self.answers.append(Reply(id, sorted(self.running)))
            case Call(id, PinAdapter(name)):
                self.answers.append(Reply(id, failure=Failure.of(AdapterNotFound(f"no adapter {name}", param="name"))))
            case Call(_, Drain()):
                self.draining = message
            case _:
                pass  # a call that is never answered

    def step(self) -> Update:
        events, self.events = self.events, []
        if not self.running:
            return Update(events)
        time.sleep(self.pace)
        for id, (request, done) in list(self.running.items()):
            act = Act(request.prompt[0])
            if act is Act.HANG:
                time.sleep(60)
            if act is Act.CRASH:
                raise RuntimeError("the step failed")
            count = min(request.sampling.max_tokens - done, 100 if act is Act.FLOOD else 1)
            events.append(Tokens(id, list(range(done, done + count))))
            self.running[id] = (request, done + count)
            if done + count == request.sampling.max_tokens:
                del self.running[id]
                events.append(Finished(id, "length"))
        return Update(events, step=StepReport(len(self.running), len(self.running), 0, 0.002))

    def replies(self) -> list[Reply]:
        answers, self.answers = self.answers, []
        if self.draining and not self.running:
            answers.append(Reply(self.draining.id))
            self.draining = None
        return answers

    def stats(self) -> Stats:
        return Stats(running=len(self.running))

    def close(self) -> None:
        self.events += [Finished(id, "abort") for id in self.running]
        self.running.clear()
        if self.info.model == "slow-close":
            time.sleep(30)


def build(config: ServeConfig, *, wake: Callable[[], None], progress: Callable[[str, float], None]) -> FakeEngine:
    progress("weights", 0.5)
    starts = 1
    if config.store is not None:
        (config.store / str(os.getpid())).touch()
        starts = len(list(config.store.iterdir()))
    if config.model == "unsupported" or (config.model == "second-start-fails" and starts == 2):
        raise ModelUnsupported("no such architecture")
    if config.model == "broken":
        raise ValueError("a bug")
    if config.model == "dies":
        os._exit(7)
    if config.model == "slow":
        time.sleep(30)
    wake()
    progress("adapters", 1.0)
    return FakeEngine(config, starts)


if __name__ == "__main__":
    sys.exit(main(build, sys.argv[1:]))
