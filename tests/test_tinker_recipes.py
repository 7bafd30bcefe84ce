"""Two recipes of tinker-cookbook, unmodified, on the demo model; `make tinker-test` makes the environment they need."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
from pathlib import Path

import pytest
from server_process import DEMO, ROOT, ServerProcess

PYTHON = ROOT / ".venv-tinker" / "bin" / "python"
MODEL = "Qwen/Qwen3-8B-Base"  # of the cookbook's table; it only says how messages are written
WORDS = ["three", "happy", "wolves", "sing", "tonight", "red", "foxes", "run", "small", "birds", "fly", "over"]
SPLITS = "\n".join(f"  - split: {name}\n    path: main/{name}.jsonl" for name in ("train", "test"))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON.exists(), reason="no .venv-tinker: make tinker-test"),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working directory with the tokenizer and data that the recipes would fetch."""
    draw = random.Random(0)
    tokenizer = tmp_path / MODEL
    tokenizer.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        shutil.copy(DEMO / name, tokenizer)
    chats, sums = [], []
    for _ in range(24):
        text = " ".join(draw.sample(WORDS, 4))
        messages = [{"role": "user", "content": text}, {"role": "assistant", "content": text.upper()}]
        chats.append({"prompt": text, "messages": messages, "category": "shout"})
    for _ in range(16):
        a, b = draw.randint(1, 9), draw.randint(1, 9)
        sums.append({"question": f"What is {a} + {b}?", "answer": f"It is.\n#### {a + b}"})
    for place, rows in (("HuggingFaceH4/no_robots", chats), ("openai/gsm8k/main", sums)):
        (tmp_path / place).mkdir(parents=True)
        for split in ("train", "test"):
            (tmp_path / place / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    readme = f"---\nconfigs:\n- config_name: main\n  data_files:\n{SPLITS}\n---\n"
    (tmp_path / "openai" / "gsm8k" / "README.md").write_text(readme)
    return tmp_path


@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        ("sl_loop", ["max_length=256"]),
        ("rl_loop", ["group_size=4", "max_tokens=16", "loss_fn=importance_sampling"]),
    ],
)
def test_a_recipe_runs_to_its_end(folder: Path, recipe: str, options: list[str]) -> None:
    given = [f"model_name={MODEL}:demo", "batch_size=4", "lora_rank=8", "save_every=2", f"log_path=run-{recipe}"]
    environment = {**os.environ, "TINKER_API_KEY": "tml-any", "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    served = ("--served-model-name", "demo", "--training-memory", "1GiB", "--threads", "1")
    with ServerProcess(folder / "store", *served) as server:
        done = subprocess.run(
            [PYTHON, "-m", f"tinker_cookbook.recipes.{recipe}", f"base_url={server.url}", *given, *options],
            cwd=folder, env=environment, capture_output=True, text=True, timeout=250,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Training completed" in done.stdout + done.stderr
