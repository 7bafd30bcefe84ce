"""Process groups of tensor parallelism: the ranks of one base, and the collectives between them.

There are two groups: one over the devices for what steps compute (NCCL, or gloo on a CPU), and a gloo group for what
the ranks agree on at start. Neither is torch's default group; whoever needs one has a `TensorParallel`.
"""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor

# The ranks wait for each other while one of them computes the oracle; a hang is for the supervisor to notice.
TIMEOUT = timedelta(hours=1)
LOOPBACK = "127.0.0.1"

dist: Any = torch.distributed  # whose stubs leave much of this out


class RanksOutOfStep(RuntimeError):
    """A rank failed within a forward pass, in which the others wait for it: all of them have to be started again."""


class TensorParallel:
    """One rank's end of the groups. Constructed in all ranks at once.

    Args:
        meeting_point: a file that does not exist yet, in a folder that only this user can read; no longer needed
            afterwards.
    """

    def __init__(self, rank: int, size: int, device: torch.device, meeting_point: Path) -> None:
        self.rank, self.size, self.device = rank, size, device
        store = dist.FileStore(str(meeting_point), size)
        self._agreement = _gloo(dist.PrefixStore("agreement", store), rank, size)
        self._steps = _nccl(dist.PrefixStore("steps", store), rank, size) if device.type == "cuda" else self._agreement
        self.all_reduce(torch.zeros(1, device=device))  # NCCL connects at the first call

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of all ranks' `x`, in place where that is contiguous."""
        x = x.contiguous()
        self._steps.allreduce([x]).wait()
        return x

    def broadcast(self, x: Tensor) -> None:
        """Overwrite `x`, on the device, with rank 0's."""
        self._steps.broadcast([x], _from_rank_0()).wait()

    def share(self, x: Tensor) -> None:
        """Overwrite `x`, on the host, with rank 0's."""
        self._agreement.broadcast([x], _from_rank_0()).wait()

    def least(self, number: int) -> int:
        """The least of all ranks' numbers."""
        options = dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp.MIN
        x = torch.tensor([number], dtype=torch.int64)
        self._agreement.allreduce([x], options).wait()
        return int(x)


def _from_rank_0() -> Any:
    options = dist.BroadcastOptions()
    options.rootRank = 0
    return options


def _gloo(store: Any, rank: int, size: int) -> Any:
    options = dist.ProcessGroupGloo._Options()
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=LOOPBACK)]  # no other machine may connect
    options._timeout = TIMEOUT
    options._threads = 1
    return dist.ProcessGroupGloo(store, rank, size, options)


def _nccl(store: Any, rank: int, size: int) -> Any:
    os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = TIMEOUT
    return dist.ProcessGroupNCCL(store, rank, size, options)
