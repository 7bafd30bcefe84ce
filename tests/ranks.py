"""Runs a function in several processes at once, the ranks of one base, which talk over gloo.

They are forked from a process that has imported everything and has one thread: to fork one with others, as the tests'
own may have, can leave a lock held for ever.
"""

from __future__ import annotations

import multiprocessing
import pickle
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch

from lora_serve.model.tensor_parallel import TensorParallel

T = TypeVar("T")
SECONDS = 60.0  # for a rank to answer


class RankRunner:
    """The process from which ranks are forked; use as a context manager."""

    def __init__(self) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._pipe, theirs = spawn.Pipe()
        self._process = spawn.Process(target=_run_all, args=(theirs,))
        self._process.start()
        theirs.close()

    def __enter__(self) -> RankRunner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pipe.close()
        self._process.join(5)
        self._process.kill()
        self._process.join()

    def __call__(self, work: Callable[[TensorParallel], T], size: int = 2) -> list[T]:
        """The results of all ranks, in order; what one raises is raised here, as an AssertionError.

        Args:
            work: a function of a module, or a `partial` of one.
        """
        self._pipe.send_bytes(pickle.dumps((work, size)))
        assert self._pipe.poll(SECONDS + 30), "the ranks cannot be started"
        answers = pickle.loads(self._pipe.recv_bytes())
        for _, failure in answers:
            assert failure is None, failure
        return [result for result, _ in answers]


def _run_all(requests: Connection) -> None:
    while True:
        try:
            work, size = pickle.loads(requests.recv_bytes())
        except EOFError:
            return
        requests.send_bytes(pickle.dumps(_fork_ranks(work, size)))


def _fork_ranks(work: Callable[[TensorParallel], Any], size: int) -> list[tuple[Any, str | None]]:
    fork = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        pipes = [fork.Pipe(duplex=False) for _ in range(size)]
        processes = [
            fork.Process(target=_run, args=(work, rank, size, Path(folder) / "meeting", write), daemon=True)
            for rank, (_, write) in enumerate(pipes)
        ]
        for process in processes:
            process.start()
        for _, write in pipes:
            write.close()
        answers = [
            pickle.loads(read.recv_bytes()) if read.poll(SECONDS) else (None, "a rank does not answer")
            for read, _ in pipes
        ]
        for process in processes:
            process.kill()
            process.join()
    return answers


def _run(work: Callable[[TensorParallel], Any], rank: int, size: int, meeting: Path, answer: Connection) -> None:
    torch.set_num_threads(1)
    try:
        outcome = work(TensorParallel(rank, size, torch.device("cpu"), meeting)), None
    except BaseException:
        outcome = None, traceback.format_exc()
    answer.send_bytes(pickle.dumps(outcome))  # as bytes: tensors would be shared with a process that is gone
