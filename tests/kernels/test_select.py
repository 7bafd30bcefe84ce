"""Selection of the backend: the native library is built once per machine; plain torch where it cannot be."""

from __future__ import annotations

import logging
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_serve.kernels.cpu import build
from lora_serve.kernels.cpu.backend import NativeKernels
from lora_serve.kernels.cpu.build import BuildError, library
from lora_serve.kernels.select import refuse_scheme, select

CPU = torch.device("cpu")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "lora-serve"


def fake_compiler(folder: Path, body: str) -> str:
    """A fake compiler that runs `body`; `$OUT` is the output file."""
    script = folder / "cxx"
    answer = 'for OUT; do :; done\n[ "$OUT" = --version ] && echo one && exit 0'
    script.write_text(f"#!/bin/sh\n{answer}\n{body}\n")
    script.chmod(0o755)
    return str(script)


def test_the_library_is_built_once(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", fake_compiler(tmp_path, f'echo built >> {tmp_path}/log; echo so > "$OUT"'))
    first = library()
    assert first.parent == cache
    assert library() == first
    assert (tmp_path / "log").read_text().splitlines() == ["built"]


def test_another_compiler_builds_another_library(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", fake_compiler(tmp_path, 'echo so > "$OUT"'))
    first = library()
    monkeypatch.setenv("CXX", fake_compiler(tmp_path, 'echo so > "$OUT"') + " -O1")
    assert library() != first


def test_flags_of_the_environment_come_last_and_build_another_library(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", fake_compiler(tmp_path, 'echo "$@" > "$OUT"'))
    monkeypatch.delenv("LORA_SERVE_KERNEL_FLAGS", raising=False)
    first = library()
    monkeypatch.setenv("LORA_SERVE_KERNEL_FLAGS", "-march=x86-64-v3 '-DTEXT=two words'")
    assert library() != first
    flags = library().read_text()
    assert flags.index("-march=native") < flags.index("-march=x86-64-v3 -DTEXT=two words")


def test_another_cpu_builds_another_library(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", fake_compiler(tmp_path, 'echo so > "$OUT"'))
    first = library()
    monkeypatch.setattr(build, "_cpu_features", lambda: "flags: fewer")
    assert library() != first


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the instruction sets are those of x86-64")
def test_a_library_for_another_cpu_is_refused_and_the_warning_names_what_is_missing(
    cache: Path,
    tmp_path: Path,
    native: NativeKernels,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    has = build._cpu_features().split()
    missing = next((name for name in ("avx512fp16", "avx512f") if name.replace("fp16", "_fp16") not in has), None)
    if missing is None:
        pytest.skip("this CPU has everything")
    sources = Path(build.__file__).parent
    only = f"{' '.join(build.compiler())} -shared -fPIC -m{missing} {sources / 'features.cpp'} -lstdc++"
    monkeypatch.setenv("CXX", fake_compiler(tmp_path, f'{only} -o "$OUT"'))
    kernels = select(CPU)
    assert kernels.name == "reference"
    (message,) = caplog.messages
    assert "compiled for a CPU that has avx512" in message


def test_servers_that_start_together_share_one_complete_library(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", fake_compiler(tmp_path, 'printf half > "$OUT"; sleep 0.2; printf " and half" >> "$OUT"'))
    with ThreadPoolExecutor(4) as pool:
        found = {future.result() for future in [pool.submit(library) for _ in range(4)]}
    assert [path.read_text() for path in found] == ["half and half"]
    assert list(cache.iterdir()) == list(found)  # no temporary folder is left


def test_a_failing_compiler_is_reported_in_one_line(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(
        "CXX", fake_compiler(tmp_path, 'echo "x.cpp: note" >&2; echo "x.cpp: error: no luck" >&2; exit 3')
    )
    with pytest.raises(BuildError) as caught:
        library()
    assert str(caught.value).endswith("ended with 3: x.cpp: error: no luck")
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("body", ["exit 1", 'echo "not a library" > "$OUT"'])
def test_without_native_kernels_torch_serves_and_one_warning_is_logged(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, body: str
) -> None:
    monkeypatch.setenv("CXX", fake_compiler(tmp_path, body))
    with caplog.at_level(logging.DEBUG):
        kernels = select(CPU)
    assert kernels.name == "reference"
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "slower" in caplog.text


def test_an_absent_compiler_is_named(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(BuildError, match="no-such-compiler did not run"):
        library()


def test_a_cpu_uses_native_kernels_unless_they_are_turned_off(
    native: NativeKernels, caplog: pytest.LogCaptureFixture
) -> None:
    assert select(CPU).name == native.name
    assert select(CPU, native=False).name == "reference"
    assert caplog.records == []


def test_a_gpu_uses_the_triton_kernels(caplog: pytest.LogCaptureFixture) -> None:
    kernels = select(torch.device("cuda"))
    assert (kernels.name, caplog.records) == ("triton", [])
    assert kernels.graph_buckets is not None
    assert select(torch.device("cuda"), native=False).name == "reference"


def test_a_gpu_without_triton_and_other_devices_use_plain_torch_with_one_warning_each(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in [name for name in sys.modules if name.startswith("lora_serve.kernels.gpu.")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "triton", None)
    assert select(torch.device("cuda")).name == "reference"
    assert select(torch.device("xpu")).name == "reference"
    assert ["no GPU kernels" in caplog.messages[0], "no kernels for xpu" in caplog.messages[1]] == [True, True]
    assert len(caplog.messages) == 2


@pytest.mark.parametrize(
    ("scheme", "device", "capability", "reason"),
    [
        ("fp8", "cpu", (9, 0), "needs an NVIDIA GPU, and the base is for cpu: int8 is as small"),
        ("fp8", "cuda", (8, 6), "capability 8.9 or newer, and RTX has 8.6: int8 is as small"),
        ("fp8", "cuda", (8, 9), None),
        ("fp8", "cuda", (9, 0), None),
        ("int8", "cpu", (8, 0), None),
        (None, "cuda", (7, 0), None),
    ],
)
def test_fp8_is_refused_where_there_are_no_units_for_it(
    scheme: Any, device: str, capability: tuple[int, int], reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "RTX")
    found = refuse_scheme(scheme, torch.device(device))
    assert found is None if reason is None else reason in (found or "")


def test_the_native_kernels_share_torchs_openmp_runtime(native: NativeKernels) -> None:
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("only Linux tells what is loaded")
    # In a process of its own: libraries of other tests bring their own runtimes.
    code = "from lora_serve.kernels.cpu import build, library; library.Library(build.library()); "
    code += "print(open('/proc/self/maps').read())"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    loaded = {line.split()[-1] for line in shown.splitlines() if "libgomp" in line or "libomp" in line}
    assert len(loaded) == 1
