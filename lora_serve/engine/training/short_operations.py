"""Operations on training runs that are one quantum each: all but passes.

Files are read before that quantum, or written after it, in a thread.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lora_serve.adapters.store.disk import Disk
from lora_serve.adapters.tensor_folder import json_bytes, tensor_bytes, write_folder
from lora_serve.adapters.workers import Workers
from lora_serve.engine.training.method_settings import adapter_settings
from lora_serve.engine.training.run_checkpoint import RunCheckpoint
from lora_serve.engine.training.run_operations import QueuedOperation, TrainingRun
from lora_serve.engine.training.trained_files import peft_config, peft_tensors
from lora_serve.engine.training.trainer import Trainer
from lora_serve.engine.training.training_settings import AdamSettings
from lora_serve.errors import EngineFault, RunNotFound, ServeError, Unavailable
from lora_serve.training_messages import (
    CreateRun,
    ExportRun,
    OptimizerStep,
    RestoreRun,
    SaveRun,
    StepResult,
)

log = logging.getLogger(__name__)


class ShortOperations:
    """Carries out operations that are no passes, and answers them.

    Args:
        workers: threads for files.
        base_name: what exported adapters say of their base.
    """

    def __init__(self, trainer: Trainer, workers: Workers, base_name: str) -> None:
        self._trainer, self._workers, self._base_name = trainer, workers, base_name

    def begin(self, run: TrainingRun) -> None:
        """Let a thread do what the first operation of a run begins with."""
        first = run.first
        if first is None or not isinstance(first.operation, RestoreRun) or first.checkpoint is not None:
            return
        folder, run.waits = Path(first.operation.folder), True

        def read(found: RunCheckpoint | ServeError) -> None:
            if not run.operations or run.operations[0] is not first:
                return  # closed meanwhile
            run.waits = False
            if isinstance(found, ServeError):
                self.finish(run, found)
            else:
                first.checkpoint = found

        self._workers.save(lambda: RunCheckpoint.read(folder), read)

    def finish(self, run: TrainingRun, result: Any) -> None:
        """End the first operation of a run, and begin the next one."""
        run.finish(result)
        self.begin(run)

    def kind(self, run: TrainingRun, queued: QueuedOperation) -> tuple[str, int]:
        """Kind and size of the quantum that a short operation is."""
        match queued.operation:
            case CreateRun():
                return "create", queued.memory
            case OptimizerStep():
                return "optimizer", run.trained.nbytes
            case _:
                return "copy", run.trained.nbytes

    def carry_out(self, run: TrainingRun, queued: QueuedOperation) -> None:
        """One of the operations that are a quantum; errors are its own."""
        try:
            match queued.operation:
                case CreateRun():
                    self._make_adapter(run, queued.operation)
                case OptimizerStep():
                    self.finish(run, self._optimizer_step(run, queued.operation))
                case SaveRun(folder=folder):
                    checkpoint, target = RunCheckpoint.of(run.trained), Path(folder)
                    self._write(run, queued, lambda: checkpoint.write(target))
                case ExportRun(folder=folder, durable=durable):
                    config, tensors = peft_config(run.trained, self._base_name), peft_tensors(run.trained)
                    files, target = {"adapter_config.json": json_bytes(config)}, Path(folder)
                    model, disk = "adapter_model.safetensors", Disk(waits=durable)
                    self._write(run, queued, lambda: write_folder(target, files | {model: tensor_bytes(tensors)}, disk))
                case RestoreRun(optimizer=optimizer):
                    assert queued.checkpoint is not None
                    queued.checkpoint.restore(run.trained, optimizer=optimizer)
                    run.lost = False
                    self.finish(run, run.describe())
        except ServeError as error:
            self.finish(run, error)
        except torch.OutOfMemoryError:
            self.finish(run, Unavailable("training ran out of memory", retry_after=5))
        except Exception:
            log.exception("an operation on training run %s failed", run.name)
            self.finish(run, EngineFault("the operation on the training run failed"))

    def _make_adapter(self, run: TrainingRun, operation: CreateRun) -> None:
        try:
            run.adapter = self._trainer.create(run.name, adapter_settings(operation.settings))
        except BaseException:
            run.closed = True  # nor is there a run for the operations that follow
            first, *others = run.operations
            run.operations.clear()
            run.operations.append(first)
            for queued in others:
                queued.done(run_not_found(run.name))
            raise
        self.finish(run, run.describe())

    def _optimizer_step(self, run: TrainingRun, operation: OptimizerStep) -> StepResult:
        adam = AdamSettings(operation.betas, operation.eps, operation.weight_decay, operation.max_grad_norm)
        if run.lost:
            run.lost = False
            run.trained.gradients.zero_()
            raise EngineFault("gradients were lost in a batch that failed: no step was made; send its batches again")
        found = run.trained.optimizer_step(operation.learning_rate, adam)
        return StepResult(found.grad_norm, found.steps)

    def _write(self, run: TrainingRun, queued: QueuedOperation, write: Callable[[], None]) -> None:
        """Let a thread write files."""
        run.waits = True

        def written(result: ServeError | None) -> None:
            if run.operations and run.operations[0] is queued:  # not closed meanwhile
                self.finish(run, result)

        self._workers.save(write, written)


def run_not_found(name: str) -> RunNotFound:
    """The error for a name that no run has."""
    return RunNotFound(f"there is no training run {name!r}", param="run")
