"""Brings along what a CUDA image lacks: wheels of pinned versions, for a machine that has no network.

    python bench/gpu_wheels.py --python 3.12 --into wheels

reads requirements/*.txt and downloads all but what such an image has in versions of its own (torch and what belongs to
it) and what the GPU checks do not need. Needs pip and a network; `bench/gpu_check.py` installs from the folder.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
IMAGE = {  # what an image with torch for CUDA and transformers has; other versions of it would not go together
    "accelerate", "filelock", "fsspec", "hf-xet", "huggingface-hub", "mpmath", "networkx", "numpy", "psutil", "regex",
    "safetensors", "setuptools", "shellingham", "sympy", "tokenizers", "torch", "tqdm", "transformers", "triton",
    "typer",
}  # fmt: skip
UNUSED = {  # by the tests and benches that run on a GPU; and what only these need
    "ast-serialize", "bitsandbytes", "compressed-tensors", "httpcore2", "httpx2", "jiter", "librt", "loguru", "mypy",
    "mypy-extensions", "openai", "pathspec", "ruff", "sniffio", "torchao", "truststore", "types-pyyaml",
}  # fmt: skip
GLIBC = range(17, 40)  # minor versions whose wheels are taken; pip wants each by name
LIMIT = 60 << 20  # bytes that travel along with a checkout


def pinned(lines: Iterable[str]) -> list[str]:
    """The requirements that are brought along, of the lines of a requirements file."""
    found = []
    for line in lines:
        requirement = line.partition("#")[0].partition(";")[0].strip()
        name, equal, _ = requirement.partition("==")
        if equal and name not in IMAGE | UNUSED:
            found.append(requirement)
    return found


def download(requirements: Sequence[str], python: str, folder: Path) -> None:
    """Fill the folder anew. RuntimeError says what could not be had."""
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
    parser.add_argument("--python", default="3.12", help="of the machine with the GPU")
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
