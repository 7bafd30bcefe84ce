"""The part of the build that pyproject.toml cannot say: wheels carry the native CPU kernels, compiled.

They are built for each instruction set of the compiler's machine, so CXX=aarch64-linux-gnu-g++ makes a wheel for that.
Without a compiler the wheel is pure Python, as an editable install is: the server then compiles them when it starts.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

from setuptools import Command, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build

sys.path.insert(0, str(Path(__file__).parent))  # build backends leave it out

from lora_serve.kernels.cpu.build import BuildError, compiler
from lora_serve.kernels.cpu.prebuilt import INSTRUCTION_SETS, build_all


def compiled_for() -> str | None:
    """The machine that the compiler builds for, if there are kernels for it; on Linux only."""
    try:
        target = subprocess.check_output([*compiler(), "-dumpmachine"], text=True).strip()
    except (BuildError, OSError, subprocess.CalledProcessError) as error:
        print(f"warning: this wheel has no compiled kernels: {error}", file=sys.stderr)
        return None
    machine = target.split("-")[0]
    return machine if "linux" in target and machine in INSTRUCTION_SETS else None


class BuildKernels(Command):
    """The kernels of the compiler's machine, in the package that becomes the wheel."""

    description = "compile the native CPU kernels"
    user_options = ()
    editable_mode = False

    def initialize_options(self) -> None:
        self.build_lib: str | None = None

    def finalize_options(self) -> None:
        self.set_undefined_options("build", ("build_lib", "build_lib"))

    def run(self) -> None:
        machine = compiled_for()
        if machine is None or self.editable_mode:
            return
        folder = Path(self.build_lib or "") / "lora_serve/kernels/cpu/prebuilt"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        build_all(folder, compiler(), machine, jobs=len(os.sched_getaffinity(0)))

    def get_outputs(self) -> list[str]:
        return [str(path) for path in Path(self.build_lib or "").glob("lora_serve/kernels/cpu/prebuilt/*")]

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    def get_source_files(self) -> list[str]:
        return []


class BuildWithKernels(build):
    sub_commands: ClassVar = [*build.sub_commands, ("build_kernels", None)]


class KernelWheel(bdist_wheel):
    """A wheel for every Python, but for one machine."""

    def finalize_options(self) -> None:
        self.machine = compiled_for()
        self.distribution.has_ext_modules = lambda: self.machine is not None  # so that all of it is for one machine
        super().finalize_options()

    def get_tag(self) -> tuple[str, str, str]:
        return super().get_tag() if self.machine is None else ("py3", "none", f"linux_{self.machine}")


setup(cmdclass={"build": BuildWithKernels, "build_kernels": BuildKernels, "bdist_wheel": KernelWheel})
