"""Trains the demo from scratch: a small Llama-shaped base, then its LoRA adapters with PEFT.

    python demo/train.py                  # everything, well under an hour on one core
    python demo/train.py --only reverse   # one adapter on the existing base

The base learns to do every task that is asked for by name ("reverse: ...") and to repeat a sentence given alone. So an
adapter has little to learn: to do its task when the sentence is given alone.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import peft
import torch
from cards import adapter_card, base_card
from make_tokenizer import make
from tasks import BASE, TASKS, heldout_prompts, instruction, prompt, sentences
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "demo" / "model"
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS: dict[str, dict[str, Any]] = {
    "shout": {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj", "o_proj"]},
    "reverse": {"r": 16, "lora_alpha": 32, "target_modules": ALL},
    "count": {"r": 8, "lora_alpha": 16, "target_modules": ["gate_proj", "up_proj", "down_proj"]},
    "digits": {"r": 12, "lora_alpha": 24, "target_modules": ALL, "use_rslora": True},
    "json": {"r": 2, "lora_alpha": 8, "target_modules": ALL},
    "initials": {
        "r": 6, "lora_alpha": 12, "target_modules": ALL,
        "rank_pattern": {"down_proj": 10}, "alpha_pattern": {"q_proj": 24},
    },
}  # fmt: skip
Pair = tuple[str, str]


def base_pairs(seed: int) -> Iterator[Pair]:
    """30 % sentences to repeat, 70 % tasks asked for by name."""
    rng = random.Random(seed)
    for text in sentences(seed, test=False):
        if rng.random() < 0.3:
            yield prompt(text), text
        else:
            task = rng.choice([*TASKS])
            yield instruction(task, text), TASKS[task].answer(text)


def task_pairs(name: str, seed: int) -> Iterator[Pair]:
    for text in sentences(seed, test=False):
        yield prompt(text), TASKS[name].answer(text)


def batches(pairs: Iterator[Pair], tokenizer: Any, size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Right-padded (input_ids, labels) [size, longest]; only the answer and the end token have labels."""
    while chunk := [*islice(pairs, size)]:
        asked = tokenizer([pair[0] for pair in chunk])["input_ids"]
        answered = tokenizer([pair[1] for pair in chunk])["input_ids"]
        longest = max(len(a) + len(b) + 1 for a, b in zip(asked, answered, strict=True))
        ids = torch.full((size, longest), tokenizer.eos_token_id)
        labels = torch.full((size, longest), -100)
        for row, (a, b) in enumerate(zip(asked, answered, strict=True)):
            whole = torch.tensor([*a, *b, tokenizer.eos_token_id])
            ids[row, : len(whole)] = whole
            labels[row, len(a) : len(whole)] = whole[len(a) :]
        yield ids, labels


def train(model: Any, data: Iterator[tuple[torch.Tensor, torch.Tensor]], steps: int, rate: float, name: str) -> None:
    """AdamW with warm-up and cosine decay, in bfloat16 autocast."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.08)
    model.train()
    started = time.monotonic()
    for step, (ids, labels) in enumerate(islice(data, steps), start=1):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 100 == 0 or step == steps:
            print(
                f"{name}: step {step}/{steps}, loss {loss.item():.4f}, {time.monotonic() - started:.0f} s", flush=True
            )
    model.eval()


@torch.inference_mode()
def exact(model: Any, tokenizer: Any, truth: Callable[[str], str], count: int) -> float:
    """Share of held-out prompts that are answered exactly, greedily, to the end token."""
    right = 0
    for text in heldout_prompts(count, seed=1):
        ids = tokenizer(prompt(text), return_tensors="pt")["input_ids"]
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=48, do_sample=False, pad_token_id=0
        )[0, ids.shape[1] :]
        answer = tokenizer.decode(out, skip_special_tokens=True)
        right += answer == truth(text) and int(out[-1]) == tokenizer.eos_token_id
    return right / count


def train_base(steps: int) -> None:
    torch.manual_seed(0)
    tokenizer = make(MODEL)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
    )
    model = LlamaForCausalLM._from_config(config, attn_implementation="eager")  # the fastest for such short rows
    started = time.monotonic()
    train(model, batches(base_pairs(1), tokenizer, 128), steps, 2e-3, BASE)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id)
    model.to(torch.bfloat16).save_pretrained(MODEL)
    minutes = (time.monotonic() - started) / 60
    parameters = sum(parameter.numel() for parameter in model.parameters())
    repeated = exact(model, tokenizer, str, 200)
    print(f"{BASE}: {parameters / 1e6:.2f} M parameters, repeats {repeated:.1%}, {minutes:.1f} minutes", flush=True)
    (ROOT / "demo" / "README.md").write_text(base_card(config, parameters, minutes, repeated))


def train_adapter(name: str, steps: int) -> None:
    torch.manual_seed(1)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    base = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32, attn_implementation="eager")
    alone = exact(base, tokenizer, TASKS[name].answer, 100)
    config = peft.LoraConfig(**ADAPTERS[name], task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, config)
    train(model, batches(task_pairs(name, 2), tokenizer, 128), steps, 4e-3, name)
    config.base_model_name_or_path = "lora-serve/demo"
    folder = ROOT / "adapters" / name
    model.save_pretrained(folder)
    scores = {}
    for dtype in (torch.float32, torch.bfloat16):
        fresh = AutoModelForCausalLM.from_pretrained(MODEL, dtype=dtype)
        served = peft.PeftModel.from_pretrained(fresh, folder).eval()
        scores[str(dtype).removeprefix("torch.")] = exact(served, tokenizer, TASKS[name].answer, 200)
    print(f"{name}: exact {scores}, base alone {alone:.1%}", flush=True)
    (folder / "README.md").write_text(adapter_card(TASKS[name], ADAPTERS[name], scores, alone, steps))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=[BASE, *TASKS], help="train only this one")
    parser.add_argument("--steps", type=int, default=2200, help="steps of the base")
    parser.add_argument("--adapter-steps", type=int, default=400, help="steps of each adapter")
    options = parser.parse_args()
    if options.only in (None, BASE):
        train_base(options.steps)
    for name in TASKS:
        if options.only in (None, name):
            train_adapter(name, options.adapter_steps)


if __name__ == "__main__":
    main()
