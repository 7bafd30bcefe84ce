"""Native libraries that come inside the package: one for each instruction set that the kernels have code for.

A wheel has them, a checkout has not (`make wheel` and setup.py). The first that the CPU can run is as fast as what the
compiler makes for that very CPU, so it is preferred to compiling. A library's name has the hash of the sources that it
was made from: after a change of those it is not found any more.
"""

from __future__ import annotations

import logging
import platform
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lora_serve.kernels.cpu.build import FLAGS, BuildError, compile_library, source_digest

log = logging.getLogger(__name__)

FOLDER = Path(__file__).parent / "prebuilt"
AVX512 = ("-march=x86-64-v4",)
AVX512_VNNI = (*AVX512, "-mavx512vnni")
AVX512_BF16 = (*AVX512_VNNI, "-mavx512bf16")
INSTRUCTION_SETS: dict[str, dict[str, Sequence[str]]] = {  # machine → what `#if` in the sources asks for, best first
    "x86_64": {
        "AVX-512 with FP16": (*AVX512_BF16, "-mavx512fp16"),
        "AVX-512 with BF16": AVX512_BF16,
        "AVX-512 with VNNI": AVX512_VNNI,
        "AVX-512": AVX512,
        "AVX2 with VNNI": ("-march=x86-64-v3", "-mavxvnni"),
        "AVX2": ("-march=x86-64-v3",),
    },
    "aarch64": {
        "NEON with BF16": ("-march=armv8.6-a",),
        "NEON with dot products": ("-march=armv8.2-a+dotprod",),
        "NEON": ("-march=armv8-a",),
    },
}


def prebuilt_libraries() -> Iterator[tuple[str, Path]]:
    """Instruction set and path of each library that was built from the present sources for this machine, best first."""
    for name, flags in INSTRUCTION_SETS.get(platform.machine(), {}).items():
        path = FOLDER / _file_name(name, flags)
        if path.exists():
            yield name, path


def build_all(folder: Path, command: Sequence[str], machine: str, jobs: int) -> None:
    """Build the libraries for a machine into an empty folder; an instruction set that the compiler lacks is left out.

    Args:
        command: the compiler.
        jobs: how many are compiled at a time.
    """

    def build(name: str, flags: Sequence[str]) -> None:
        try:
            compile_library(command, (*FLAGS, *flags), folder / _file_name(name, flags))
        except BuildError as error:
            log.warning("no kernels for %s: %s", name, error)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(build, INSTRUCTION_SETS[machine].keys(), INSTRUCTION_SETS[machine].values()))


def _file_name(name: str, flags: Sequence[str]) -> str:
    return f"{name.lower().replace(' ', '-')}-{source_digest(*FLAGS, *flags)}.so"
