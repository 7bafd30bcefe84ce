#!/usr/bin/env bash
# The kernels' tests on CPUs that this machine is not, under QEMU's user mode: aarch64 without and with its dot products
# and bf16, and x86-64 with AVX2 only. The tests are the same files, run by a Python and a torch of that architecture.
#
# Debian's packages qemu-user, g++-aarch64-linux-gnu and mmdebstrap are needed; without them it says so and ends. Python
# and torch for aarch64 are installed into .emulated once.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
tests=${*:-tests/kernels/test_matmul.py tests/kernels/test_delta.py tests/kernels/test_attention_kernels.py}

for tool in qemu-aarch64 qemu-x86_64 aarch64-linux-gnu-g++ mmdebstrap; do
    command -v "$tool" >/dev/null || { echo "emulated: skipped, no $tool"; exit 0; }
done
export OMP_NUM_THREADS=1 XDG_CACHE_HOME="$PWD/.emulated/cache"

run() { # flags of the kernels, then the Python
    export LORA_SERVE_KERNEL_FLAGS=$1
    echo "emulated: ${*:2:3}, kernels with $1"
    # shellcheck disable=SC2086
    "${@:2}" -m pytest -p no:cacheprovider $tests
}

if [ ! -e .emulated/complete ]; then
    rm -rf .emulated && mkdir .emulated
    mmdebstrap --quiet --arch=arm64 --variant=extract --include=python3,libstdc++6,zlib1g bookworm .emulated/root
    # 2.10.0 is the last torch whose aarch64 package needs no libraries of a GPU; the tests' other packages are pure
    # Python or come for aarch64 too.
    "$python" -m pip install --quiet --disable-pip-version-check --target .emulated/site --no-deps \
        --platform manylinux_2_28_aarch64 --platform manylinux_2_17_aarch64 --only-binary=:all: \
        --python-version 3.11 torch==2.10.0 \
        $(grep -Eh '^(numpy|filelock|typing-extensions|sympy|networkx|jinja2|fsspec|mpmath|markupsafe|setuptools|hypothesis|sortedcontainers|pytest|pytest-asyncio|pytest-timeout|iniconfig|packaging|pluggy|pygments|attrs)==' \
            requirements/serve.txt requirements/dev.txt)
    touch .emulated/complete
fi

if [ "$(uname -m)" = x86_64 ]; then
    run "-march=x86-64-v3" qemu-x86_64 -cpu Haswell "$python"
    # The compiler runs on the real CPU, and builds for it. If that has more than Haswell, its library must be refused.
    LORA_SERVE_KERNEL_FLAGS="" qemu-x86_64 -cpu Haswell "$python" -c '
import torch
from lora_serve.kernels.select import select
print("emulated: the kernels of this machine on a Haswell:", select(torch.device("cpu")).name)'
fi
export CXX=aarch64-linux-gnu-g++ PYTHONPATH="$PWD:$PWD/.emulated/site"
for build in neoverse-n1:-march=armv8-a neoverse-n1:-march=armv8.2-a+dotprod max:-march=armv8.6-a; do
    run "${build#*:}" qemu-aarch64 -cpu "${build%%:*}" -L .emulated/root .emulated/root/usr/bin/python3.11
done
