"""A checked build ends the process, with a report, where a kernel is given memory that is gone or too small."""

from __future__ import annotations

import subprocess
import sys

import pytest

from lora_serve.kernels.cpu.build import CHECKED

pytestmark = pytest.mark.skipif(not CHECKED, reason="needs the checked build: make asan")

BEGIN = """
from dataclasses import replace
import torch
from lora_serve.kernels.cpu.build import library
from lora_serve.kernels.contract import Delta, DeltaGroup, Segments
from lora_serve.kernels.cpu.backend import NativeKernels
native, x, weight = NativeKernels(library()), torch.ones(3, 64), torch.ones(64)
"""
FAULTS = {
    "a recorded step outlives its input": """
recording = native.new_recording(check_values=False)
with torch.inference_mode():
    recording.record(lambda: native.rms_norm(x, weight, 1e-6, plus_one=False))
recording.replay()
del weight
print("so far so good", flush=True)
recording.replay()
""",
    "a slot points at an adapter that was evicted": """
group, y = DeltaGroup(64, (96,), 2, torch.float32, torch.device("cpu")), torch.zeros(3, 96)
group.set(0, 1, Delta(torch.ones(4, 64), torch.ones(4, 96)))
start, end, slot = (torch.tensor([number], dtype=torch.int32) for number in (0, 3, 1))
segments = Segments(start, end, slot, torch.ones(1), 3, 4)
native.delta(x, [y], group, segments)
group.deltas[0][1] = None
print("so far so good", flush=True)
native.delta(x, [y], group, segments)
""",
    "packed weights are smaller than they say": """
packed, = native.pack([torch.ones(96, 64)])
native.linear(x, [(packed, None)])
print("so far so good", flush=True)
native.linear(x, [(replace(packed, shape=(128, 64)), None)])
""",
}
REPORTS = ("heap-use-after-free", "heap-use-after-free", "heap-buffer-overflow")


@pytest.mark.parametrize(("fault", "report"), list(zip(FAULTS.values(), REPORTS, strict=True)), ids=FAULTS)
def test_the_process_ends_with_a_report(fault: str, report: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", BEGIN + fault], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.stdout == "so far so good\n"
    assert done.returncode != 0
    assert f"AddressSanitizer: {report}" in done.stderr
