"""Steps on the device: launched with their adapters in slots, then sampled, outputs not read yet."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from lora_serve.adapters.memory import AdapterMemory
from lora_serve.engine.runner import LaunchSampling, Outputs, Runner, SequenceOutput
from lora_serve.engine.scheduled_sequence import ScheduledSequence
from lora_serve.errors import ServeError


@dataclass(frozen=True)
class InFlightStep:
    """A launched step whose outputs have not been read.

    Attributes:
        scheduled: the sequences in it.
        adapters: number of adapters in use.
        started: launch time in seconds, on the engine's clock.
        outputs: waits for the device; returns one output for each of `scheduled`.
    """

    scheduled: list[ScheduledSequence]
    adapters: int
    started: float
    outputs: Outputs


@dataclass(frozen=True)
class LaunchedStep:
    """A step whose forward pass was launched and whose tokens are not sampled yet; attributes as in `InFlightStep`."""

    scheduled: list[ScheduledSequence]
    adapters: int
    started: float
    launch_sampling: LaunchSampling

    def sample(self) -> InFlightStep:
        """Launch sampling. The outputs of the previous step must have been processed."""
        return InFlightStep(self.scheduled, self.adapters, self.started, self.launch_sampling())


def launch(scheduled: list[ScheduledSequence], runner: Runner, memory: AdapterMemory, started: float) -> LaunchedStep:
    """Assign slots to the step's adapters and launch its forward pass. Only sequences whose adapters do not fit fail.

    The step waits for those of its adapters that are still being copied to the device.
    """
    slots, failed = _assign_slots(scheduled, memory)
    going = [part for part in scheduled if all(digest in slots for digest in part.seq.digests)]
    memory.wait_for_copies(_digests(going))
    launch_sampling = runner.launch(going, slots) if going else (lambda: list)
    parts = going + [output.part for output in failed]

    def sample() -> Outputs:
        outputs = launch_sampling()
        return lambda: failed + outputs()

    return LaunchedStep(parts, len(_digests(parts)), started, sample)


def _assign_slots(
    scheduled: list[ScheduledSequence], memory: AdapterMemory
) -> tuple[dict[str, int], list[SequenceOutput]]:
    """Slots by adapter, and failures of the sequences whose adapters could not all get one."""
    try:
        return memory.assign_slots(_digests(scheduled)), []
    except ServeError:
        slots: dict[str, int] = {}
        failed = []
        for part in scheduled:  # fail only the sequences whose adapters do not fit
            try:
                slots |= memory.assign_slots([*slots, *part.seq.digests])
            except ServeError as error:
                failed.append(SequenceOutput(part, failure=error))
        return slots, failed


def _digests(scheduled: Iterable[ScheduledSequence]) -> list[str]:
    return list(dict.fromkeys(digest for part in scheduled for digest in part.seq.digests))
