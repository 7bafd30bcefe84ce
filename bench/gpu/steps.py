"""Times of steps as the engine's runner calls them, without sampling: decode, prompts and mixed steps, by adapters."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.gpu.figures import GOAL_ROWS, Step, step_bytes
from bench.gpu.forward_pass import (
    RandomBase,
    decode_batch,
    mixed_batch,
    prefill_batch,
    random_adapter,
    time_in_turns,
)
from bench.gpu.kernel_profile import kernel_times
from bench.shapes import Shape
from lora_serve.kernels.packed_weight import Scheme
from lora_serve.model.batch import Batch

RANK = 16
RANKS = (8, 16, 32, 64, 128)
MIXED_NAME = "ranks 8…128"


@dataclass(frozen=True)
class StepSizes:
    """Sizes of the steps.

    Attributes:
        rows, context: of decode steps; `distinct` are those at which all adapters differ, too.
        prompts: tokens; the first is that of the mixed step.
        loop: rows and context of one more decode step of the base: that of a closed loop; None: none.
        longest: tokens of the longest sequence.
        budget: about the seconds for one repeat of one step.
    """

    rows: tuple[int, ...]
    distinct: tuple[int, ...]
    context: int
    prompts: tuple[int, ...]
    longest: int
    budget: float
    loop: tuple[int, int] | None = None


@dataclass
class StepFigures:
    """What was measured so far, in seconds.

    Attributes:
        decode: steps by mix and rows, those of `MIXED_NAME` among them.
        idle: the base's step without loaded adapters ÷ with all of them loaded.
        prompts: by "TOKENS base" and "TOKENS one".
        mixed: by "base" and "one": the mixed step, and its two parts by themselves.
        eager: prompts and mixed steps through the model's Python, by the same names.
        loop: the closed loop's decode step.
        startup: seconds and bytes by part.
        kernels: what the device did in a step, if wanted.
    """

    decode: list[Step] = field(default_factory=list)
    idle: float = math.nan
    prompts: dict[str, float] = field(default_factory=dict)
    mixed: dict[str, tuple[float, float, float]] = field(default_factory=dict)
    eager: dict[str, float] = field(default_factory=dict)
    loop: float = math.nan
    startup: dict[str, float] = field(default_factory=dict)
    kernels: dict[str, Any] = field(default_factory=dict)


def measure_steps(
    shape: Shape, folder: Path, device: torch.device, sizes: StepSizes, found: StepFigures, *, profile: bool = False
) -> None:
    """Time all steps; figures go into `found` one by one.

    Args:
        folder: with the model's configuration.
    """
    most, context = max(*sizes.rows, 0 if sizes.loop is None else sizes.loop[0]), sizes.context
    slots = max(*sizes.distinct, 1)
    base = RandomBase(folder, device, rows=most, context=context, slots=slots, longest=sizes.longest)
    found.startup |= base.startup
    middle = max(rows for rows in sizes.rows if rows <= GOAL_ROWS)

    def seconds(**batches: Batch) -> dict[str, float]:
        return time_in_turns({name: base.step(batch) for name, batch in batches.items()}, device, sizes.budget)

    before = seconds(none=decode_batch([0] * middle, context))["none"]
    own = sorted(base.load(random_adapter(base.shape, RANK, f"same {index}", device)) for index in range(slots))
    for rows in sizes.rows:
        mixes = {"none": [0] * rows, "one": own[:1] * rows}
        mixes |= {"distinct": own[:rows]} if rows in sizes.distinct else {}
        for mix, each in seconds(**{mix: decode_batch(slot, context) for mix, slot in mixes.items()}).items():
            ranks = [] if mix == "none" else [RANK] * (1 if mix == "one" else rows)
            found.decode.append(Step(mix, rows, each, step_bytes(shape, rows, context, ranks)))
        if rows == middle:
            found.idle = before / next(
                each.seconds for each in found.decode if each.mix == "none" and each.rows == middle
            )
    if sizes.loop is not None:
        found.loop = seconds(none=decode_batch([0] * sizes.loop[0], sizes.loop[1]))["none"]
    batches: dict[str, Batch] = {}
    for mix, slot in (("base", 0), ("one", own[0])):
        batches |= {f"{tokens} {mix}": prefill_batch(tokens, slot) for tokens in sizes.prompts}
        batches[f"mixed {mix}"] = mixed_batch(middle, context, sizes.prompts[0], slot)
    _time_batches(base, batches, device, sizes, found)
    for mix, name in (("base", "none"), ("one", "one")):
        decode = next(each.seconds for each in found.decode if each.mix == name and each.rows == middle)
        found.mixed[mix] = found.prompts.pop(f"mixed {mix}"), decode, found.prompts[f"{sizes.prompts[0]} {mix}"]
    if profile:
        batches |= {"decode base": decode_batch([0] * middle, context)}
        batches |= {"decode one": decode_batch(own[:1] * middle, context)}
        batches |= {"decode distinct": decode_batch(own[:middle], context)}
        found.kernels |= {name: kernel_times(base.step(batch), device) for name, batch in batches.items()}
    base.evict_all()
    ranks = [RANKS[index % len(RANKS)] for index in range(min(middle, slots))]
    own = sorted(base.load(random_adapter(base.shape, rank, f"{i}", device)) for i, rank in enumerate(ranks))
    mixed = seconds(mixed=decode_batch(own, context))["mixed"]
    found.decode.append(Step(MIXED_NAME, len(own), mixed, step_bytes(shape, len(own), context, ranks)))


def _time_batches(
    base: RandomBase, batches: dict[str, Batch], device: torch.device, sizes: StepSizes, found: StepFigures
) -> None:
    """Time prompts and mixed steps as they are served, a base and an adapter in turns, and eagerly."""
    for what in dict.fromkeys(name.rpartition(" ")[0] for name in batches):
        calls: dict[str, Callable[[], Tensor]] = {}
        for mix in ("base", "one"):
            batch = batches[f"{what} {mix}"]
            calls |= {f"{what} {mix}": base.step(batch), f"eager {what} {mix}": base.step(batch, eager=True)}
        for name, each in time_in_turns(calls, device, sizes.budget).items():
            eager = name.startswith("eager ")
            (found.eager if eager else found.prompts)[name.removeprefix("eager ")] = each


def measure_decode(
    folder: Path, device: torch.device, rows: Sequence[int], context: int, budget: float, scheme: Scheme | None = None
) -> dict[int, float]:
    """Seconds of a decode step of a base without adapters, by rows; `scheme`: how the base is quantised."""
    most = max(rows)
    base = RandomBase(
        folder, device, rows=most, context=context, slots=1, longest=context + 16, tokens=most, scheme=scheme
    )
    calls = {str(each): base.step(decode_batch([0] * each, context)) for each in rows}
    return {int(name): each for name, each in time_in_turns(calls, device, budget).items()}
