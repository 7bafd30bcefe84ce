"""A recorded pass is replayed on the memory that it was recorded on; a pass that cannot be is refused."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import DTYPES, pack_one
from torch import Tensor

from lora_serve.kernels.cpu.backend import NativeKernels
from lora_serve.kernels.cpu.recording import Arena


def run_pass(native: NativeKernels, x: Tensor, weight: Tensor) -> Tensor:
    """A pass of native calls, operators and views."""
    n = native.rms_norm(x, weight, 1e-6, plus_one=False)
    halves = torch.cat([n[:, 1:], -n[:, :1]], dim=1)
    total = x + native.gated_activation(n, halves, "silu")
    total.mul_(3)
    return total.view(-1)[2:].unsqueeze(0) + torch.ones(1, x.numel() - 2)


def test_a_recorded_pass_is_replayed_with_other_numbers(native: NativeKernels) -> None:
    x, weight = torch.randn(3, 8), torch.randn(8)
    with torch.inference_mode():
        recording = native.new_recording(check_values=False)
        with recording:
            result = run_pass(native, x, weight)
        for _ in range(3):
            x.copy_(torch.randn(3, 8))
            recording.replay()
            assert torch.equal(result, run_pass(native, x, weight))
    assert recording.unsupported is None


def test_only_the_calls_of_the_recording_thread_are_recorded(native: NativeKernels) -> None:
    x, weight, matrix = torch.randn(3, 8), torch.randn(8), torch.randn(40, 24)
    packed, ids = pack_one(native, matrix), torch.arange(3)
    theirs: list[Tensor] = []

    def load() -> None:
        """The native calls of loading an adapter, in another thread than the step."""
        repacked, unpacked, found = pack_one(native, matrix), native.unpack(packed), native.lookup(packed, ids)
        theirs.extend([unpacked, repacked.data, found, native.rms_norm(x, weight, 1e-6, plus_one=False)])

    def run() -> Tensor:
        other.submit(load).result(timeout=10)
        return native.rms_norm(x, weight, 1e-6, plus_one=False)

    with ThreadPoolExecutor(1) as other, torch.inference_mode():
        recording = native.new_recording(check_values=False)
        result = recording.record(run)
    for each in theirs:
        each.fill_(1)
    x.copy_(torch.randn(3, 8))
    with torch.inference_mode():
        recording.replay()
    assert torch.equal(result, native.rms_norm(x, weight, 1e-6, plus_one=False))
    assert all(bool((each == 1).all()) for each in theirs)


def test_recordings_share_the_arena_and_use_their_own_memory_beyond_it(native: NativeKernels) -> None:
    native._arena = Arena(200)
    x, weight = torch.randn(3, 8), torch.randn(8)
    with torch.inference_mode():
        recordings = [native.new_recording(check_values=False), native.new_recording(check_values=False)]
        for recording in recordings:
            with recording:
                first, second = (native.rms_norm(x, weight, 1e-6, plus_one=False) for _ in range(2))
        for recording in recordings:
            first.zero_(), second.zero_()
            recording.replay()
            assert torch.equal(first, second) == (
                recording is recordings[1]
            )  # results beyond the arena are each recording's own
    native._arena = Arena(1 << 20)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), dtype=DTYPES, count=st.integers(1, 9000))
def test_sums_are_rounded_as_torch_rounds_them(
    native: NativeKernels, seed: int, dtype: torch.dtype, count: int
) -> None:
    torch.manual_seed(seed)
    x, y = (torch.randn(count).to(dtype) for _ in range(2))
    with native.new_recording(check_values=False):
        total = x + y
    assert torch.equal(total, x + y)


@pytest.mark.parametrize(
    "depends",
    [
        lambda x: x if x.sum().item() > 0 else -x,
        lambda x: x if bool(x[0] > 0) else -x,
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x + torch.rand(3),
        lambda x: torch.zeros(x.argmax().tolist() + 1),
    ],
    ids=["item", "bool", "mask", "nonzero", "random", "tolist"],
)
def test_a_pass_that_depends_on_values_or_random_numbers_is_refused(
    native: NativeKernels, depends: Callable[[Tensor], Tensor]
) -> None:
    with torch.inference_mode():
        recording = native.new_recording(check_values=True)
        with recording:
            depends(torch.tensor([1.0, -2.0, 3.0]))
    assert recording.unsupported is not None
