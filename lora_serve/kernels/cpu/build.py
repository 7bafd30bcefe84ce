"""Build the native CPU kernels with the system's compiler, once per machine.

The library lies in the user's cache under a name that hashes everything it depends on: sources, flags, compiler and the
CPU's features (`-march=native` depends on them). It is moved there by a rename, so servers that start together never
see half of it. Where the build fails, `select` falls back to another backend.

LORA_SERVE_KERNEL_FLAGS in the environment adds compiler flags: `-march=x86-64-v3` builds what an older CPU runs,
`-mno-avx512bf16` leaves an instruction out. A library for another CPU is refused when it is loaded (features.cpp).
With -DLORA_CHECKED among them it is a debug build, whose calls check all memory that they are about to read and write;
it also needs AddressSanitizer's flags and runtime, as `make asan` gives them to the tests.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCES = ("calls.cpp", "features.cpp", "delta.cpp", "attention.cpp", "matmul.cpp", "packing.cpp", "pointwise.cpp")
HEADERS = ("calls.h", "simd.h", "attention_softmax.h", "attention_tiles.h", "byte_dots.h", "panels.h")
FLAGS = (
    "-std=c++17",
    "-O3",
    "-march=native",
    "-ffp-contract=fast",
    "-fopenmp",
    "-fPIC",
    "-shared",
    "-fvisibility-inlines-hidden",
    "-Wno-psabi",
)
LIBRARIES = ("-lstdc++",)  # a C compiler that accepts C++ (CXX=gcc) does not link it by itself
COMPILERS = ("c++", "g++", "clang++")
TIMEOUT = 300  # seconds


def more_flags() -> list[str]:
    """Compiler flags that the environment adds; they come after the others, so that they win."""
    return shlex.split(os.environ.get("LORA_SERVE_KERNEL_FLAGS", ""))


CHECKED = "-DLORA_CHECKED" in more_flags()


class BuildError(Exception):
    """The kernels cannot be built or loaded here; the message is one line with the reason."""


def library() -> Path:
    """The path of the built library; compiles it if this machine has not yet.

    The compiler is the one that CXX names, else the first of `COMPILERS` that is installed.

    Raises:
        BuildError: no compiler, no writable cache folder, or the compiler failed.
    """
    here = Path(__file__).parent
    compiler = _compiler()
    flags = (*FLAGS, *more_flags())
    key = hashlib.sha256()
    for part in (*flags, *LIBRARIES, *compiler, _run([*compiler, "--version"]), platform.machine(), _cpu_features()):
        key.update(part.encode() + b"\0")
    try:
        for name in (*SOURCES, *HEADERS):
            key.update((here / name).read_bytes())
        folder = _cache_folder()
        target = folder / f"kernels-{key.hexdigest()[:24]}.so"
        if target.exists():
            return target
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            built = Path(scratch) / target.name
            _run([*compiler, *flags, *(str(here / name) for name in SOURCES), *LIBRARIES, "-o", str(built)])
            os.replace(built, target)
    except OSError as error:
        raise BuildError(f"no folder to build in: {error.strerror or error}") from error
    return target


def _compiler() -> list[str]:
    named = os.environ.get("CXX")
    if named:
        return shlex.split(named)
    for name in COMPILERS:
        if shutil.which(name):
            return [name]
    raise BuildError("no C++ compiler found (" + ", ".join(COMPILERS) + ", or name one in CXX)")


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]} did not run: {_first_line(str(error))}") from error
    if done.returncode != 0:
        lines = done.stderr.splitlines()
        said = next((line for line in lines if "error" in line), _first_line(done.stderr))
        raise BuildError(f"{command[0]} ended with {done.returncode}: {said.strip() or 'no message'}")
    return done.stdout


def _first_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[0]


def _cache_folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "lora-serve"


def _cpu_features() -> str:
    """The CPU's features as the system reports them: flags on Linux, else its name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return platform.processor()
    found = {line for line in lines if line.split(":")[0].strip() in ("flags", "Features", "model name", "CPU part")}
    return "\n".join(sorted(found)) or platform.processor()
