"""What the API process costs is measured on the real server, whose engine gives every stream a token in every step."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from bench.serving.api_cost import Cost, cost_table, cpu_seconds, measure, middle
from bench.serving.launch import not_ready, run_server
from bench.serving.scripted_engine import ScriptedEngine
from lora_serve.messages import Abort, EngineInfo, Generate
from lora_serve.request import Admitted, Event, Finished, Request, Sampling, Tokens

MODEL = Path(__file__).parents[3] / "demo" / "model"
STEP = 0.02  # seconds
INFO = EngineInfo("scripted", "", "", "", "", 1, 1, (), 1, 0, 0, 0, 0)


def events(engine: ScriptedEngine) -> list[Event]:
    return engine.step().events


def test_every_stream_gets_the_next_token_of_the_script_in_every_step() -> None:
    engine = ScriptedEngine([7, 8, 9], 0.0, INFO)
    engine.receive(Generate(Request("a", [1], Sampling(max_tokens=10))))
    assert events(engine) == [Admitted("a", []), Tokens("a", [7])]
    engine.receive(Generate(Request("b", [1], Sampling(max_tokens=2))))
    assert events(engine) == [Admitted("b", []), Tokens("a", [8]), Tokens("b", [7])]
    assert events(engine) == [Tokens("a", [9]), Tokens("b", [8]), Finished("b", "length")]
    engine.receive(Abort("a"))
    assert events(engine) == [Finished("a", "abort")]
    assert not engine.busy


def test_steps_begin_a_pace_apart() -> None:
    engine = ScriptedEngine([7], STEP, INFO)
    engine.receive(Generate(Request("a", [1], Sampling(max_tokens=10))))
    begin = time.monotonic()
    for _ in range(5):
        engine.step()
    assert time.monotonic() - begin >= 4 * STEP


@pytest.mark.parametrize("api", ["chat", "completions"])
async def test_a_chunk_per_token_and_its_cost_are_measured(api: str) -> None:
    command = [sys.executable, "-m", "bench.serving.scripted_engine", "serve", str(MODEL)]
    command += ["--step-ms", str(1e3 * STEP), "--port", "{port}"]
    with run_server(command, not_ready, 60) as (url, process):
        before = cpu_seconds(process.pid)
        cost = await measure(url, process.pid, api, 4, step=STEP, seconds=0.5, settle=0.2)
        tokens = 4 * 0.5 / STEP
        assert cost.chunks_per_token == pytest.approx(1, abs=0.2)
        assert 0 < cost.microseconds * tokens / 1e6 < cpu_seconds(process.pid) - before


def test_of_several_runs_the_median_is_shown() -> None:
    runs = [Cost("chat", 64, 1.0, 12_800.0, cost) for cost in (30.0, 10.0, 20.0)]
    assert middle(runs).microseconds == 20
    assert "|   12,800 |            1.00 |             20.0 |" in cost_table([middle(runs)])
