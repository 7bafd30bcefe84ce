"""Build the native CPU kernels with the system's compiler, once per machine.

The library lies in the user's cache under a name that hashes everything it depends on: sources, flags, compiler and the
CPU's features (`-march=native` depends on them). It is moved there by a rename, so servers that start together never
see half of it. Where the build fails, `select` falls back to another backend.

With LORA_SERVE_WITHOUT_BF16=1 in the environment the CPU's instructions for bf16 are not used, as on one that has none.
With LORA_SERVE_CHECKED=1 it is a debug build under AddressSanitizer, whose calls check all memory that they are about
to read and write. Such a library loads only where the sanitizer's runtime was loaded first; `make asan` does that for
the tests.
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

SOURCES = ("calls.cpp", "delta.cpp", "attention.cpp", "matmul.cpp", "packing.cpp", "pointwise.cpp")
HEADERS = ("calls.h", "simd.h", "attention_tiles.h", "panels.h")
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
CHECKED = os.environ.get("LORA_SERVE_CHECKED") == "1"
CHECKED_FLAGS = (  # added to the others
    "-O1",
    "-g1",
    "-fsanitize=address",
    "--param=asan-instrumentation-with-call-threshold=0",  # compiles in a fifth of the time
    "-fno-omit-frame-pointer",
    "-DLORA_CHECKED",
)
WITHOUT_BF16 = os.environ.get("LORA_SERVE_WITHOUT_BF16") == "1"
WITHOUT_BF16_FLAGS = ("-mno-avx512bf16",)  # added to the others
LIBRARIES = ("-lstdc++",)  # a C compiler that accepts C++ (CXX=gcc) does not link it by itself
COMPILERS = ("c++", "g++", "clang++")
TIMEOUT = 300  # seconds


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
    flags = (*FLAGS, *CHECKED_FLAGS * CHECKED, *WITHOUT_BF16_FLAGS * WITHOUT_BF16)
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
