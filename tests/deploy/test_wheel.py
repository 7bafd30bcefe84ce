"""Wheels: the compiled kernels are inside, and a machine without a compiler serves with them."""

from __future__ import annotations

import platform
import re
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import httpx
import pytest
from wheels import ROOT, build_wheel

from lora_serve.kernels.cpu.prebuilt import INSTRUCTION_SETS

KERNELS = "lora_serve/kernels/cpu/prebuilt/"


def fake_compiler(folder: Path, machine: str) -> str:
    path = folder / "cxx"
    path.write_text(
        f'#!/bin/sh\nfor OUT; do :; done\n[ "$OUT" = -dumpmachine ] && echo {machine} && exit\necho so > "$OUT"\n'
    )
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("target", "tag"),
    [("x86_64-linux-gnu", "linux_x86_64"), ("aarch64-linux-gnu", "linux_aarch64"), ("riscv64-linux-gnu", "any")],
)
def test_a_wheel_has_the_kernels_of_its_compilers_machine(tmp_path: Path, target: str, tag: str) -> None:
    wheel = build_wheel(tmp_path, CXX=fake_compiler(tmp_path, target))
    assert wheel.name.endswith(f"-py3-none-{tag}.whl")
    inside = zipfile.ZipFile(wheel).namelist()
    assert len([name for name in inside if name.startswith(KERNELS)]) == len(
        INSTRUCTION_SETS.get(target.split("-")[0], {})
    )
    assert {"lora_serve/kernels/cpu/simd.h", "lora_serve/web/index.html"} < {*inside}


def test_without_a_compiler_the_wheel_is_pure_python(tmp_path: Path) -> None:
    wheel = build_wheel(tmp_path, CXX="no-such-compiler")
    assert wheel.name.endswith("-py3-none-any.whl")


@pytest.mark.packaging
@pytest.mark.timeout(900)
@pytest.mark.skipif(platform.machine() not in INSTRUCTION_SETS, reason="there are no kernels for this machine")
def test_an_installed_wheel_serves_the_demo_with_native_kernels_and_no_compiler(tmp_path: Path) -> None:
    wheel = build_wheel(tmp_path)
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    python = str(tmp_path / "venv/bin/python")
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", str(wheel)], check=True)
    (site,) = (tmp_path / "venv/lib").glob("*/site-packages")
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")  # what the project needs is there already
    command = [str(tmp_path / "venv/bin/lora-serve"), "serve", str(ROOT / "demo/model"), "--served-model-name", "demo"]
    command += ["--adapters", str(ROOT / "adapters"), "--store", str(tmp_path / "store"), "--port", "0"]
    environment = {"PATH": str(tmp_path / "venv/bin"), "HOME": "/nonexistent", "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True) as server:
        try:
            shown = ""
            assert server.stdout is not None
            while "listening" not in shown:
                shown += server.stdout.readline() or pytest.fail(f"the server ended: {shown}")
            assert re.search(r"native kernels prebuilt for \w", shown), shown
            url = re.search(r"http://\S+", shown)
            assert url
            body = {"prompt": "two red foxes run\n", "adapter": "shout", "max_tokens": 32, "temperature": 0}
            answer = httpx.post(url[0] + "/v1/completions", json=body, timeout=60).json()
            assert answer["choices"][0]["text"].strip() == "TWO RED FOXES RUN"
        finally:
            server.terminate()
            assert server.wait(30) == 0
