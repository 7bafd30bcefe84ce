"""Operations on training runs that are one quantum each: all but passes.

Files are read before that quantum, or written after it, in a thread. What all weights are read for is computed there
as well: what DoRA, PiSSA and OLoRA begin with, and the difference to the initial delta that is exported.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_serve.adapters.store.disk import Disk
from lora_serve.adapters.tensor_folder import json_bytes, tensor_bytes, write_folder
from lora_serve.adapters.workers import Done, Work, Workers
from lora_serve.engine.training.method_settings import adapter_settings
from lora_serve.engine.training.run_checkpoint import RunCheckpoint
from lora_serve.engine.training.run_operations import QueuedOperation, TrainingRun
from lora_serve.engine.training.trainable_adapter import TrainableAdapter
from lora_serve.engine.training.trained_files import peft_config, peft_tensors
from lora_serve.engine.training.trainer import Trainer
from lora_serve.engine.training.training_settings import AdamSettings, LoraSettings
from lora_serve.errors import BadRequest, EngineFault, RunNotFound, ServeError, Unavailable
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
        remove_closed: called when a run could not be created.
    """

    def __init__(self, trainer: Trainer, workers: Workers, base_name: str, remove_closed: Callable[[], None]) -> None:
        self._trainer, self._workers, self._base_name = trainer, workers, base_name
        self._remove_closed = remove_closed

    def begin(self, run: TrainingRun) -> None:
        """Let a thread do what the first operation of a run begins with."""
        first = run.first
        if first is None or first.prepared is not None:
            return
        match first.operation:
            case RestoreRun(folder=folder):
                self._prepare(run, first, self._workers.save, lambda: RunCheckpoint.read(Path(folder)))
            case CreateRun(settings=given):
                settings = adapter_settings(given)
                if isinstance(settings, LoraSettings) and settings.reads_weights:
                    self._prepare(
                        run,
                        first,
                        self._workers.decompose,
                        lambda: self._trainer.initial_weights(settings, lambda: not run.closed),
                    )

    def _prepare(
        self,
        run: TrainingRun,
        first: QueuedOperation,
        submit: Callable[[Work[Any], Done[Any]], None],
        work: Callable[[], Any],
    ) -> None:
        run.waits = True

        def prepared(found: Any) -> None:
            if not run.operations or run.operations[0] is not first:
                return  # closed meanwhile
            run.waits = False
            if not isinstance(found, ServeError):
                first.prepared = found
            elif run.adapter is None:
                self._fail_create(run, found)
            else:
                self.finish(run, found)

        submit(work, prepared)

    def finish(self, run: TrainingRun, result: Any) -> None:
        """End the first operation of a run, and begin the next one."""
        run.finish(result)
        self.begin(run)

    def kind(self, run: TrainingRun, queued: QueuedOperation) -> tuple[str, int]:
        """Kind and size of the quantum that a short operation is."""
        match queued.operation:
            case CreateRun():
                return "create", queued.memory
            case OptimizerStep() | RestoreRun() if (encoder := run.trained.layout.encoder) is not None:
                return "encoder", encoder.encoder.work
            case OptimizerStep():
                return "optimizer", run.trained.nbytes
            case _:
                return "copy", run.trained.nbytes

    def carry_out(self, run: TrainingRun, queued: QueuedOperation) -> None:
        """One of the operations that are a quantum; errors are its own."""
        try:
            match queued.operation:
                case CreateRun():
                    self._make_adapter(run, queued, queued.operation)
                case OptimizerStep():
                    self.finish(run, self._optimizer_step(run, queued.operation))
                case SaveRun(folder=folder):
                    checkpoint, target = RunCheckpoint.of(run.trained), Path(folder)
                    self._write(run, queued, lambda: checkpoint.write(target))
                case ExportRun(folder=folder, durable=durable):
                    adapter, masters = run.trained, run.trained.masters.to("cpu", copy=True)
                    target, disk = Path(folder), Disk(waits=durable)
                    self._write(run, queued, lambda: self._export(adapter, masters, target, disk))
                case RestoreRun(optimizer=optimizer):
                    assert isinstance(queued.prepared, RunCheckpoint)
                    queued.prepared.restore(run.trained, optimizer=optimizer)
                    run.lost = False
                    self.finish(run, run.describe())
        except ServeError as error:
            self.finish(run, error)
        except torch.OutOfMemoryError:
            if isinstance(queued.operation, OptimizerStep):
                run.lose_gradients()  # they are not what the passes added any more
            self.finish(run, Unavailable("training ran out of memory", retry_after=5))
        except Exception:
            log.exception("an operation on training run %s failed", run.name)
            self.finish(run, EngineFault("the operation on the training run failed"))

    def _make_adapter(self, run: TrainingRun, queued: QueuedOperation, operation: CreateRun) -> None:
        try:
            run.adapter = self._trainer.create(run.name, adapter_settings(operation.settings), initial=queued.prepared)
            queued.prepared = None
        except ServeError as error:
            self._fail_create(run, error)
        except torch.OutOfMemoryError:
            self._fail_create(run, Unavailable("training ran out of memory", retry_after=5))
        except Exception:
            log.exception("training run %s could not be created", run.name)
            self._fail_create(run, EngineFault("the training run could not be created"))
        else:
            self.finish(run, run.describe())

    def _fail_create(self, run: TrainingRun, error: ServeError) -> None:
        """End a run that could not be created; there is none for the operations that follow either."""
        run.closed = True
        run.finish(error)
        run.fail_all(run_not_found(run.name))
        self._remove_closed()

    def _export(self, adapter: TrainableAdapter, masters: Tensor, folder: Path, disk: Disk) -> None:
        """Write PEFT's files of an adapter with these master weights."""
        if not masters.isfinite().all():
            raise BadRequest(f"the weights of {adapter.name!r} are not finite; restore what was saved before")
        config, tensors = peft_config(adapter, self._base_name), peft_tensors(adapter, masters)
        files = {"adapter_config.json": json_bytes(config), "adapter_model.safetensors": tensor_bytes(tensors)}
        write_folder(folder, files, disk)

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
