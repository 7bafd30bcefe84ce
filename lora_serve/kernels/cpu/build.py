"""Build the native CPU kernels with the system's compiler, once per machine.

The library lies in the user's cache under a name that hashes everything it depends on: sources, flags, compiler and the
CPU's features (`-march=native` depends on them). It is moved there by a rename, so servers that start together never
see half of it. Where the cache cannot be written (a read-only root), it lies in a folder of the user's own among the
temporary files. Where the build fails, `select` falls back to another backend.

LORA_SERVE_KERNEL_FLAGS in the environment adds compiler flags: `-march=x86-64-v3` builds what an older CPU runs,
`-mno-avx512bf16` leaves an instruction out. A library for another CPU is refused when it is loaded (features.cpp).
With -DLORA_CHECKED among them it is a debug build, whose calls check all memory that they are about to read and write;
it also needs AddressSanitizer's flags and runtime, as `make asan` gives them to the tests.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

SOURCES = ("calls.cpp", "features.cpp", "delta.cpp", "attention.cpp", "matmul.cpp", "packing.cpp", "pointwise.cpp")
HEADERS = ("calls.h", "simd.h", "attention_softmax.h", "attention_tiles.h", "byte_dots.h", "panels.h")
FLAGS = (
    "-std=c++17",
    "-O3",
    "-ffp-contract=fast",
    "-fopenmp",
    "-fPIC",
    "-shared",
    "-fvisibility-inlines-hidden",
    "-Wno-psabi",
)
NATIVE = "-march=native"
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
    """The path of the library built for this CPU; compiles it if this machine has not yet.

    The compiler is the one that CXX names, else the first of `COMPILERS` that is installed.

    Raises:
        BuildError: no compiler, no writable folder, or the compiler failed.
    """
    command = compiler()
    flags = (*FLAGS, NATIVE, *more_flags())
    depends = (*flags, *command, _run([*command, "--version"]), platform.machine(), _cpu_features())
    try:
        name = f"kernels-{source_digest(*depends)}.so"
        cached = _cache_folder() / name
        if cached.exists():
            return cached
        target = _writable_folder(cached.parent) / name
        if not target.exists():
            compile_library(command, flags, target)
        return target
    except OSError as error:
        raise BuildError(f"no folder to build in: {error.strerror or error}") from error


def source_digest(*depends: str) -> str:
    """A hash of the kernels' sources, and of what else a library of them depends on; hexadecimal."""
    here, digest = Path(__file__).parent, hashlib.sha256()
    for part in (*depends, *LIBRARIES):
        digest.update(part.encode() + b"\0")
    for name in (*SOURCES, *HEADERS):
        digest.update((here / name).read_bytes())
    return digest.hexdigest()[:24]


def compile_library(command: Sequence[str], flags: Sequence[str], target: Path) -> None:
    """Compile the kernels to `target`, which is there complete or not at all.

    Raises:
        BuildError: the compiler failed.
        OSError: the target's folder cannot be written.
    """
    here = Path(__file__).parent
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        built = Path(scratch) / target.name
        _run([*command, *flags, *(str(here / name) for name in SOURCES), *LIBRARIES, "-o", str(built)])
        os.replace(built, target)


def compiler() -> list[str]:
    """The command of the C++ compiler; BuildError if there is none."""
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
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(root) / "lora-serve" if os.path.isabs(root) else _private_folder()  # a user without a home


def _writable_folder(cache: Path) -> Path:
    """`cache`, made where it is missing; where it cannot be written, a folder among the temporary files."""
    with contextlib.suppress(OSError):
        cache.mkdir(parents=True, exist_ok=True)
        if os.access(cache, os.W_OK | os.X_OK):
            return cache
    return _private_folder()


def _private_folder() -> Path:
    """A folder among the temporary files that only this user can write; BuildError where another user has made it."""
    user = os.getuid()
    folder = Path(tempfile.gettempdir()) / f"lora-serve-kernels-{user}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    # Anybody may make a folder of that name there, and what is in it will be run.
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != user or found.st_mode & 0o022:
        raise BuildError(f"no folder to build in: {folder} is not this user's own")
    return folder


def _cpu_features() -> str:
    """The CPU's features as the system reports them: flags on Linux, else its name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return platform.processor()
    found = {line for line in lines if line.split(":")[0].strip() in ("flags", "Features", "model name", "CPU part")}
    return "\n".join(sorted(found)) or platform.processor()
