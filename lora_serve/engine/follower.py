"""A rank of the base other than the engine: loads its part as the engine does, then follows the engine's commands."""

from __future__ import annotations

import logging
from pathlib import Path

from lora_serve.config import ServeConfig
from lora_serve.engine.base_setup import device_of, set_up_base
from lora_serve.engine.rank_commands import (
    EmptySlot,
    FillSlot,
    JoinRanks,
    Leave,
    RankConnection,
    RunStep,
    encode_command,
    fill_slot,
    map_memory,
)
from lora_serve.model.batch import Batch
from lora_serve.model.tensor_parallel import TensorParallel

log = logging.getLogger(__name__)


def follow(connection: RankConnection, join: JoinRanks) -> None:
    """Be a rank until the engine says otherwise. Raises ServeErrors, EOFError if the engine is gone, and any other."""
    config = ServeConfig.model_validate_json(join.config)
    device = device_of(config.device, join.rank, config.tensor_parallel)
    parallel = TensorParallel(join.rank, config.tensor_parallel, device, Path(join.meeting_point))
    setup = set_up_base(config, device, lambda stage, fraction: None, join.overlap, parallel)
    base, device_slots = setup.base, setup.device_slots
    while True:
        command, descriptor = connection.receive()
        match command:
            case RunStep(batch):
                device_slots.wait_for_copies(slots_of(batch))
                base.forward(batch)
            case FillSlot(digest, layout, dtype, elements):
                assert descriptor is not None
                adapter = layout.adapter(digest, map_memory(descriptor, dtype, elements))
                connection.send(encode_command(fill_slot(device_slots.load, adapter)))
            case EmptySlot(slot):
                if slot in device_slots:
                    device_slots.evict(slot)
            case Leave():
                return


def slots_of(batch: Batch) -> set[int]:
    """The adapter slots that a batch uses."""
    return {rows.slot for rows in (*batch.adapter_rows, *batch.logits_adapter_rows, *batch.virtual_rows)}
