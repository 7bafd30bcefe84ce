"""Libraries that come with the package: the best that the CPU runs is used, and never one of older sources."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from lora_serve.kernels.cpu import build, prebuilt
from lora_serve.kernels.cpu.backend import NativeKernels
from lora_serve.kernels.cpu.build import BuildError, library
from lora_serve.kernels.cpu.prebuilt import INSTRUCTION_SETS, build_all, prebuilt_libraries
from lora_serve.kernels.select import select

CPU = torch.device("cpu")
SETS = INSTRUCTION_SETS.get(platform.machine(), {})

pytestmark = pytest.mark.skipif(len(SETS) < 2, reason="there are no libraries for this machine")


@pytest.fixture
def shipped(tmp_path: Path, native: NativeKernels, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """All libraries of this machine, best first; each is this CPU's own, and nothing can be compiled."""
    own = library()
    folder, cxx = tmp_path / "prebuilt", tmp_path / "cxx"
    folder.mkdir()
    cxx.write_text(f'#!/bin/sh\nfor OUT; do :; done\ncp {own} "$OUT"\n')
    cxx.chmod(0o755)
    build_all(folder, [str(cxx)], platform.machine(), jobs=2)
    monkeypatch.setattr(prebuilt, "FOLDER", folder)
    monkeypatch.setenv("CXX", "no-compiler")
    monkeypatch.delenv("LORA_SERVE_KERNEL_FLAGS", raising=False)
    assert [name for name, _ in prebuilt_libraries()] == [*SETS]
    return [path for _, path in prebuilt_libraries()]


def test_the_best_is_used_without_a_compiler(shipped: list[Path]) -> None:
    kernels = select(CPU)
    assert (kernels.name, kernels.build) == ("native", f"prebuilt for {next(iter(SETS))}")


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the instruction sets are those of x86-64")
def test_one_that_the_cpu_cannot_run_is_passed_over(shipped: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    has = build._cpu_features().split()
    missing = next((name for name in ("avx512fp16", "avx512f") if name.replace("fp16", "_fp16") not in has), None)
    if missing is None:
        pytest.skip("this CPU has everything")
    monkeypatch.delenv("CXX")
    source = Path(build.__file__).parent / "features.cpp"
    for path in shipped[:2]:
        path.unlink()  # one that is loaded stays loaded
        command = [*build.compiler(), "-shared", "-fPIC", f"-m{missing}", str(source), "-lstdc++", "-o", str(path)]
        subprocess.run(command, check=True)
    assert select(CPU).build == f"prebuilt for {[*SETS][2]}"


def test_one_of_other_sources_is_not_used(
    shipped: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    changed = shutil.copytree(Path(build.__file__).parent, tmp_path / "cpu")
    with (changed / "byte_dots.h").open("a") as header:
        header.write("// changed\n")
    monkeypatch.setattr(build, "__file__", str(changed / "build.py"))
    assert list(prebuilt_libraries()) == []
    assert select(CPU).name == "reference"
    assert "no-compiler did not run" in caplog.text


def test_flags_of_the_environment_ask_for_a_build_of_ones_own(
    shipped: list[Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("LORA_SERVE_KERNEL_FLAGS", "-O1")
    assert select(CPU).name == "reference"  # there is no compiler


def test_where_none_can_be_loaded_the_warning_says_why(shipped: list[Path], caplog: pytest.LogCaptureFixture) -> None:
    for path in shipped:
        path.unlink()
        path.write_text("not a library")
    assert select(CPU).name == "reference"
    (message,) = caplog.messages
    assert "none that came with the package" in message
    assert "no-compiler did not run" in message


def test_an_instruction_set_that_the_compiler_lacks_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cxx = tmp_path / "cxx"
    last = next(reversed(SETS.values()))
    # Only the last one's flags are known.
    cxx.write_text(f'#!/bin/sh\ncase "$*" in *{last[-1]}*) for OUT; do :; done; echo so > "$OUT";; *) exit 1;; esac\n')
    cxx.chmod(0o755)
    folder = tmp_path / "prebuilt"
    folder.mkdir()
    build_all(folder, [str(cxx)], platform.machine(), jobs=1)
    assert len([*folder.iterdir()]) == sum(last[-1] in flags for flags in SETS.values())
    assert f"no kernels for {next(iter(SETS))}" in caplog.text


def test_what_is_used_has_the_code_that_a_compiler_would_choose_here(native: NativeKernels) -> None:
    """Every `#if` of the sources is decided by the best set that this CPU runs as it is by -march=native."""
    sources = [path for path in Path(build.__file__).parent.glob("*.[ch]*") if path.name != "features.cpp"]
    asked = [line for path in sources for line in path.read_text().splitlines() if re.match("#(if|elif)", line)]
    branches = {*re.findall(r"__[A-Z]\w+", "\n".join(asked))}

    def defined(flags: tuple[str, ...]) -> set[str]:
        command = [*build.compiler(), *flags, "-dM", "-E", "-x", "c++", "/dev/null"]
        shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return {line.split()[1] for line in shown.splitlines()}

    here = defined((build.NATIVE,)) & branches
    if "__AVX512F__" in here:
        here.discard("__AVXVNNI__")  # which is asked for only without AVX-512
    chosen = next(own for flags in SETS.values() if (own := defined(tuple(flags)) & branches) <= here)
    assert chosen == here


def test_kernels_are_compiled_among_the_temporary_files_where_the_cache_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cxx = tmp_path / "cxx"
    cxx.write_text('#!/bin/sh\nfor OUT; do :; done\n[ "$OUT" = --version ] && exit\necho so > "$OUT"\n')
    cxx.chmod(0o755)
    (tmp_path / "file").touch()
    monkeypatch.setenv("CXX", str(cxx))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    built = library()
    assert built.parent.parent == tmp_path
    assert built.parent.stat().st_mode & 0o777 == 0o700
    assert library() == built
    built.parent.chmod(0o777)  # as another user may have made it, to have their code run
    with pytest.raises(BuildError, match="not this user's own"):
        library()
