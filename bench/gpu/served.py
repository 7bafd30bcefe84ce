"""Servers of random models on a device: throughput over HTTP, start-up, and laws of adapters.

Models and adapters are made in a scratch folder. What is compared is a ratio within one server's run.
"""

from __future__ import annotations

import asyncio
import math
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from bench.gpu import goals
from bench.gpu.forward_pass import used_memory, write_config
from bench.gpu.goals import Value
from bench.gpu.steps import RANK, measure_decode
from bench.make_model import make_model
from bench.report import Goal
from bench.serving.adapter_server import Scale, Workspace
from bench.serving.adapter_sets import AdapterMaker
from bench.serving.client import Server, list_models
from bench.serving.launch import launched
from bench.serving.load import Load, run
from bench.serving.residency_laws import measure_cold_start, measure_stall
from bench.serving.summary import summarise
from bench.serving.throughput_laws import cliff, registry
from bench.shapes import SHAPES, Shape

COMMAND = (sys.executable, "-m", "lora_serve", "serve")
PATIENCE = 150.0  # seconds that a server may take to start
SLOTS = 8  # of the large server: adapters are 84 MB each


@dataclass(frozen=True)
class ServedSizes:
    """Sizes of what servers get.

    Attributes:
        clients, prompt, output, requests: of the closed loop; requests of each client.
        longest: tokens of the longest sequence.
        adapters: that the large server starts with.
        registry: adapters in use for law 4.
        repeats, seconds: of the laws' loads.
    """

    clients: int = 64
    prompt: int = 128
    output: int = 128
    requests: int = 4
    longest: int = 8192
    adapters: int = 64
    registry: int = 2000
    repeats: int = 2
    seconds: float = 4.0

    @property
    def context(self) -> int:
        """Mean tokens of the closed loop's sequences while they decode."""
        return self.prompt + self.output // 2


@dataclass
class ServedFigures:
    """What was measured so far: by part, and values of goals."""

    parts: dict[str, dict[str, Any]] = field(default_factory=dict)
    values: dict[str, Value] = field(default_factory=dict)


@dataclass(frozen=True)
class ServedModels:
    """Models and servers for the measurements.

    Args:
        scratch: an empty folder, for some 30 GB with the 8B shape.
        budget: about the seconds for one repeat of a step.
    """

    scratch: Path
    device: torch.device
    sizes: ServedSizes
    budget: float
    found: ServedFigures

    def small_server(self, shape: str) -> None:
        """Throughput over HTTP of the small shape."""
        figures = self.found.parts["small server"] = {}
        rate = self._decode_rate(SHAPES[shape])
        model, store = self._model(shape), str(self.scratch / "small-store")
        with launched([str(model), "--store", store, *self._options], command=COMMAND, timeout=PATIENCE) as url:
            figures |= self._throughput(SHAPES[shape], url)
        self._record_throughput(goals.HTTP_SMALL, figures, rate)

    def large_server(self, shape: str, decode_step: float) -> None:
        """Start of the large shape with its adapters; throughput over HTTP; laws 6 and 7.

        Args:
            decode_step: seconds of the closed loop's decode step.
        """
        figures = self.found.parts["large server"] = {}
        workspace = self._workspace(shape, "large", clients=8)
        names = [*workspace.rank16, *(f"more{index:03}" for index in range(self.sizes.adapters))]
        for name in names[: self.sizes.adapters]:
            workspace.maker.make(name, RANK)
        slots = min(SLOTS, self.sizes.adapters - 1, len(workspace.rank16) - 1)
        begin = time.perf_counter()
        with workspace.serving("--adapter-slots", str(slots)) as (server, routes):
            figures["start"] = time.perf_counter() - begin
            self.found.values[goals.START] = figures["start"], f"{self.sizes.adapters} adapters of rank {RANK}"
            figures |= self._throughput(SHAPES[shape], server.url)
            self._record_throughput(goals.HTTP_LARGE, figures, self.sizes.clients / decode_step)
            loads, figures["stall"] = measure_stall(workspace, server, routes, uploads=False)
            self._take(goals.STALL, loads)
            starts, figures["cold start"] = measure_cold_start(workspace, server, routes, slots=slots)
            self._take(goals.COLD_HOST, starts[:1])
            self._take(goals.COLD_DISK, starts[1:])
        for folder in (workspace.folder, workspace.model):
            shutil.rmtree(folder)

    def cliff(self, shape: str) -> None:
        """Law 5 on the small shape: twice as many adapters as have slots."""
        found, self.found.parts["cliff"] = cliff(self._workspace(shape, "cliff", clients=8), ["slots"])
        self._take(goals.CLIFF, found)

    def registry(self, shape: str) -> None:
        """Law 4 on the small shape."""
        workspace = self._workspace(shape, "registry", clients=self.sizes.clients // 2)
        found, self.found.parts["registry"] = registry(workspace, ["rank 8"])
        self._take(goals.REGISTRY, found)

    @property
    def _options(self) -> tuple[str, ...]:
        return (
            *("--device", self.device.type, "--dtype", "bfloat16", "--max-model-len", str(self.sizes.longest)),
            *("--max-num-seqs", str(self.sizes.clients)),
        )

    def _model(self, shape: str) -> Path:
        """The model's folder, made by the first who asks."""
        folder = self.scratch / shape
        if not folder.exists():
            make_model(SHAPES[shape], folder)
        used_memory(self.device)  # frees what made it
        return folder

    def _workspace(self, shape: str, name: str, clients: int) -> Workspace:
        folder = self.scratch / name
        folder.mkdir()
        return Workspace(
            model=self._model(shape),
            folder=folder,
            maker=AdapterMaker(SHAPES[shape], folder / "adapters"),
            dtype=torch.bfloat16,
            options=self._options,
            context=self.sizes.longest,
            scale=Scale(self.sizes.registry, 0, self.sizes.repeats, self.sizes.seconds, max(2, clients)),
            command=COMMAND,
            patience=PATIENCE,
        )

    def _decode_rate(self, shape: Shape) -> float:
        """Tokens per second of the closed loop's decode steps, without engine and server."""
        folder, rows = write_config(shape, self.scratch / "config"), self.sizes.clients
        rate = rows / measure_decode(folder, self.device, [rows], self.sizes.context, self.budget)[rows]
        used_memory(self.device)  # frees the base
        return rate

    def _throughput(self, shape: Shape, url: str) -> dict[str, Any]:
        """Figures of the closed loop, after one round to warm up."""
        sizes = self.sizes
        load = Load(
            clients=sizes.clients, requests=sizes.clients * sizes.requests, prompt=(sizes.prompt, sizes.prompt),
            output=(sizes.output, sizes.output), token_ids=(1, min(2000, shape.vocabulary) - 1),
        )  # fmt: skip
        server = Server(url, list_models(url)[0])
        asyncio.run(run(server, replace(load, requests=sizes.clients, salt=1)))
        summary = asdict(summarise(asyncio.run(run(server, load))))
        if summary["errors"]:
            raise RuntimeError(f"requests failed: {summary['failures']}")
        return summary

    def _record_throughput(self, name: str, figures: dict[str, Any], rate: float) -> None:
        figures["decode rate"] = rate
        if math.isnan(rate):
            return
        self.found.values[name] = figures["throughput"] / rate, f"{figures['throughput']:.0f} ÷ {rate:.0f} tok/s"

    def _take(self, name: str, measured: Sequence[Goal]) -> None:
        """Take the value of a law's goal, whose target here is another one."""
        (goal,) = measured
        if not math.isnan(goal.value):
            self.found.values[name] = goal.value, goal.of
