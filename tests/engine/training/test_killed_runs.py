"""A real engine process that is killed: its runs are gone, and what was saved goes on as if nothing had happened."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import psutil
import pytest
from support import save
from training_session import batch, create

from lora_serve.config import ServeConfig
from lora_serve.engine.client import EngineClient
from lora_serve.errors import RunNotFound, Unavailable
from lora_serve.training_messages import ForwardBackward, OptimizerStep, RestoreRun, SaveRun


async def train(client: EngineClient, steps: range) -> list[float]:
    losses = []
    for step in steps:
        losses.append((await client.call(ForwardBackward("run", batch(2, seed=step))))["loss"])
        await client.call(OptimizerStep("run", 5e-3))
    return losses


@pytest.mark.slow
def test_a_killed_engine_s_runs_are_gone_and_continue_from_what_was_saved(tmp_path: Path) -> None:
    config = ServeConfig(
        model=str(save("llama", tmp_path / "base")),
        store=tmp_path / "store",
        dtype="float32",
        threads=1,
        training_memory=1 << 25,  # type: ignore[arg-type]
        kv_cache_memory=1 << 20,  # type: ignore[arg-type]
    )

    async def scenario() -> None:
        client = EngineClient(config)
        await client.start()
        try:
            assert client.info is not None
            assert client.info.training_memory == 1 << 25
            await client.call(create("run"))
            await train(client, range(2))
            await client.call(SaveRun("run", str(tmp_path / "saved")))
            wanted = await train(client, range(2, 5))
            running = asyncio.ensure_future(client.call(ForwardBackward("run", batch(200))))
            await asyncio.sleep(0.01)
            (engine,) = (each for each in psutil.Process().children() if "process_main" in " ".join(each.cmdline()))
            os.kill(engine.pid, signal.SIGKILL)
            with pytest.raises(Unavailable):
                await running
            async with asyncio.timeout(60):
                while not client.ready or client.restarts == 0:
                    await asyncio.sleep(0.1)
            with pytest.raises(RunNotFound):
                await client.call(OptimizerStep("run", 5e-3))
            await client.call(create("run"))
            await client.call(RestoreRun("run", str(tmp_path / "saved")))
            assert await train(client, range(2, 5)) == wanted
        finally:
            await client.stop()

    asyncio.run(scenario())
