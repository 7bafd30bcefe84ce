"""Download the pinned wheels that a CUDA image lacks, for `make gpu-check` on a machine without a network.

    python bench/gpu/wheels.py --python 3.12 --into wheels

reads requirements/*.txt and downloads everything but what such an image has in its own versions (torch and its
dependencies) and what the GPU checks do not need. Needs pip and a network; `bench/gpu/check.py` installs them.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
IMAGE = {  # packages of an image with torch for CUDA and transformers; other versions could be incompatible
    "accelerate", "filelock", "fsspec", "hf-xet", "huggingface-hub", "mpmath", "networkx", "numpy", "psutil", "regex",
    "safetensors", "setuptools", "shellingham", "sympy", "tokenizers", "torch", "tqdm", "transformers", "triton",
    "typer",
}  # fmt: skip
UNUSED = {  # packages that GPU tests and benchmark do not use, and their dependencies
    "ast-serialize", "bitsandbytes", "compressed-tensors", "httpcore2", "httpx2", "jiter", "librt", "loguru", "mypy",
    "mypy-extensions", "openai", "pathspec", "ruff", "sniffio", "torchao", "truststore", "types-pyyaml",
}  # fmt: skip
GLIBC = range(17, 40)  # minor versions of accepted wheels; pip needs each one listed
LIMIT = 60 << 20  # bytes that may be copied along with a checkout


def pinned(lines: Iterable[str]) -> list[str]:
    """The requirements to download, from the lines of a requirements file."""
    found = []
    for line in lines:
        requirement = line.partition("#")[0].partition(";")[0].strip()
        name, equal, _ = requirement.partition("==")
        if equal and name not in IMAGE | UNUSED:
            found.append(requirement)
    return found


def download(requirements: Sequence[str], python: str, folder: Path) -> None:
    """Replace the folder's wheels by these. Raises RuntimeError if some cannot be downloaded."""
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.whl"):
        old.unlink()
    platforms = [f"manylinux_2_{minor}_x86_64" for minor in GLIBC] + ["manylinux2014_x86_64", "manylinux1_x86_64"]
    command = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--implementation=cp", f"--python-version={python}", f"--dest={folder}"]
    command += [f"--platform={each}" for each in platforms]
    if subprocess.run([*command, *requirements]).returncode:
        raise RuntimeError(f"not all wheels for Python {python} could be downloaded")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default="3.12", help="Python version on the GPU machine")
    parser.add_argument("--into", type=Path, default=ROOT / "wheels")
    args = parser.parse_args(arguments)
    files = sorted((ROOT / "requirements").glob("*.txt"))
    requirements = sorted({each for file in files for each in pinned(file.read_text().splitlines())})
    try:
        download(requirements, args.python, args.into)
    except RuntimeError as error:
        raise SystemExit(f"gpu-wheels: {error}") from error
    size = sum(file.stat().st_size for file in args.into.glob("*.whl"))
    print(f"{args.into}: {len(requirements)} wheels for Python {args.python}, {size / 2**20:.1f} MiB")
    if size > LIMIT:
        raise SystemExit(f"gpu-wheels: that is more than {LIMIT >> 20} MiB")


if __name__ == "__main__":
    main()
