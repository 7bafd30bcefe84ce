"""Runs a function in several processes at once, the ranks of one base, which are forked and talk over gloo."""

from __future__ import annotations

import multiprocessing
import pickle
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TypeVar

import torch

from lora_serve.model.tensor_parallel import TensorParallel

T = TypeVar("T")


def run_ranks(work: Callable[[TensorParallel], T], size: int = 2, seconds: float = 60) -> list[T]:
    """The results of all ranks, in order; what one raises is raised here, as an AssertionError."""
    fork = multiprocessing.get_context("fork")  # which has imported everything
    with tempfile.TemporaryDirectory() as folder:
        pipes = [fork.Pipe(duplex=False) for _ in range(size)]
        processes = [
            fork.Process(target=_run, args=(work, rank, size, Path(folder) / "meeting", write), daemon=True)
            for rank, (_, write) in enumerate(pipes)
        ]
        for process in processes:
            process.start()
        try:
            answers = []
            for read, write in pipes:
                write.close()
                assert read.poll(seconds), "a rank does not answer"
                answers.append(pickle.loads(read.recv_bytes()))
        finally:
            for process in processes:
                process.kill()
                process.join()
    for _, failure in answers:
        assert failure is None, failure
    return [result for result, _ in answers]


def _run(work: Callable[[TensorParallel], T], rank: int, size: int, meeting: Path, answer: Connection) -> None:
    torch.set_num_threads(1)
    try:
        outcome = work(TensorParallel(rank, size, torch.device("cpu"), meeting)), None
    except BaseException:
        outcome = None, traceback.format_exc()
    answer.send_bytes(pickle.dumps(outcome))  # as bytes: tensors would be shared with a process that is gone
