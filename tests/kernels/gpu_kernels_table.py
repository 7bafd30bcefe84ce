"""A table of the Triton kernels as they are launched on a GPU, compiled without one.

`python gpu_kernels_table.py` compiles every row for every target, down to the machine code, and prints one line of JSON
each. It must run without TRITON_INTERPRET, so `test_gpu_compiles.py` starts it as a process of its own.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = (80, 89, 90)  # A100, 4090, H100


@dataclass(frozen=True)
class Build:
    """One kernel with one choice of its meta-parameters.

    Attributes:
        types: Triton's names of the types of the arguments that are not constexpr ("*bf16", "i32"), in order.
        dependent: whether it is a dependent launch.
        aligned: those whose address or value is a multiple of 16.
        vectors, scalars: instructions that its PTX must contain and must not, or its loads are scalar.
        targets: compute capabilities to compile for.
    """

    name: str
    kernel: Any
    types: dict[str, str]
    constexprs: dict[str, Any]
    aligned: tuple[str, ...] = ()
    warps: int = 4
    stages: int = 3
    dependent: bool = False
    vectors: tuple[str, ...] = ()
    scalars: tuple[str, ...] = ()
    targets: tuple[int, ...] = field(default=TARGETS)


def builds() -> Iterator[Build]:
    """Every row of the table; each module of kernels has a function that yields its own."""
    from gpu_delta_launches import delta_backward_builds, delta_builds  # these import `Build`
    from gpu_launches import attention_builds, pointwise_builds
    from gpu_matmul_launches import linear_builds

    yield from delta_builds()
    yield from delta_backward_builds()
    yield from attention_builds()
    yield from pointwise_builds()
    yield from linear_builds()


def compile_build(build: Build, capability: int) -> dict[str, object]:
    """Compile one row: its shared memory and spilled registers in bytes, and what its PTX lacks and should not have."""
    names = build.kernel.arg_names
    unknown = (build.types.keys() | build.constexprs.keys()) ^ set(names)
    assert not unknown, f"{build.name}: {unknown}"
    source = ASTSource(
        fn=build.kernel,
        signature={name: build.types.get(name, "constexpr") for name in names},
        constexprs=build.constexprs,
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in build.aligned},
    )
    made = triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": build.warps, "num_stages": build.stages, "launch_pdl": build.dependent},
    )
    ptx = made.asm["ptx"]
    return {
        "name": f"{build.name} sm_{capability}",
        "capability": capability,
        "shared": made.metadata.shared,
        "spills": spilled_bytes(ptx, capability),
        "lacks": [vector for vector in build.vectors if vector not in ptx] + _lacks_order(build, ptx),
        "has": [scalar for scalar in build.scalars if scalar in ptx],
    }


def _lacks_order(build: Build, ptx: str) -> list[str]:
    """What a kernel lacks that starts beside the one before it, or has and should not, starting after it."""
    waits = "griddepcontrol.wait" in ptx
    return [] if waits == build.dependent else [f"griddepcontrol.wait: {waits}"]


def spilled_bytes(ptx: str, capability: int) -> int:
    """Bytes of registers that ptxas stores to local memory."""
    ptxas = triton.knobs.nvidia.ptxas.path
    arch = f"sm_{capability}a" if capability >= 90 else f"sm_{capability}"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        command = [ptxas, "-v", f"--gpu-name={arch}", str(source), "-o", str(source.with_suffix(".o"))]
        log = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    return sum(int(count) for count in re.findall(r"(\d+) bytes spill stores", log))


if __name__ == "__main__":
    seen: set[str] = set()
    for row in builds():
        for target in row.targets if "all" in sys.argv[1:] else row.targets[-1:]:
            known = repr((replace(row, targets=()), target))
            if known in seen:
                continue
            seen.add(known)
            print(json.dumps(compile_build(row, target)), flush=True)
